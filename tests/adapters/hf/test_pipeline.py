"""`pipeline("image-text-to-text")`: normal results, whatever is blocked."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from transformers import TextIteratorStreamer, pipeline  # noqa: E402

from mmguard_adapters.hf import decision_of, guard, is_guarded, unguard  # noqa: E402
from tests import tiny  # noqa: E402
from tests.adapters.hf import guarding  # noqa: E402


def options(**more: Any) -> dict[str, Any]:
    lengths = {"min_new_tokens": 4, "max_new_tokens": 6}
    return {"generate_kwargs": lengths | {"do_sample": False} | more}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def make(family: str = "llava") -> tuple[Any, str]:
    vlm = tiny.FAMILIES[family]()
    pipe = pipeline("image-text-to-text", model=vlm.model, processor=vlm.processor, device="cpu")
    return pipe, vlm.prompt


@pytest.fixture
def pipe() -> Any:
    return make()[0]


def chat(text: str, image: Any = None, **key: Any) -> list[dict[str, Any]]:
    block = {"type": "image"} | (key or {"image": image or tiny.image()})
    return [
        {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
        {"role": "user", "content": [block, {"type": "text", "text": text}]},
    ]


def free_and_guarded(pipe: Any, watcher: guarding.Watcher, **kwargs: Any) -> tuple[Any, Any]:
    free = pipe(**kwargs)
    guard(pipe, config=guarding.engine_of(watcher))
    return free, pipe(**kwargs)


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_a_string_with_an_image(pipe: Any, full: bool) -> None:
    watcher = guarding.Watcher()
    arguments = {"images": tiny.image(), "text": "<image> what ?", "return_full_text": full}
    free, guarded = free_and_guarded(pipe, watcher, **arguments, **options())
    assert guarded == free
    assert not decision_of(guarded).blocked
    assert len(watcher.requests) == 1
    refused = pipe(**arguments | {"text": "<image> forbidden"}, **options())
    prompt = "<image> forbidden" if full else ""
    assert refused == [
        {"input_text": "<image> forbidden", "generated_text": prompt + guarding.INPUT_REFUSAL}
    ]
    json.dumps(refused)


def test_a_chat_is_judged_turn_by_turn(pipe: Any) -> None:
    watcher = guarding.Watcher()
    free, guarded = free_and_guarded(pipe, watcher, text=chat("what ?"), **options())
    assert guarded == free
    (request,) = watcher.requests
    assert [(m.role, [p.kind.value for p in m.parts]) for m in request.messages] == [
        ("system", ["text"]),
        ("user", ["image", "text"]),
    ]
    assert request.messages[1].parts[0].source == "messages[1].content[0]"
    assert request.text == "be kind\nwhat ?"
    refused = pipe(text=chat("forbidden"), **options())
    assert refused[0]["generated_text"][-1] == {
        "role": "assistant",
        "content": guarding.INPUT_REFUSAL,
    }


def test_an_earlier_turn_is_judged_too(pipe: Any) -> None:
    guard(pipe, config=guarding.engine_of(guarding.Watcher()))
    turns = [
        *chat("forbidden"),
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        {"role": "user", "content": [{"type": "text", "text": "why ?"}]},
    ]
    assert decision_of(pipe(text=turns, **options())).input.blocked


def test_a_prefilled_answer_is_continued(pipe: Any) -> None:
    turns = [*chat("what ?"), {"role": "assistant", "content": [{"type": "text", "text": "It"}]}]
    free, guarded = free_and_guarded(pipe, guarding.Watcher(), text=turns, **options())
    assert guarded == free


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_next"])
def test_a_batch_of_chats(family: str, batch_size: int) -> None:
    pipe, _ = make(family)
    watcher = guarding.Watcher()
    chats = [chat("what is this ?"), chat("why ?", tiny.image(seed=3)), chat("yes")]
    free, guarded = free_and_guarded(pipe, watcher, text=chats, batch_size=batch_size, **options())
    assert guarded == free
    assert len(watcher.requests) == 3
    mixed = pipe(text=[chats[0], chat("forbidden"), chats[2]], batch_size=batch_size, **options())
    assert [decision_of(records).blocked for records in mixed] == [False, True, False]
    assert mixed[1][0]["generated_text"][-1]["content"] == guarding.INPUT_REFUSAL
    assert mixed[0] == free[0]


@pytest.mark.parametrize("returned", [1, 2])
def test_a_batch_of_strings(pipe: Any, returned: int) -> None:
    texts, images = ["<image> what ?", "<image> forbidden"], [tiny.image(), tiny.image(seed=1)]
    more = options(num_return_sequences=returned, num_beams=2)
    guard(pipe, config=guarding.engine_of(guarding.Watcher()))
    records = pipe(images=images, text=texts, return_full_text=False, **more)
    flat = [r for record in records for r in (record if isinstance(record, list) else [record])]
    if len(flat) < 2 * returned:  # transformers < 5.20 drops every record but the first ones
        assert [decision_of(r).blocked for r in flat] == [False, False]
        return
    assert [decision_of(r).blocked for r in flat] == [False] * returned + [True] * returned
    assert flat[-1]["generated_text"] == guarding.INPUT_REFUSAL


def test_text_alone(pipe: Any) -> None:
    watcher = guarding.Watcher()
    free, guarded = free_and_guarded(pipe, watcher, text="what ?", **options())
    assert guarded == free
    assert decision_of(pipe(text="forbidden", **options())).blocked


def test_a_generator_of_chats(pipe: Any) -> None:
    guard(pipe, config=guarding.engine_of(guarding.Watcher()))
    texts = ["what ?", "forbidden"]
    items = ({"images": tiny.image(), "text": f"<image> {text}"} for text in texts)
    assert [decision_of(r).blocked for r in pipe(items, **options())] == [False, True]


def test_tensors_instead_of_text(pipe: Any) -> None:
    guard(pipe, config=guarding.engine_of(guarding.Watcher()))
    records = pipe(text=chat("forbidden"), return_tensors=True, **options())
    text = pipe.tokenizer.decode(records[0]["generated_token_ids"], skip_special_tokens=True)
    assert text.endswith(guarding.INPUT_REFUSAL)
    assert decision_of(records).blocked


def test_a_blocked_answer(pipe: Any) -> None:
    free = pipe(text=chat("what ?"), return_full_text=False, **options())
    needle = free[0]["generated_text"]
    guard(pipe, config=guarding.engine_of(guarding.Watcher(needle=needle)))
    records = pipe(text=chat("what ?"), return_full_text=False, **options())
    assert records[0]["generated_text"] == guarding.OUTPUT_REFUSAL
    assert set(records[0]) == set(free[0])


def test_a_stream(pipe: Any) -> None:
    guard(pipe, config=guarding.engine_of(guarding.Watcher()))
    for text, blocked in (("what ?", False), ("forbidden", True)):
        streamer = TextIteratorStreamer(
            pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
        )
        thread = threading.Thread(
            target=pipe, kwargs={"text": chat(text), **options(streamer=streamer)}
        )
        thread.start()
        shown = "".join(streamer)
        thread.join()
        assert (shown == guarding.INPUT_REFUSAL) is blocked
        assert decision_of(streamer).blocked is blocked


# --- images ---------------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_an_image_is_judged_wherever_it_comes_from(pipe: Any, tmp_path: Path) -> None:
    bad = Image.new("RGB", (60, 60), guarding.BAD_COLOUR)
    path = tmp_path / "bad.png"
    path.write_bytes(png(bad))
    encoded = base64.b64encode(png(bad)).decode()
    watcher = guarding.Watcher()
    guard(pipe, config=guarding.engine_of(watcher))
    for key in (
        {"image": bad},
        {"path": str(path)},
        {"url": str(path)},
        {"base64": encoded},
        {"url": f"data:image/png;base64,{encoded}"},
    ):
        records = pipe(text=chat("what ?", **key), **options())
        decision = decision_of(records).input
        assert decision.blocked, key
        assert not decision.coverage.undecodable
        assert watcher.requests[-1].images[0].data.size == (60, 60)
    for image in (bad, str(path)):
        records = pipe(images=image, text="<image> what ?", **options())
        assert decision_of(records).input.categories == ("test",)


CUT_SHORT = base64.b64encode(png(tiny.image(400, 300))[:2000]).decode()


@pytest.mark.parametrize("source", ["nowhere.png", "data:image/png;base64,AAAA", "!?", CUT_SHORT])
def test_an_image_that_cannot_be_loaded_is_refused(pipe: Any, source: str) -> None:
    guard(pipe, config=guarding.engine_of(guarding.Watcher()))
    refused = (guarding.INPUT_REFUSAL, guarding.ERROR_REFUSAL)
    with guarding.counted(pipe.model) as calls:
        records = pipe(text=chat("what ?", url=source), return_full_text=False, **options())
        assert records[0]["generated_text"] in refused
        assert decision_of(records).input.coverage.undecodable == 1
        records = pipe(images=source, text="<image> a", return_full_text=False, **options())
        assert records[0]["generated_text"] in refused
    assert not calls


def test_an_image_is_loaded_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmguard_adapters.hf import images

    loads: list[str] = []

    def load(address: str, timeout: float | None = None) -> Image.Image:
        loads.append(address)
        return tiny.image(seed=len(loads))

    monkeypatch.setattr(images, "load_image", load)
    watcher = guarding.Watcher()
    guard(pipe, config=guarding.engine_of(watcher))
    records = pipe(text=chat("what ?", url="https://example.com/a.png"), **options())
    assert not decision_of(records).blocked
    assert loads == ["https://example.com/a.png"]
    assert watcher.requests[0].images[0].data.tobytes() == tiny.image(seed=1).tobytes()


def test_a_pipeline_made_of_guarded_objects_is_guarded() -> None:
    vlm = tiny.llava()
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    pipe: Any = pipeline(
        "image-text-to-text", model=vlm.model, processor=vlm.processor, device="cpu"
    )
    records = pipe(text=chat("forbidden"), return_full_text=False, **options())
    assert records[0]["generated_text"] == guarding.INPUT_REFUSAL


# --- guarding -------------------------------------------------------------------------------------


def test_a_pipeline_is_restored(pipe: Any) -> None:
    objects = (pipe, pipe.model, pipe.processor)
    before = [(type(o), dict(vars(o))) for o in objects]
    assert guard(pipe, config=guarding.engine_of(guarding.Watcher())) is pipe
    assert all(is_guarded(o) for o in objects)
    pipe(text=chat("forbidden"), **options())
    unguard(pipe)
    assert not any(is_guarded(o) for o in objects)
    after = [(type(o), dict(vars(o))) for o in objects]
    after[0][1]["call_count"] = before[0][1]["call_count"]
    assert after == before
    assert not hasattr(pipe(text=chat("forbidden"), **options())[0], "mmguard")
