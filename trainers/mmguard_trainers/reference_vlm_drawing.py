"""Draw words, the way the reference VLM learns to read them.

What is drawn depends on the random state alone, so a picture need not be kept.
"""

from __future__ import annotations

import colorsys
import functools
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmguard_trainers import packages

CANVAS = 112
"""Side in pixels of a drawn word's picture; also what the model's processor resizes to."""

HELD_OUT_FAMILIES = ("Manrope", "Caladea", "DejaVuSansMono")
"""Font families that no training picture uses: a sans serif, a serif and a monospaced one."""

WORDS = (
    "apple", "arm", "attack", "baby", "bad", "bag", "ball", "bank", "bed", "bird", "blue", "boat",
    "bomb", "book", "box", "boy", "bread", "bus", "cake", "car", "cat", "chair", "city", "coffee",
    "cold", "cow", "cup", "danger", "day", "deer", "dog", "door", "drugs", "duck", "ear", "egg",
    "enter", "exit", "eye", "farm", "fire", "fish", "food", "free", "frog", "game", "garden",
    "girl", "go", "gold", "good", "green", "gun", "hand", "happy", "hat", "hello", "help", "hi",
    "home", "horse", "hot", "house", "ice", "ignore", "key", "kill", "king", "knife", "lake",
    "lamp", "lion", "love", "map", "milk", "money", "moon", "music", "name", "new", "night", "no",
    "obey", "ok", "open", "paper", "peace", "pen", "pizza", "plane", "poison", "police", "queen",
    "rain", "red", "road", "safe", "sale", "school", "sea", "secret", "ship", "shoe", "sky",
    "snow", "star", "stop", "sun", "system", "table", "tea", "thanks", "tree", "truck", "virus",
    "water", "weapon", "welcome", "win", "wine", "world", "yellow", "yes", "zoo",
)  # fmt: skip
"""The words that are drawn, in training and in tests: a fixed list, each one token."""

_STYLES_LEFT_OUT = (
    "Thin", "ExtraLight", "LastResort", "Display", "STIXNon", "STIXSiz", "cmex", "cmmi", "cmsy",
    "Amatic", "Variable",
)  # fmt: skip


@functools.cache
def faces(*, held_out: bool) -> tuple[Path, ...]:
    """Return the font files of `HELD_OUT_FAMILIES`, or of all others, always in one order."""
    found = packages.fonts()
    legible = {n: p for n, p in found.items() if not any(part in n for part in _STYLES_LEFT_OUT)}
    return tuple(p for n, p in legible.items() if n.startswith(HELD_OUT_FAMILIES) == held_out)


def draw_word(
    word: str, face: Path, rng: random.Random, back: Image.Image | None = None
) -> Image.Image:
    """Draw `word` in a random case, size, place, colour and slant, on a plain ground or `back`."""
    text = rng.choice((word.lower(), word.upper(), word.capitalize()))
    if back is None:
        ground = _colour(rng)
        canvas = Image.new("RGB", (CANVAS, CANVAS), ground)
        ink = _contrasting(rng, ground)
    else:
        canvas = back.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
        ink = rng.choice(((255, 255, 255), (0, 0, 0), (255, 230, 0), (200, 0, 0)))
    font, width, height, left, top = _fit(text, face, rng.uniform(24, 48))
    x = rng.uniform(4, max(4.0, CANVAS - 4 - width)) - left
    y = rng.uniform(4, max(4.0, CANVAS - 4 - height)) - top
    slant = rng.uniform(-6, 6)

    def stamp(colour: tuple[int, int, int], edge: int) -> None:
        layer = Image.new("L", (CANVAS, CANVAS), 0)
        ImageDraw.Draw(layer).text((x, y), text, fill=255, font=font, stroke_width=edge)
        canvas.paste(colour, mask=layer.rotate(slant, Image.Resampling.BICUBIC))

    if back is not None:
        stamp((0, 0, 0) if _luminance(ink) > 127 else (255, 255, 255), 2)
    stamp(ink, 0)
    return canvas


def _fit(
    text: str, face: Path, size: float
) -> tuple[ImageFont.FreeTypeFont, float, float, float, float]:
    while True:
        font = ImageFont.truetype(str(face), size)
        left, top, right, bottom = font.getbbox(text)
        if right - left <= CANVAS - 8 or size < 8:
            return font, right - left, bottom - top, left, top
        size *= 0.95 * (CANVAS - 8) / (right - left)


def _colour(rng: random.Random) -> tuple[int, int, int]:
    saturation = rng.choice((0.0, rng.random()))
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, rng.random())
    return round(255 * red), round(255 * green), round(255 * blue)


def _contrasting(rng: random.Random, ground: tuple[int, int, int]) -> tuple[int, int, int]:
    while True:
        ink = _colour(rng)
        if abs(_luminance(ink) - _luminance(ground)) > 80:
            return ink


def _luminance(colour: tuple[int, int, int]) -> float:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue
