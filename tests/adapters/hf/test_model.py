"""`generate` on a guarded model, in all the ways transformers generates."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer  # noqa: E402

from mmguard_adapters.hf import Decisions, decision_of, guard, is_guarded, unguard  # noqa: E402
from mmguard_plugins import (  # noqa: E402
    Action,
    AdapterError,
    Blocked,
    Guard,
    Request,
    Response,
    Verdict,
    hookimpl,
)
from tests import tiny  # noqa: E402
from tests.adapters.hf import guarding  # noqa: E402

LONG = {"min_new_tokens": 4, "max_new_tokens": 8, "do_sample": False}
Prepare = Callable[..., Any]


@pytest.fixture
def vlm() -> tiny.TinyVLM:
    return tiny.llava()


@pytest.fixture
def watcher(vlm: tiny.TinyVLM) -> guarding.Watcher:
    watcher = guarding.Watcher()
    guard(vlm.model, vlm.processor, guarding.engine_of(watcher))
    return watcher


def prepare(vlm: tiny.TinyVLM, *extra: str) -> Any:
    texts = [f"{vlm.prompt} {text}" for text in extra or ("",)]
    images = [[tiny.image(seed=i)] for i in range(len(texts))]
    return vlm.processor(text=texts, images=images, return_tensors="pt", padding=True)


def answers(vlm: tiny.TinyVLM, inputs: Any, result: Any) -> list[str]:
    ids = getattr(result, "sequences", result)[:, inputs["input_ids"].shape[1] :]
    return [str(t) for t in vlm.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


# --- ways of generating ---------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "config": {"generation_config": GenerationConfig(max_new_tokens=6, num_beams=2)},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_is_unchanged(vlm: tiny.TinyVLM, way: str) -> None:
    options = LONG | WAYS[way]
    torch.manual_seed(0)
    expected = vlm.model.generate(**prepare(vlm), **options)
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    torch.manual_seed(0)
    result = vlm.model.generate(**prepare(vlm), **options)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_returned_sequence_is_judged(vlm: tiny.TinyVLM, way: str) -> None:
    options = LONG | WAYS[way]
    watcher = guarding.Watcher(needle="")
    guard(vlm.model, vlm.processor, guarding.engine_of(watcher))
    result = vlm.model.generate(**prepare(vlm), **options)
    assert len(watcher.responses) == len(result) == options.get("num_return_sequences", 1)


def test_one_bad_sequence_of_several_is_replaced(vlm: tiny.TinyVLM) -> None:
    options = LONG | {"do_sample": True, "num_return_sequences": 3}
    inputs = prepare(vlm)
    torch.manual_seed(0)
    before = answers(vlm, inputs, vlm.model.generate(**inputs, **options))
    assert len(set(before)) == 3
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher(needle=before[1])))
    torch.manual_seed(0)
    result = vlm.model.generate(**prepare(vlm), **options)
    assert answers(vlm, inputs, result) == [before[0], guarding.OUTPUT_REFUSAL, before[2]]
    assert [decision_of(result, i).blocked for i in range(3)] == [False, True, False]


@pytest.mark.usefixtures("watcher")
@pytest.mark.parametrize("beams", [1, 2])
def test_a_refused_row_is_returned_as_often_as_asked(vlm: tiny.TinyVLM, beams: int) -> None:
    inputs = prepare(vlm, "yes", "forbidden")
    result = vlm.model.generate(
        **inputs, max_new_tokens=3, num_beams=max(2, beams), num_return_sequences=2
    )
    assert [decision_of(result, i).blocked for i in range(4)] == [False, False, True, True]
    assert answers(vlm, inputs, result)[2:] == [guarding.INPUT_REFUSAL] * 2


def test_an_assistant_drafts_unguarded_for_a_guarded_model(vlm: tiny.TinyVLM) -> None:
    inputs = prepare(vlm)
    expected = vlm.model.generate(**inputs, **LONG)
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    for assistant in (tiny.llava().model, vlm.model):
        result = vlm.model.generate(**prepare(vlm), **LONG, assistant_model=assistant)
        assert torch.equal(result, expected)


def test_an_ended_refusal_ends_with_the_end_token(vlm: tiny.TinyVLM) -> None:
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    result = vlm.model.generate(
        **prepare(vlm, "forbidden", "yes"), **(LONG | {"max_new_tokens": 40})
    )
    refusal = vlm.processor.tokenizer(guarding.INPUT_REFUSAL)["input_ids"]
    start = prepare(vlm, "forbidden", "yes")["input_ids"].shape[1]
    ids = result[0, start:].tolist()
    end = len(refusal)
    assert ids[: end + 1] == [*refusal, vlm.processor.tokenizer.eos_token_id]
    assert set(ids[end + 1 :]) <= {vlm.processor.tokenizer.pad_token_id}


# --- results that hold more than tokens -----------------------------------------------------------

MORE = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


def test_an_allowed_result_keeps_its_scores(vlm: tiny.TinyVLM) -> None:
    vlm.model.set_attn_implementation("eager")
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    result = vlm.model.generate(**prepare(vlm), **LONG, **MORE)
    assert result.scores is not None
    assert not decision_of(result).blocked


@pytest.mark.parametrize("beams", [1, 2])
def test_a_refused_result_spells_out_nothing_else(vlm: tiny.TinyVLM, beams: int) -> None:
    vlm.model.set_attn_implementation("eager")
    inputs, options = prepare(vlm), LONG | MORE | {"num_beams": beams}
    free = vlm.model.generate(**inputs, **options)
    needle = answers(vlm, inputs, free)[0]
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher(needle=needle)))
    for extra in ("", "forbidden"):
        result = vlm.model.generate(**prepare(vlm, extra), **options)
        assert type(result) is type(free)
        assert list(result.keys()) == ["sequences"]
        assert result.past_key_values is None
        assert decision_of(result).blocked
        assert decision_of(result.sequences).blocked


# --- inputs that passed no guarded processor ------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llava", "gemma3", "blip2", "qwen2_vl", "qwen3_vl", "florence2"]
)
def test_foreign_inputs_are_read_back_and_judged(family: str) -> None:
    vlm, watcher = tiny.FAMILIES[family](), guarding.Watcher()
    foreign = [prepare(vlm, "yes"), prepare(vlm, "forbidden")]
    expected = vlm.model.generate(**foreign[0], **LONG)
    guard(vlm.model, vlm.processor, guarding.engine_of(watcher))
    assert torch.equal(vlm.model.generate(**foreign[0], **LONG), expected)
    assert watcher.requests[0].text.strip() == f"{tiny.QUESTION} yes"
    assert len(watcher.requests[0].images) == 1
    result = vlm.model.generate(**foreign[1], **LONG)
    assert decision_of(result).input.blocked


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_foreign_pixels_are_turned_back_into_the_image(family: str) -> None:
    vlm, watcher = tiny.FAMILIES[family](), guarding.Watcher()
    red = Image.new("RGB", (60, 60), guarding.BAD_COLOUR)
    inputs = vlm.processor(text=vlm.prompt, images=red, return_tensors="pt")
    guard(vlm.model, vlm.processor, guarding.engine_of(watcher))
    result = vlm.model.generate(**inputs, **LONG)
    assert decision_of(result).input.blocked
    assert not decision_of(result).input.coverage.undecodable


@pytest.mark.parametrize("family", ["llava_next", "internvl", "mllama"])
def test_foreign_tiles_are_refused(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    inputs = prepare(vlm)
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    with guarding.counted(vlm.model) as calls:
        result = vlm.model.generate(**inputs, **LONG)
    assert decision_of(result).blocked
    assert not calls


def test_pixels_out_of_range_are_refused(vlm: tiny.TinyVLM, watcher: guarding.Watcher) -> None:
    inputs = prepare(vlm)
    inputs["pixel_values"] = inputs["pixel_values"] * 3
    assert decision_of(vlm.model.generate(**inputs, **LONG)).input.blocked
    assert len(watcher.requests) == 1 + 1


@pytest.mark.usefixtures("watcher")
def test_what_cannot_be_read_back_is_refused(vlm: tiny.TinyVLM) -> None:
    inputs = dict(prepare(vlm))
    embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
    features = vlm.model.get_image_features(pixel_values=inputs["pixel_values"])
    no_pixels = {k: v for k, v in inputs.items() if k != "pixel_values"}
    cache = DynamicCache()
    vlm.model(**inputs, past_key_values=cache)
    refused = [
        {"inputs_embeds": embeds},
        inputs | {"inputs_embeds": embeds},
        no_pixels | {"mm_encoder_outputs": {"image": features}},
        inputs | {"past_key_values": cache},
        inputs | {"pixel_values_videos": inputs["pixel_values"]},
        inputs | {"input_features": torch.zeros(1, 80, 30)},
        inputs | {"negative_prompt_ids": inputs["input_ids"], "guidance_scale": 2.0},
    ]
    for arguments in refused:
        with guarding.counted(vlm.model) as calls:
            result = vlm.model.generate(**arguments, **LONG)
        assert decision_of(result).input.blocked, arguments.keys()
        assert not calls
        text = vlm.processor.tokenizer.decode(result[0], skip_special_tokens=True)
        assert text.endswith(guarding.INPUT_REFUSAL)
    assert not decision_of(
        vlm.model.generate(**inputs, **LONG, past_key_values=DynamicCache())
    ).blocked


@pytest.mark.usefixtures("watcher")
def test_ids_are_an_input_by_position_too(vlm: tiny.TinyVLM) -> None:
    ids = vlm.processor.tokenizer("a forbidden thing", return_tensors="pt")["input_ids"]
    assert decision_of(vlm.model.generate(ids, **LONG)).blocked
    ids = vlm.processor.tokenizer("a nice thing", return_tensors="pt")["input_ids"]
    assert not decision_of(vlm.model.generate(ids, **LONG)).blocked


def test_a_mask_hides_nothing_from_the_guards(vlm: tiny.TinyVLM, watcher: guarding.Watcher) -> None:
    inputs = prepare(vlm, "yes")
    inputs["attention_mask"][0, -1] = 0
    vlm.model.generate(**inputs, **LONG)
    assert len(watcher.requests) == 2
    assert watcher.requests[1].text.endswith("yes")


def test_other_ids_are_not_taken_for_checked_ones(
    vlm: tiny.TinyVLM, watcher: guarding.Watcher
) -> None:
    inputs = prepare(vlm, "yes")
    inputs["input_ids"][0, -1] = vlm.processor.tokenizer("no")["input_ids"][0]
    vlm.model.generate(**inputs, **LONG)
    assert len(watcher.requests) == 2


# --- closed ways ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("watcher")
def test_other_ways_into_the_model_are_closed(vlm: tiny.TinyVLM) -> None:
    inputs = prepare(vlm)
    with pytest.raises(AdapterError, match="custom_generate is closed"):
        vlm.model.generate(**inputs, custom_generate=lambda *_, **__: None)
    with pytest.raises(AdapterError, match="paged cache is closed"):
        vlm.model.generate(**inputs, cache_implementation="paged")
    with pytest.raises(AdapterError, match="generate_batch is closed"):
        vlm.model.generate_batch([[1, 2, 3]])
    with pytest.raises(AdapterError, match="init_continuous_batching is closed"):
        vlm.model.init_continuous_batching()


# --- what happens on a block ----------------------------------------------------------------------


def test_a_redacted_answer_is_encoded_anew(vlm: tiny.TinyVLM) -> None:
    inputs = prepare(vlm)
    said = answers(vlm, inputs, vlm.model.generate(**inputs, **LONG))[0]
    watcher = guarding.Watcher(needle=said[2:5], action=Action.REDACT)
    guard(vlm.model, vlm.processor, guarding.engine_of(watcher))
    result = vlm.model.generate(**prepare(vlm), **LONG)
    assert answers(vlm, inputs, result) == [said.replace(said[2:5], "[redacted]")]
    output = decision_of(result).output
    assert output is not None
    assert output.action is Action.REDACT


def test_a_redacted_request_is_redacted_before_it_is_tokenized(
    vlm: tiny.TinyVLM, watcher: guarding.Watcher
) -> None:
    inputs = prepare(vlm, "a secret thing", "yes")
    assert "a hidden thing" in vlm.processor.tokenizer.decode(inputs["input_ids"][0])
    result = vlm.model.generate(**inputs, **LONG)
    assert decision_of(result).input.action is Action.REDACT
    assert not decision_of(result).blocked
    assert len(watcher.requests) == 2


def test_text_to_redact_in_foreign_ids_blocks(vlm: tiny.TinyVLM) -> None:
    inputs = prepare(vlm, "a secret thing")
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    decision = decision_of(vlm.model.generate(**inputs, **LONG)).input
    assert decision.blocked
    assert "cannot be replaced" in decision.reason


class Raises(Guard):
    inline = True

    @hookimpl
    def check_input(self, request: Request) -> Verdict:
        raise RuntimeError("out of memory")


class RaisesLater(Guard):
    inline = True

    @hookimpl
    def check_input(self, request: Request) -> Verdict:
        return Verdict(self.name, Action.ALLOW)

    @hookimpl
    def check_output(self, response: Response) -> Verdict:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("broken", [Raises, RaisesLater])
def test_a_failing_guard_refuses(
    vlm: tiny.TinyVLM, broken: type[Guard], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="mmguard")
    engine = guarding.engine_of(broken(), uninspected={"image": "allow"})
    guard(vlm.model, vlm.processor, engine)
    inputs = prepare(vlm)
    result = vlm.model.generate(**inputs, **LONG)
    assert answers(vlm, inputs, result) == [guarding.ERROR_REFUSAL]
    assert decision_of(result).last.failed


def test_a_block_raises_only_if_asked(vlm: tiny.TinyVLM) -> None:
    inputs = prepare(vlm)
    said = answers(vlm, inputs, vlm.model.generate(**inputs, **LONG))[0]
    engine = guarding.engine_of(guarding.Watcher(needle=said))
    guard(vlm.model, vlm.processor, engine, raise_on_block=True)
    inputs = prepare(vlm, "", "forbidden")
    with (
        guarding.counted(vlm.model) as calls,
        pytest.raises(Blocked, match="row 1 is blocked at the input") as caught,
    ):
        vlm.model.generate(**inputs, **LONG)
    assert not calls
    assert caught.value.decision is not None
    assert caught.value.decision.categories == ("test",)
    with pytest.raises(Blocked, match="row 0 is blocked at the output"):
        vlm.model.generate(**prepare(vlm), **LONG)


def test_a_callback_hears_of_every_sequence(vlm: tiny.TinyVLM) -> None:
    heard: list[Decisions] = []
    engine = guarding.engine_of(guarding.Watcher())
    guard(vlm.model, vlm.processor, engine, on_decision=heard.append)
    result = vlm.model.generate(**prepare(vlm, "yes", "forbidden"), **LONG)
    assert heard == [decision_of(result, 0), decision_of(result, 1)]
    assert heard[1].to_dict()["input"]["action"] == "block"


def test_a_long_answer_is_stopped_early(vlm: tiny.TinyVLM) -> None:
    inputs, options = prepare(vlm, "yes", "no"), LONG | {"max_new_tokens": 60, "min_new_tokens": 60}
    said = answers(vlm, inputs, vlm.model.generate(**inputs, **options))
    assert said[0][:12] not in said[1]
    engine = guarding.engine_of(
        guarding.Watcher(needle=said[0][:12]), stream={"check_every_tokens": 5}
    )
    guard(vlm.model, vlm.processor, engine, stop_early=True)
    with guarding.counted(vlm.model) as calls:
        result = vlm.model.generate(**prepare(vlm, "yes"), **options)
    assert calls.count("LlavaForConditionalGeneration") < 30
    assert answers(vlm, prepare(vlm, "yes"), result) == [guarding.OUTPUT_REFUSAL]
    result = vlm.model.generate(**prepare(vlm, "yes", "no"), **options)
    assert answers(vlm, inputs, result) == [guarding.OUTPUT_REFUSAL, said[1]]


def test_what_was_stopped_early_stays_blocked(vlm: tiny.TinyVLM) -> None:
    class Impatient(Guard):
        inspects = guarding.Watcher.inspects

        @hookimpl
        def check_input(self, request: Request) -> Verdict:
            return Verdict(self.name, Action.ALLOW)

        @hookimpl
        def check_output(self, response: Response) -> Verdict:
            return Verdict(self.name, Action.ALLOW if response.finished else Action.BLOCK)

    engine = guarding.engine_of(Impatient(), stream={"check_every_tokens": 3})
    guard(vlm.model, vlm.processor, engine, stop_early=True)
    result = vlm.model.generate(**prepare(vlm), **LONG)
    assert answers(vlm, prepare(vlm), result) == [guarding.OUTPUT_REFUSAL]


def test_reasoning_is_judged_as_reasoning(vlm: tiny.TinyVLM) -> None:
    watcher = guarding.Watcher()
    guard(vlm.model, vlm.processor, guarding.engine_of(watcher))
    script = vlm.processor.tokenizer("<think> yes </think> no")["input_ids"]

    def force(_: int, ids: Any) -> list[int]:
        return [script[len(ids) - start]]

    inputs = prepare(vlm)
    start = inputs["input_ids"].shape[1]
    vlm.model.generate(
        **inputs, max_new_tokens=len(script), prefix_allowed_tokens_fn=force, do_sample=False
    )
    response = watcher.responses[-1]
    assert (response.reasoning.strip(), response.answer) == ("yes", "no")


def test_a_guard_may_ask_the_guarded_model(vlm: tiny.TinyVLM) -> None:
    class Asks(Guard):
        inspects = guarding.Watcher.inspects

        @hookimpl
        def check_input(self, request: Request) -> Verdict:
            return Verdict(self.name, Action.ALLOW)

        @hookimpl
        def check_output(
            self, request: Request, response: Response, generate: Callable[[Request], str] | None
        ) -> Verdict:
            if generate is None:  # an answer that still grows
                assert not response.finished or streams
            else:
                question = Request("is this safe ?", images=[request.images[0].data])
                heard.append(generate(question))
            return Verdict(self.name, Action.ALLOW)

    heard: list[str] = []
    streams: list[bool] = []
    guard(vlm.model, vlm.processor, guarding.engine_of(Asks()))
    vlm.model.generate(**prepare(vlm), **LONG)
    assert len(heard) == 1
    assert heard[0]
    streams.append(True)
    vlm.model.generate(**prepare(vlm), **LONG, streamer=TextIteratorStreamer(vlm.processor))
    assert len(heard) == 2


# --- objects around the model ---------------------------------------------------------------------


@pytest.mark.usefixtures("watcher")
def test_threads_keep_their_decisions_apart(vlm: tiny.TinyVLM) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(4):
            bad = (number + turn) % 2 == 1
            inputs = prepare(vlm, f"{number} {turn} {'forbidden' if bad else 'yes'}")
            result = vlm.model.generate(**inputs, **LONG)
            if decision_of(result).blocked is not bad:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_deep_copy_is_guarded_and_uses_its_own_weights(vlm: tiny.TinyVLM) -> None:
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    clone = copy.deepcopy(vlm.model)
    with torch.no_grad():
        for weight in clone.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert decision_of(clone.generate(**prepare(vlm, "forbidden"), **LONG)).blocked
    results = [m.generate(**prepare(vlm), **LONG).tolist() for m in (vlm.model, clone)]
    assert results[0] != results[1]
    unguard(clone)
    assert is_guarded(vlm.processor)
    assert not hasattr(clone.generate(**prepare(vlm, "forbidden"), **LONG), "mmguard")
    assert decision_of(vlm.model.generate(**prepare(vlm, "forbidden"), **LONG)).blocked


@pytest.mark.usefixtures("watcher")
def test_a_guarded_model_is_not_pickled_without_its_guard(vlm: tiny.TinyVLM) -> None:
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(vlm.model)


def test_guarded_objects_save_the_same_files(vlm: tiny.TinyVLM, tmp_path: Any) -> None:
    vlm.processor.save_pretrained(tmp_path / "free")
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    vlm.processor.save_pretrained(tmp_path / "guarded")
    vlm.model.save_pretrained(tmp_path / "guarded")
    unguard(vlm.model).save_pretrained(tmp_path / "free")
    for file in (tmp_path / "free").iterdir():
        assert file.read_bytes() == (tmp_path / "guarded" / file.name).read_bytes()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("order", ["model first", "adapter first"])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_peft_model_is_guarded(vlm: tiny.TinyVLM, order: str, task: str | None) -> None:
    peft = pytest.importorskip("peft")
    engine = guarding.engine_of(guarding.Watcher())
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task)
    if order == "model first":
        guard(vlm.model, vlm.processor, engine)
    model = peft.get_peft_model(vlm.model, lora)
    if order == "adapter first":
        assert guard(model, vlm.processor, engine) is model
    for entry in (model, model.get_base_model()):
        assert decision_of(entry.generate(**prepare(vlm, "forbidden"), **LONG)).blocked
        assert not decision_of(entry.generate(**prepare(vlm), **LONG)).blocked
    unguard(model)
    assert not hasattr(model.generate(**prepare(vlm, "forbidden"), **LONG), "mmguard")


def test_forward_stays_as_it_is(vlm: tiny.TinyVLM) -> None:
    inputs = prepare(vlm, "forbidden")
    with torch.inference_mode():
        expected = vlm.model(**inputs).logits
        guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
        assert torch.equal(vlm.model(**prepare(vlm, "forbidden")).logits, expected)


def test_without_output_guards_nothing_is_decoded(
    vlm: tiny.TinyVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.InputOnly()))
    inputs = prepare(vlm)
    monkeypatch.setattr(type(vlm.processor.tokenizer), "decode", None)
    decisions = decision_of(vlm.model.generate(**inputs, **LONG))
    assert decisions.output is None
    assert not decisions.blocked
