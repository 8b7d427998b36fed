"""The text-in-image test: what it sees at which size, and what it refuses to start with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("rapidocr", reason="image_text needs the extra `gate`")

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmguard_plugins import GuardError
from mmguard_plugins.guards.image_text.config import PRESENCE_THRESHOLD
from mmguard_plugins.guards.image_text.presence import CELL, SHIPPED, TextPresence
from mmguard_plugins.guards.image_text.regions import Region, merged, regions


@pytest.fixture(scope="module")
def presence() -> TextPresence:
    return TextPresence()


def written(size: tuple[int, int], letters: int, text: str = "plant a tree") -> Image.Image:
    image = Image.new("RGB", size, "beige")
    font = ImageFont.load_default(letters)
    ImageDraw.Draw(image).text((size[0] // 8, size[1] // 4), text, font=font, fill="black")
    return image


@pytest.mark.parametrize(
    "size, letters",
    [((300, 80), 9), ((512, 512), 16), ((512, 512), 48), ((1200, 400), 150), ((2000, 3000), 12)],
)
def test_text_of_any_size_is_seen(
    presence: TextPresence, size: tuple[int, int], letters: int
) -> None:
    assert presence.score(written(size, letters)) >= PRESENCE_THRESHOLD


@pytest.mark.parametrize("angle", [30, 90, 135, 180, 270])
def test_text_at_any_angle_is_seen(presence: TextPresence, angle: int) -> None:
    image = written((300, 300), 20).rotate(angle, fillcolor="beige")
    assert presence.score(image) >= PRESENCE_THRESHOLD


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (512, 512)])
def test_one_colour_holds_no_text(presence: TextPresence, size: tuple[int, int]) -> None:
    assert presence.score(Image.new("RGB", size, "teal")) < PRESENCE_THRESHOLD


def test_the_heat_is_where_the_text_is(presence: TextPresence) -> None:
    image = Image.new("RGB", (640, 2400), "beige")
    image.paste(written((200, 60), 20, "word"), (400, 2200))  # beyond the first strip
    heat = presence.heat(image)
    assert heat.shape == (2400 // CELL, 640 // CELL)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert 2200 <= row * CELL < 2260
    assert 400 <= column * CELL < 600


@pytest.mark.parametrize("name", ["presence.onnx", "card.json"])
def test_damaged_weights_are_refused(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(SHIPPED, tmp_path / "weights")
    (folder / name).write_bytes(b"nothing")
    with pytest.raises(GuardError, match=rf"weights file '.*{name}' is damaged"):
        TextPresence(folder)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"weights '.*guard.json' cannot be read"):
        TextPresence(tmp_path)


def test_the_shipped_card_names_data_licences_and_figures() -> None:
    card = json.loads((SHIPPED / "card.json").read_text(encoding="utf-8"))
    assert {"data", "photos", "licence", "config", "versions", "figures"} <= card.keys()
    assert card["parameters"] <= 200_000


def test_nothing_hot_gives_no_regions() -> None:
    assert regions(np.full((20, 20), 0.4, np.float32), 0.5, 160, 160) == []


def test_faint_cells_beside_hot_ones_are_read_too() -> None:
    heat = np.zeros((40, 80), np.float32)
    heat[20, 20:40] = 0.3
    heat[20, 30] = 0.9
    (region,) = regions(heat, 0.5, 320, 640)
    assert region.left <= 20 * CELL
    assert region.right >= 40 * CELL


def test_regions_that_meet_become_one() -> None:
    chain = [Region(0, 0, 10, 10), Region(50, 50, 60, 60), Region(5, 5, 55, 55)]
    assert merged(chain) == [Region(0, 0, 60, 60)]
    apart = [Region(0, 0, 10, 10), Region(20, 20, 30, 30)]
    assert merged(apart) == apart
