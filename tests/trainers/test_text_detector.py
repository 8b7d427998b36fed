"""Quantizing the text detector: the comparison, the gate, and a model that stays a detector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rapidocr", reason="image_text needs the extra `gate`")
pytest.importorskip("onnx")
pytest.importorskip("skimage")

from mmguard_plugins import GuardError
from mmguard_plugins.guards.image_text.detector import SHIPPED, open_detector, rapidocr_model
from mmguard_trainers import packages, text_detector
from mmguard_trainers.packages import PackageMissing
from mmguard_trainers.text_detector import (
    NotGoodEnough,
    TextDetectorConfig,
    compare,
    train,
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextDetectorConfig:
    """Make a detector out of one drawn picture and one photo, whatever it then finds."""
    try:
        packages.fonts()
    except PackageMissing as error:
        pytest.skip(str(error))
    monkeypatch.setattr(text_detector, "CALIBRATED_ON", ("page",))
    monkeypatch.setattr(text_detector, "JUDGED_ON", ())
    return TextDetectorConfig(output=tmp_path / "weights", drawn=1, judged=1, kept=0, false=1)


def test_a_detector_is_written_that_opens_and_is_small(config: TextDetectorConfig) -> None:
    model = open_detector(train(config))
    assert model.stat().st_size < 0.5 * rapidocr_model("det").stat().st_size
    card = json.loads((config.output / "card.json").read_text(encoding="utf-8"))
    assert card["figures"]["pictures"] == 5  # one drawn, two photos at two sizes
    assert card["figures"]["kept"] > 0.5


def test_a_detector_below_its_bounds_is_not_written(
    config: TextDetectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = {"kept": 0.2, "false": 0.0}
    monkeypatch.setattr(text_detector, "quantize", lambda *_: rapidocr_model("det").read_bytes())
    monkeypatch.setattr(text_detector, "compare", lambda *_: blind)
    with pytest.raises(NotGoodEnough, match=r"keeps 0.2 of the text .*; it must keep 0.95"):
        train(config.model_copy(update={"kept": 0.95}))
    with pytest.raises(GuardError, match="cannot be read"):
        open_detector(config.output)


def test_the_comparison_counts_what_is_lost_and_what_is_made_up() -> None:
    text = np.zeros((20, 20), np.float32)
    text[:10] = 1.0
    other = np.roll(text, 5, axis=0)  # half of the text, and as much beside it
    trial = [(np.zeros(1, np.float32), text)]
    figures = compare(lambda _: text[None, None], lambda _: other[None, None], trial)
    assert (figures["kept"], figures["false"]) == (0.5, 0.5)


def test_the_shipped_card_names_its_source_licence_and_figures() -> None:
    card = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))
    assert card["source"].keys() == {"file", "sha256", "package", "by"}
    assert card["licence"].startswith("Apache-2.0")
    assert card["figures"]["kept"] >= card["config"]["kept"]
    assert card["figures"]["false"] <= card["config"]["false"]
