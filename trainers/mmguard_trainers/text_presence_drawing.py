"""Training pictures for `text_presence`: text drawn on anything, and what only looks like text."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

SIDE = 192
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
COMMON = "etaoinshrdlucmfwygpbvk"  # the more frequent first
SIGNS = "0123456789.,:;!?-'()/&%"
READ = (6.5, 44.0)  # pixels of letter size that one scale answers for; others count neither way

Pixels = npt.NDArray[np.uint8]
Grid = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture and, for each pixel, whether it is text (1), is not (0), or is not judged (-1)."""

    picture: Image.Image
    text: Grid


def sample(rng: random.Random, photos: Sequence[Image.Image], fonts: Sequence[Path]) -> Sample:
    """Draw one picture, with text or without."""
    picture = _background(rng, photos)
    if rng.random() < 0.3:
        picture = _clutter(picture, rng)
    text = np.zeros((SIDE, SIDE), np.float32)
    if rng.random() < 0.45:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _write(picture, text, rng, fonts)
    return Sample(_spoil(picture, rng), text)


def _background(rng: random.Random, photos: Sequence[Image.Image]) -> Image.Image:
    draw: Callable[[], Image.Image] = rng.choices(
        (
            lambda: crop(rng.choice(photos), rng),
            lambda: Image.new("RGB", (SIDE, SIDE), _colour(rng)),
            lambda: _gradient(rng),
            lambda: _noise(rng),
        ),
        (76, 12, 4, 8),
    )[0]
    return draw()


def crop(photo: Image.Image, rng: random.Random) -> Image.Image:
    """Cut a square out of a photo, at any scale, turned or mirrored."""
    longest = min(photo.size)
    side = round(math.exp(rng.uniform(math.log(min(160, longest)), math.log(longest))))
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    box = (left, top, left + side, top + side)
    cut = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box, reducing_gap=2.0)
    return cut.transpose(rng.choice(tuple(Image.Transpose))) if rng.random() < 0.6 else cut


def _gradient(rng: random.Random) -> Image.Image:
    one, other = (Image.new("RGB", (SIDE, SIDE), _colour(rng)) for _ in range(2))
    slope = Image.linear_gradient("L").rotate(rng.uniform(0, 360)).resize((SIDE, SIDE))
    return Image.composite(one, other, slope)


def _noise(rng: random.Random) -> Image.Image:
    """Return blots of one size, from single pixels to clouds."""
    cells = rng.choice((6, 12, 24, 48, 96, SIDE))
    values = np.random.default_rng(rng.getrandbits(32)).normal(
        rng.uniform(60, 190), rng.uniform(5, 70), (cells, cells, rng.choice((1, 3)))
    )
    shown = Image.fromarray(np.broadcast_to(values, (cells, cells, 3)).clip(0, 255).astype("uint8"))
    return shown.resize((SIDE, SIDE), rng.choice((Image.Resampling.BICUBIC, Image.Resampling.BOX)))


def _clutter(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Draw what a net may take for text: stripes, bricks, grids, bars, leaves, icons, outlines."""
    layer = picture.copy()
    rng.choice((_stripes, _bricks, _bars, _leaves, _icons, _curves))(ImageDraw.Draw(layer), rng)
    if rng.random() < 0.5:
        layer = layer.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
    corner = (rng.randint(0, SIDE // 2), rng.randint(0, SIDE // 2))
    box = (0, 0, SIDE, SIDE) if rng.random() < 0.5 else (*corner, SIDE, SIDE)
    picture.paste(layer.crop(box), box[:2])
    return picture


def _stripes(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    step, width, colour = rng.randint(3, 30), rng.randint(1, 8), _colour(rng)
    for at in range(0, SIDE, step):
        draw.line((at, 0, at, SIDE), fill=colour, width=width)
        if step % 2:
            draw.line((0, at, SIDE, at), fill=colour, width=width)


def _bricks(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    height, colour, gap = rng.randint(5, 36), _colour(rng), rng.randint(1, 4)
    width = height * rng.uniform(1, 4)
    for row, top in enumerate(range(0, SIDE, height)):
        left = -(row % 2) * width / 2
        while left < SIDE:
            shade = tuple(c + rng.randint(-25, 25) for c in colour)
            draw.rectangle((left, top, left + width - gap, top + height - gap), fill=shade)
            left += width


def _bars(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    """Draw a chart without labels, or a row of things side by side."""
    width, gap, base = rng.randint(2, 20), rng.randint(1, 12), rng.randint(SIDE // 4, SIDE)
    top, colour = rng.randint(4, 120), _colour(rng)
    for left in range(rng.randint(0, 40), rng.randint(90, SIDE), width + gap):
        draw.rectangle((left, max(0, base - rng.randint(3, top)), left + width, base), fill=colour)
    draw.line((0, base, SIDE, base), fill=_colour(rng))


def _leaves(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    colour, size = _colour(rng), rng.randint(3, 40)
    for _ in range(rng.randint(10, 200)):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(2, size)
        shade = tuple(c + rng.randint(-60, 60) for c in colour)
        corners = [(x + rng.uniform(-r, r), y + rng.uniform(-r, r)) for _ in range(4)]
        draw.polygon(corners, fill=shade)


def _icons(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 14)):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(3, 50)
        box, colour = (x - r, y - r * rng.uniform(0.4, 1), x + r, y + r), _colour(rng)
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape(box, fill=colour if rng.random() < 0.6 else None, outline=_colour(rng))


def _curves(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 12)):
        x, y, turn = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(0, 7)
        points, bend = [(x, y)], rng.uniform(-0.3, 0.3)
        for _ in range(rng.randint(5, 40)):
            turn += bend + rng.uniform(-0.2, 0.2)
            x, y = x + 6 * math.cos(turn), y + 6 * math.sin(turn)
            points.append((x, y))
        draw.line(points, fill=_colour(rng), width=rng.randint(1, 4))


def _write(picture: Image.Image, text: Grid, rng: random.Random, fonts: Sequence[Path]) -> None:
    """Write a few words somewhere, mark where they stand."""
    size = math.exp(rng.uniform(math.log(7), math.log(46 if rng.random() < 0.93 else 110)))
    lines = [_words(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    words = "\n".join(lines) if rng.random() < 0.8 else lines[0]
    font = ImageFont.truetype(str(rng.choice(fonts)), size)
    box = ImageDraw.Draw(picture).multiline_textbbox((0, 0), words, font=font)
    layer = Image.new("L", (round(box[2] - box[0]) + 6, round(box[3] - box[1]) + 6))
    ImageDraw.Draw(layer).multiline_text((3 - box[0], 3 - box[1]), words, font=font, fill=255)
    ink = layer.getbbox()
    if ink is None:
        return
    area = Image.new("L", layer.size)
    area.paste(255, ink)
    if rng.random() < 0.5:
        angle = rng.uniform(0, 360) if rng.random() < 0.6 else rng.choice((-8, 8, 90, 180, 270))
        layer = layer.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        area = area.rotate(angle, expand=True)
    left = rng.randint(*sorted((0, SIDE - layer.width)))
    top = rng.randint(*sorted((0, SIDE - layer.height)))
    colour = _contrasting(picture.crop((left, top, left + layer.width, top + layer.height)), rng)
    picture.paste(Image.new("RGB", layer.size, colour), (left, top), layer)
    place = Image.new("L", (SIDE, SIDE))
    place.paste(area, (left, top))
    judged = 1.0 if READ[0] <= size <= READ[1] else -1.0
    text[np.asarray(place) > 0] = judged


def _words(rng: random.Random) -> str:
    words: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        word = "".join(rng.choices(COMMON, range(len(COMMON) + 4, 4, -1), k=rng.randint(2, 10)))
        if rng.random() < 0.25:
            word = "".join(rng.choices(LETTERS + SIGNS, k=rng.randint(1, 10)))
        words.append(rng.choice((word, word, word.title(), word.upper())))
    return " ".join(words)


def _contrasting(around: Image.Image, rng: random.Random) -> tuple[int, ...]:
    """Return a colour that can be read on what it is written on."""
    base = np.asarray(around, np.float32)
    spread = float(base.std(axis=(0, 1)).mean())
    mean = base.mean(axis=(0, 1))
    for _ in range(50):
        colour = _colour(rng) if rng.random() < 0.7 else rng.choice(((0, 0, 0), (255, 255, 255)))
        apart = abs(float((np.array(colour) - mean) @ np.array((0.3, 0.59, 0.11))))
        if apart > 24 + 1.6 * spread:
            return colour
    return (0, 0, 0) if mean.mean() > 127 else (255, 255, 255)


def _spoil(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Do to a picture what happens on its way: blur, compression, noise, contrast."""
    if rng.random() < 0.15:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if rng.random() < 0.4:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(35, 95))
        picture = Image.open(file).convert("RGB")
    if rng.random() < 0.1:
        values = np.asarray(picture) + np.random.default_rng(rng.getrandbits(32)).normal(
            0, rng.uniform(2, 10), (SIDE, SIDE, 1)
        )
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.15:
        picture = ImageOps.invert(picture)
    return ImageOps.autocontrast(picture) if rng.random() < 0.5 else picture


def _colour(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(256) for _ in range(3))
