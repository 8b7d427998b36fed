"""Every family: guarded as asked, unchanged where nothing is blocked, and restored exactly."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

from mmguard_adapters.hf import decision_of, guard, unguard  # noqa: E402
from mmguard_plugins import Action  # noqa: E402
from tests import tiny  # noqa: E402
from tests.adapters.hf import guarding  # noqa: E402

families = pytest.mark.parametrize("family", tiny.buildable())
LONG = {"min_new_tokens": 4, "max_new_tokens": 8, "do_sample": False}


def prepare(vlm: tiny.TinyVLM, *texts: str, images: Any = None) -> Any:
    found = images or [[tiny.image(seed=i)] for i in range(len(texts))]
    return vlm.processor(text=list(texts), images=found, return_tensors="pt", padding=True)


def new_text(vlm: tiny.TinyVLM, inputs: Any, ids: Any) -> str:
    start = 1 if vlm.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return str(vlm.processor.tokenizer.decode(ids[start:], skip_special_tokens=True))


@families
def test_an_allowed_request_gives_the_same_tokens(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    expected = vlm.model.generate(**prepare(vlm, vlm.prompt), **LONG)
    watcher = guarding.Watcher()
    guard(vlm.model, vlm.processor, guarding.engine_of(watcher))
    result = vlm.model.generate(**prepare(vlm, vlm.prompt), **LONG)
    assert torch.equal(result, expected)
    assert len(watcher.requests) == 1
    assert watcher.requests[0].images[0].data.size == tiny.image().size
    assert not decision_of(result).blocked


@families
def test_a_blocked_request_never_reaches_the_model(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    inputs = prepare(vlm, f"{vlm.prompt} forbidden")
    with guarding.counted(vlm.model) as calls:
        result = vlm.model.generate(**inputs, **LONG)
    assert not calls
    assert new_text(vlm, inputs, result[0]) == guarding.INPUT_REFUSAL
    assert decision_of(result).input.action is Action.BLOCK


@families
def test_a_blocked_row_leaves_the_others_alone(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    texts = [vlm.prompt, f"{vlm.prompt} yes", f"{vlm.prompt} no"]
    expected = vlm.model.generate(**prepare(vlm, *texts), **LONG)
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    bad = Image.new("RGB", (70, 50), guarding.BAD_COLOUR)
    images = [[tiny.image(seed=0)], [bad], [tiny.image(seed=2)]]
    inputs = prepare(vlm, *texts, images=images)
    result = vlm.model.generate(**inputs, **LONG)
    assert [decision_of(result, row).blocked for row in range(3)] == [False, True, False]
    assert new_text(vlm, inputs, result[1]) == guarding.INPUT_REFUSAL
    for row in (0, 2):
        assert result[row, : expected.shape[1]].tolist() == expected[row].tolist()


@families
def test_a_blocked_answer_is_replaced(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    inputs = prepare(vlm, vlm.prompt)
    said = new_text(vlm, inputs, vlm.model.generate(**inputs, **LONG)[0])
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher(needle=said[1:])))
    result = vlm.model.generate(**prepare(vlm, vlm.prompt), **LONG)
    assert new_text(vlm, inputs, result[0]) == guarding.OUTPUT_REFUSAL
    decisions = decision_of(result)
    assert decisions.input.action is Action.ALLOW
    assert decisions.output is not None
    assert decisions.output.blocked


@families
def test_other_pixels_are_not_taken_for_checked_ones(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    watcher = guarding.Watcher()
    guard(vlm.model, vlm.processor, guarding.engine_of(watcher))
    inputs = prepare(vlm, vlm.prompt)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"].view(-1)[7] += 0.01
    result = vlm.model.generate(**inputs, **LONG)
    # Read back and judged again where that is possible, refused elsewhere.
    assert len(watcher.requests) == 2 or decision_of(result).blocked


@families
def test_unguard_restores_everything(family: str) -> None:
    vlm = tiny.FAMILIES[family]()
    objects = (vlm.model, vlm.processor)
    before = [(type(o), dict(vars(o)), o.__call__, dir(o)) for o in objects]
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    vlm.model.generate(**prepare(vlm, f"{vlm.prompt} forbidden"), **LONG)
    for _ in range(2):
        assert unguard(vlm.model) is vlm.model
        assert [(type(o), vars(o), o.__call__, dir(o)) for o in objects] == before
    result = vlm.model.generate(**prepare(vlm, f"{vlm.prompt} forbidden"), **LONG)
    assert not hasattr(result, "mmguard")
