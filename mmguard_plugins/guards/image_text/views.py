"""The ways one picture may be shown to a model, each as a plain RGB image to read.

A guard cannot know whether a processor drops the alpha channel or lays the picture on a colour,
applies the camera's orientation or not. So each is a view, and words that show in one are read.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator

from PIL import Image, ImageChops, ImageOps

DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
EXIF_ORIENTATION = 0x0112
MIRRORED = (2, 4, 5, 7)  # the reader copes with turned text, but not with mirror writing
BACKGROUNDS = ("black", "white")
# The detector looks for letters of ordinary size: those that fill a large picture it finds in a
# small one.
LARGE_SIDE, SMALL_SIDE = 768, 512


class UnreadableError(Exception):
    """A picture that reading must not pass, for a reason that lies in the picture."""


def views(image: Image.Image, max_pixels: int) -> Iterator[Image.Image]:
    """Yield each different view of `image`, none above `max_pixels`.

    Raises `UnreadableError` for a picture that has no colours to look at.
    """
    seen: list[Image.Image] = []
    for shown in colours(image):
        if any(ImageChops.difference(shown, other).getbbox() is None for other in seen):
            continue
        seen.append(shown)
        yield from _sizes(shown, max_pixels)
    if _orientation(image) in MIRRORED:
        for shown in seen:
            yield from _sizes(ImageOps.mirror(shown), max_pixels)


def colours(image: Image.Image) -> Iterator[Image.Image]:
    """Yield what the picture looks like with its transparency dropped and on each background.

    Raises `UnreadableError` as `views` does. Some may be equal.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise UnreadableError(f"a picture of {frames} frames cannot be read; send one frame")
    if image.mode in DEEP_MODES:
        yield from _deep(image)
        return
    try:
        yield image.convert("RGB")
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            for background in BACKGROUNDS:
                canvas = Image.new("RGBA", image.size, background)
                yield Image.alpha_composite(canvas, layer).convert("RGB")
    except ValueError as error:
        raise UnreadableError(f"mode {image.mode!r} cannot be turned into colours") from error


def _deep(image: Image.Image) -> Iterator[Image.Image]:
    """Show more than eight bits a pixel: stretched to the range in use, and cut off at white."""
    import numpy as np

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = float(values.min()), float(values.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    for shown in ((values - low) * scale, values.clip(0.0, 255.0)):
        yield Image.fromarray(shown.astype(np.uint8)).convert("RGB")


def _sizes(image: Image.Image, max_pixels: int) -> Iterator[Image.Image]:
    """Yield the picture with its contrast stretched, at full and at small size."""
    if all(low == high for low, high in (band.getextrema() for band in image.split())):
        return  # one colour; the detector would take it for one huge letter
    image = ImageOps.autocontrast(image)
    yield _shrink(image, math.sqrt(max_pixels / (image.width * image.height)))
    if max(image.size) > LARGE_SIDE:
        yield _shrink(image, SMALL_SIDE / max(image.size))


def _shrink(image: Image.Image, scale: float) -> Image.Image:
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _orientation(image: Image.Image) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's complaints about damaged metadata
        try:
            return int(image.getexif().get(EXIF_ORIENTATION, 1))
        except (SyntaxError, ValueError, TypeError, OSError, struct.error):
            return 1  # metadata nobody can read turns no picture
