"""Cutting batches into rows, and reading foreign inputs back row by row."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mmguard_adapters.hf import decision_of, guard, rows  # noqa: E402
from mmguard_adapters.hf.inversion import read_back  # noqa: E402
from tests import tiny  # noqa: E402
from tests.adapters.hf import guarding  # noqa: E402

IMAGE = 9
IDS = torch.tensor([[9, 1, 1, 1], [9, 9, 9, 1]])


@pytest.mark.parametrize(
    "more, images, expected",
    [
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, [1, 1], [(0, 1), (1, 2)]),
        ({"pixel_values": torch.zeros(3, 3, 4, 4)}, [1, 2], [(0, 1), (1, 3)]),
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, [0, 2], [(0, 0), (0, 2)]),
        ({"pixel_values": torch.zeros(8, 3, 4, 4)}, [1, 1], [(0, 2), (2, 8)]),  # by image tokens
        ({"pixel_values": torch.zeros(7, 3, 4, 4)}, [1, 1], None),
        (
            {"pixel_values": torch.zeros(2, 2, 3, 4, 4), "pixel_attention_mask": torch.ones(2, 2)},
            [2, 0],
            [(0, 1), (1, 2)],
        ),
        (
            {
                "pixel_values": torch.zeros(10, 5),
                "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 2], [1, 2, 2]]),
            },
            [2, 1],
            [(0, 6), (6, 10)],
        ),
        (
            {"pixel_values": torch.zeros(4, 5), "image_grid_thw": torch.tensor([[1, 2, 2]])},
            [1, 1],
            None,
        ),
    ],
)
def test_pixels_are_shared_out(more: Any, images: list[int], expected: Any) -> None:
    found = rows.spans({"input_ids": IDS} | more, images, IMAGE)
    assert (found["pixel_values"] if found else found) == expected


def test_a_batch_that_cannot_be_cut_is_refused_as_a_whole() -> None:
    vlm = tiny.llava()
    guard(vlm.model, vlm.processor, guarding.engine_of(guarding.Watcher()))
    for text, blocked in (("no", False), ("forbidden", True)):
        texts, images = [vlm.prompt, f"{vlm.prompt} {text}"], [[tiny.image()], [tiny.image()]]
        inputs = vlm.processor(text=texts, images=images, return_tensors="pt", padding=True)
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]  # for both rows
        with guarding.counted(vlm.model) as calls:
            result = vlm.model.generate(**inputs, max_new_tokens=3)
        assert [decision_of(result, row).blocked for row in range(2)] == [blocked, blocked]
        assert bool(calls) is not blocked
    assert "cannot be split" in decision_of(result, 0).input.reason


def foreign(family: str, *counts: int) -> tuple[tiny.TinyVLM, Any]:
    vlm = tiny.FAMILIES[family]()
    placeholder = vlm.prompt.removesuffix(tiny.QUESTION)
    texts = [f"{placeholder * n} row {row}" for row, n in enumerate(counts)]
    images = [[tiny.image(seed=7 * row + i) for i in range(n)] for row, n in enumerate(counts)]
    inputs = vlm.processor(text=texts, images=images, return_tensors="pt", padding=True)
    return vlm, inputs


def read(vlm: tiny.TinyVLM, inputs: Any) -> Any:
    token = getattr(vlm.model.config, "image_token_id", None)
    processor = vlm.processor
    return read_back(dict(inputs), processor.tokenizer, processor.image_processor, token)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize("counts, expected", [((1, 1), [1, 1]), ((2, 0), [2, 2]), ((1, 2), [3, 3])])
def test_a_row_is_read_with_its_image_or_with_all(
    family: str, counts: tuple[int, ...], expected: list[int]
) -> None:
    requests = read(*foreign(family, *counts))
    assert [len(r.images) for r in requests] == expected
    assert [r.text.split()[-1] for r in requests] == ["0", "1"]
    assert not any(part.problem for r in requests for part in r.images)


def test_packed_patches_that_are_no_image_are_not_read() -> None:
    vlm, inputs = foreign("qwen2_vl", 1)
    patches = inputs["pixel_values"]
    other_frame = patches.clone()
    other_frame.view(len(patches), 3, 2, -1)[:, :, 1] += 0.1
    changed = [
        {"pixel_values": other_frame},
        {"pixel_values": torch.cat([patches, patches])},
        {"image_grid_thw": inputs["image_grid_thw"] * torch.tensor([2, 1, 1])},
        {"pixel_values": patches * float("nan")},
    ]
    assert not read(vlm, inputs)[0].images[0].problem
    for change in changed:
        (part,) = read(vlm, dict(inputs) | change)[0].images
        assert part.problem
