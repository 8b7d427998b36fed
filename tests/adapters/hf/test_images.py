"""Images on their way into a processor: sharing them out, and not losing what failed to load."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from mmguard_adapters.hf import images
from mmguard_plugins.config import Limits
from tests import tiny


@pytest.mark.parametrize(
    "given, texts, expected",
    [
        (None, ["a", "b"], [[], []]),
        ("x", ["a"], [["x"]]),
        (["x", "y"], ["a"], [["x", "y"]]),
        (["x", "y"], [], [["x"], ["y"]]),
        ([["x"], ["y", "z"]], ["a", "b"], [["x"], ["y", "z"]]),
        ([["x"], []], ["a", "b"], [["x"], []]),
        (["x", "y", "z"], ["<i>", "<i><i>"], [["x"], ["y", "z"]]),
        (["x", "y"], ["a", "b"], [["x"], ["y"]]),
        (["x", "y", "z"], ["a", "b"], [["x", "y", "z"]] * 2),  # nothing tells them apart
    ],
)
def test_images_are_shared_out(given: Any, texts: list[str], expected: Any) -> None:
    assert images.by_row(given, texts, ["<i>"]) == expected


@pytest.mark.parametrize("following", [1, 2, 3])
def test_a_failed_load_is_not_forgotten(following: int) -> None:
    limits = Limits()
    first = [images.load(tiny.image(), limits), images.load("nowhere.png", limits)]
    with images.preloaded(first):
        loaded = images.load_all([tiny.image()] * following, limits)
    assert any(image.part.problem for image in loaded)
    assert not any(i.part.problem for i in images.load_all([tiny.image()] * following, limits))
