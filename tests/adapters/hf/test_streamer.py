"""Streaming: the user's streamer receives released text only, and always its end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AsyncTextIteratorStreamer,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from mmguard_adapters.hf import decision_of, guard, unguard  # noqa: E402
from mmguard_plugins import Action, AdapterError, Blocked, Engine  # noqa: E402
from tests import tiny  # noqa: E402
from tests.adapters.hf import guarding  # noqa: E402

LONG = {"min_new_tokens": 30, "max_new_tokens": 30, "do_sample": False}
STREAM = {"stream": {"check_every_tokens": 2, "check_every_s": 60, "hold_tokens": 8}}
ANSWER = "yes the image is harmless <think> a </think> photo of a cat in this picture"


class Recorder(BaseStreamer):
    """A streamer of the user's own, which takes ids."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.ended = 0

    def put(self, value: Any) -> None:
        assert not self.ended
        self.calls.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1

    @property
    def ids(self) -> list[int]:
        return [i for call in self.calls[1:] for i in call]


class Shouting(TextStreamer):
    """A text streamer that overrides what transformers calls."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.shown = ""
        self.puts = 0

    def put(self, value: Any) -> None:
        self.puts += 1
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.shown += text


class Scripted:
    """A model that gives one certain answer, unguarded and guarded alike."""

    def __init__(self, answer: str = ANSWER) -> None:
        self.vlm = tiny.llava()
        self.tokenizer = self.vlm.processor.tokenizer
        self.answer = answer
        self.script = [*self.tokenizer(answer)["input_ids"], self.tokenizer.eos_token_id]

    def guard(self, engine: Engine, **options: Any) -> None:
        guard(self.vlm.model, self.vlm.processor, engine, **options)

    def inputs(self, text: str = "") -> Any:
        prompt = f"{self.vlm.prompt} {text}"
        return self.vlm.processor(text=prompt, images=tiny.image(), return_tensors="pt")

    def generate(self, streamer: Any, text: str = "", **options: Any) -> Any:
        inputs = self.inputs(text)
        start = inputs["input_ids"].shape[1]

        def force(_: int, ids: Any) -> list[int]:
            return [self.script[min(len(ids) - start, len(self.script) - 1)]]

        arguments = {"max_new_tokens": 60, "do_sample": False} | options
        return self.vlm.model.generate(
            **inputs, **arguments, prefix_allowed_tokens_fn=force, streamer=streamer
        )

    def iterate(self, text: str = "", **options: Any) -> tuple[str, Any]:
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
        )
        results: list[Any] = []

        def work() -> None:
            results.append(self.generate(streamer, text, **options))

        thread = threading.Thread(target=work)
        thread.start()
        shown = "".join(streamer)
        thread.join()
        return shown, (results[0] if results else None, streamer)

    def new_text(self, result: Any) -> str:
        start = self.inputs()["input_ids"].shape[1]
        return str(self.tokenizer.decode(result[0, start:], skip_special_tokens=True))


def watching(needle: str = "", action: Action = Action.BLOCK, **stream: Any) -> Engine:
    settings = {"stream": STREAM["stream"] | stream}
    return guarding.engine_of(guarding.Watcher(needle, action), **settings)


def test_an_allowed_answer_streams_in_full() -> None:
    scripted = Scripted()
    scripted.guard(watching())
    shown, (result, streamer) = scripted.iterate()
    assert shown == ANSWER
    assert scripted.new_text(result) == ANSWER
    assert not decision_of(streamer).blocked


def test_text_comes_before_the_answer_is_whole() -> None:
    scripted = Scripted("yes " * 40)
    scripted.guard(watching())
    streamer = Recorder()
    lengths: list[int] = []

    def note(ids: Any, scores: Any, **kwargs: Any) -> Any:
        lengths.append(len(streamer.ids))
        return torch.zeros(len(ids), dtype=torch.bool)

    scripted.generate(streamer, stopping_criteria=[note])
    assert any(0 < n < len(scripted.script) - 8 for n in lengths)


@pytest.mark.parametrize("needle", ["harmless", "cat in this", "yes", "picture", " a </think>"])
def test_nothing_of_a_blocked_phrase_is_shown(needle: str) -> None:
    scripted = Scripted()
    scripted.guard(watching(needle))
    shown, (result, streamer) = scripted.iterate()
    before = ANSWER[: ANSWER.index(needle)]
    assert shown.endswith(guarding.OUTPUT_REFUSAL)
    assert before.startswith(shown.removesuffix(guarding.OUTPUT_REFUSAL))
    assert scripted.new_text(result) == guarding.OUTPUT_REFUSAL
    assert decision_of(result) == decision_of(streamer)
    assert decision_of(result).blocked


def test_a_block_ends_the_generation() -> None:
    scripted = Scripted("yes forbidden " + "no " * 40)
    scripted.guard(watching("forbidden"))
    with guarding.counted(scripted.vlm.model) as calls:
        scripted.iterate()
    assert calls.count("LlavaForConditionalGeneration") < 25


def test_a_refused_request_streams_the_refusal() -> None:
    scripted = Scripted()
    scripted.guard(watching())
    with guarding.counted(scripted.vlm.model) as calls:
        shown, (result, streamer) = scripted.iterate("forbidden")
    assert shown == guarding.INPUT_REFUSAL
    assert not calls
    assert decision_of(streamer).input.blocked
    assert decision_of(result).input.blocked


def test_the_decision_is_there_when_the_stream_ends() -> None:
    class Asking(Recorder):
        def end(self) -> None:
            super().end()
            blocked.append(decision_of(self).blocked)

    blocked: list[bool] = []
    scripted = Scripted()
    scripted.guard(watching("cat"))
    for text in ("", "forbidden"):
        scripted.generate(Asking(), text)
    assert blocked == [True, True]


def test_a_redacted_answer_streams_redacted() -> None:
    scripted = Scripted()
    scripted.guard(watching("harmless", Action.REDACT, hold_tokens=20))
    shown, (result, _) = scripted.iterate()
    assert shown == scripted.new_text(result) == ANSWER.replace("harmless", "[redacted]")


def test_reasoning_and_answer_stream_as_two_channels() -> None:
    answer = "<think> a cat </think> yes"
    scripted, watcher = Scripted(answer), guarding.Watcher()
    scripted.guard(guarding.engine_of(watcher, **STREAM))
    shown, _ = scripted.iterate()
    assert shown == answer
    assert any(
        r.reasoning.strip() == "<think> a cat </think>" and r.answer.strip() == "yes"
        for r in watcher.responses
    )


@pytest.mark.parametrize("skip", [True, False])
def test_the_prompt_is_shown_as_the_streamer_wants_it(
    skip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted = Scripted()
    scripted.guard(watching("cat"))
    options = {"skip_prompt": skip, "skip_special_tokens": True}
    for text, expected in [("", guarding.OUTPUT_REFUSAL), ("forbidden", guarding.INPUT_REFUSAL)]:
        scripted.generate(TextStreamer(scripted.tokenizer, **options), text)
        shown = capsys.readouterr().out
        assert shown.rstrip("\n").endswith(expected)
        assert (tiny.QUESTION in shown) is not skip


def test_a_streamer_of_ids_gets_the_same_ids_as_unguarded() -> None:
    free, guarded = Recorder(), Recorder()
    scripted = Scripted("yes the ‚image‘ 漢字 🙂 is harmless")
    scripted.generate(free)
    scripted.guard(watching())
    scripted.generate(guarded)
    assert guarded.calls == free.calls
    assert guarded.ended == 1


@pytest.mark.parametrize("needle", ["harmless", "picture"])
def test_a_streamer_of_ids_gets_a_refusal_in_ids(needle: str) -> None:
    scripted, streamer = Scripted(), Recorder()
    scripted.guard(watching(needle))
    scripted.generate(streamer)
    shown = scripted.tokenizer.decode(streamer.ids)
    assert shown.endswith(guarding.OUTPUT_REFUSAL)
    assert needle not in shown
    assert streamer.ended == 1


def test_a_streamer_of_ids_gets_redacted_text_in_ids() -> None:
    scripted, streamer = Scripted(), Recorder()
    scripted.guard(watching("armles", Action.REDACT, hold_tokens=20))
    scripted.generate(streamer)
    shown = scripted.tokenizer.decode(streamer.ids, skip_special_tokens=True)
    assert shown == ANSWER.replace("armles", "[redacted]")


def test_a_text_streamer_with_its_own_put_is_given_ids() -> None:
    scripted = Scripted()
    streamer = Shouting(scripted.tokenizer)
    scripted.guard(watching("harmless"))
    scripted.generate(streamer)
    assert streamer.puts > 1
    assert streamer.shown.endswith(guarding.OUTPUT_REFUSAL)
    assert "harm" not in streamer.shown


def test_an_async_streamer_is_fed() -> None:
    scripted = Scripted()
    scripted.guard(watching("cat"))

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(
            scripted.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
        )
        thread = threading.Thread(target=scripted.generate, args=(streamer,))
        thread.start()
        shown = "".join([text async for text in streamer])
        thread.join()
        return shown

    shown = asyncio.run(read())
    assert shown.endswith(guarding.OUTPUT_REFUSAL)
    assert "cat" not in shown


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assisted": True}])
def test_several_tokens_may_come_at_once(options: dict[str, Any]) -> None:
    scripted = Scripted()
    scripted.guard(watching("cat"))
    if options.pop("assisted", False):
        options["assistant_model"] = tiny.llava().model
    shown, _ = scripted.iterate(**options)
    assert shown.endswith(guarding.OUTPUT_REFUSAL)
    assert "cat" not in shown


def test_a_stream_ends_when_generate_fails() -> None:
    scripted = Scripted()
    scripted.guard(watching())

    def fail(ids: Any, scores: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the model broke")

    broken: list[dict[str, Any]] = [
        {"stopping_criteria": [fail]},
        {"num_beams": 2},
        {"custom_generate": fail},
    ]
    for options in broken:
        streamer = Recorder()
        with pytest.raises((RuntimeError, ValueError, AdapterError)):
            scripted.generate(streamer, **options)
        assert streamer.ended == 1


def test_a_blocked_stream_ends_before_the_exception_asked_for() -> None:
    scripted, streamer = Scripted(), Recorder()
    scripted.guard(watching("cat"), raise_on_block=True)
    for text in ("", "forbidden"):
        streamer = Recorder()
        with pytest.raises(Blocked):
            scripted.generate(streamer, text)
        assert streamer.ended == 1
        assert decision_of(streamer).blocked


def test_a_batch_cannot_share_a_guarded_streamer() -> None:
    scripted, streamer = Scripted(), Recorder()
    scripted.guard(watching())
    texts, images = [scripted.vlm.prompt] * 2, [[tiny.image()], [tiny.image()]]
    inputs = scripted.vlm.processor(text=texts, images=images, return_tensors="pt")
    with pytest.raises(AdapterError, match="2 sequences cannot share a guarded streamer"):
        scripted.vlm.model.generate(**inputs, max_new_tokens=3, streamer=streamer)
    assert streamer.ended == 1


def test_without_output_guards_the_streamer_is_fed_directly() -> None:
    scripted, streamer, free = Scripted(), Recorder(), Recorder()
    scripted.generate(free)
    scripted.guard(guarding.engine_of(guarding.InputOnly()))
    scripted.generate(streamer)
    assert streamer.calls == free.calls
    assert streamer.ended == 1


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "blip2", "florence2"])
def test_other_families_stream(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    tokenizer = vlm.processor.tokenizer
    shown: list[str] = []
    for text in ("", "forbidden"):
        inputs = vlm.processor(
            text=f"{vlm.prompt} {text}", images=tiny.image(), return_tensors="pt"
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        vlm.model.generate(**inputs, **LONG, streamer=streamer)
        free = "".join(streamer)
        guard(vlm.model, vlm.processor, watching())
        inputs = vlm.processor(
            text=f"{vlm.prompt} {text}", images=tiny.image(), return_tensors="pt"
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        vlm.model.generate(**inputs, **LONG, streamer=streamer)
        shown.append("".join(streamer))
        unguard(vlm.model)
        assert shown[-1] == (guarding.INPUT_REFUSAL if text else free)
