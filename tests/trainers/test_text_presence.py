"""Training the text-in-image test: seconds, on photos made here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("rapidocr", reason="image_text needs the extra `gate`")
pytest.importorskip("onnx")

from mmguard_plugins.guards.image_text.presence import TextPresence
from mmguard_trainers import packages
from mmguard_trainers.packages import PackageMissing
from mmguard_trainers.text_presence import (
    WALLPAPERS,
    Net,
    TextPresenceConfig,
    fetch_photos,
    presence_loss,
    train,
)
from mmguard_trainers.text_presence_drawing import SIDE, sample


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index, name in enumerate(WALLPAPERS):
        (tmp_path / "photos" / name).mkdir(parents=True)
        slope = Image.linear_gradient("L").rotate(40 * index).convert("RGB")
        slope.save(tmp_path / "photos" / name / "slope.png")
    return tmp_path / "photos"


@pytest.fixture
def config(tmp_path: Path, photos: Path) -> TextPresenceConfig:
    try:
        packages.fonts()
    except PackageMissing as error:
        pytest.skip(str(error))
    return TextPresenceConfig(
        output=tmp_path / "weights", photos=photos, steps=4, batch=4, judged_every=2, judged=20
    )


def test_a_short_training_writes_weights_that_load(config: TextPresenceConfig) -> None:
    folder = train(config)
    picture = Image.linear_gradient("L").convert("RGB")
    assert 0 <= TextPresence(folder).score(picture) <= 1
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["config"]["seed"] == 0
    assert 0 <= card["figures"]["passed"] <= 1


def test_the_same_seed_trains_the_same_weights(config: TextPresenceConfig) -> None:
    first = (train(config) / "presence.onnx").read_bytes()
    assert (train(config) / "presence.onnx").read_bytes() == first


def test_a_drawn_sample_marks_its_text() -> None:
    fonts = sorted(
        Path(np.__file__).parent.parent.glob("matplotlib/mpl-data/fonts/ttf/DejaVuSans*")
    )
    if not fonts:
        pytest.skip("matplotlib is not installed")
    rng = random.Random(1)
    photo = Image.new("RGB", (300, 300), "teal")
    samples = [sample(rng, [photo], fonts) for _ in range(40)]
    assert all(s.picture.size == (SIDE, SIDE) and s.text.shape == (SIDE, SIDE) for s in samples)
    marked = [bool((s.text > 0).any()) for s in samples]
    assert 8 <= sum(marked) <= 30  # some 45 of 100, a few of them of sizes that do not count


def test_the_loss_falls_where_cells_are_right_and_ignores_those_of_no_account() -> None:
    wanted = torch.tensor([[1.0, 0.0], [0.0, -1.0]])[None, None]
    right = torch.tensor([[5.0, -5.0], [-5.0, 5.0]])[None, None]
    assert presence_loss(right, wanted) < presence_loss(-right, wanted)
    other = right.clone()
    other[0, 0, 1, 1] = -9.0
    torch.testing.assert_close(presence_loss(other, wanted), presence_loss(right, wanted))


def test_the_net_is_small_and_answers_for_each_cell() -> None:
    net = Net().eval()
    assert sum(p.numel() for p in net.parameters()) <= 200_000
    assert net(torch.zeros(1, 3, 64, 96)).shape == (1, 1, 8, 12)


def test_photos_that_cannot_be_downloaded_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageMissing, match="run 'apt-get download gnome-backgrounds' elsewhere"):
        fetch_photos(tmp_path / "photos")
