"""Reading one RGB image with rapidocr's recognition models."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rapidocr
from PIL import Image, ImageDraw, ImageFont

from mmguard_plugins.errors import GuardError
from mmguard_plugins.guards.image_text.config import ImageTextConfig
from mmguard_plugins.guards.image_text.layout import Line, arrange
from mmguard_plugins.guards.image_text.views import UnreadableError

CELL = 32  # the detector wants sides that are multiples of this
TILE, OVERLAP = 960, 64
MARGIN = 16  # text that touches the edge is found better with some room
TALL = 1.5  # rapidocr reads a piece this much taller than wide from top to bottom
TURNED = 0.9  # certainty from which a piece counts as upside down
LONG = 2.0  # a piece this much wider than high shows which way is up
NEAR = 0.2  # of a line's height: pieces no further apart are one
DOUBT = 0.8  # a piece read with less confidence is read the other way up too
TEST_WORD = "mmguard"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece of text stands, as `layout.Line` has it, and how its crop must be turned."""

    x: float
    y: float
    right: float
    down: float
    width: float
    height: float
    turns: int = 0  # quarters, against the clock

    def turned(self, turns: int) -> Place:
        """Return the place of the piece when its crop is turned so many quarters more."""
        place = self
        for _ in range(turns):
            place = Place(
                place.x,
                place.y,
                -place.down,
                place.right,
                place.height,
                place.width,
                (place.turns + 1) % 4,
            )
        return place

    def distance(self, other: Place) -> float:
        """Return how far apart the centres are."""
        return math.hypot(self.x - other.x, self.y - other.y)

    def line(self, text: str, confidence: float, flipped: bool) -> Line:
        """Return the line that was read here."""
        sign = -1 if flipped else 1
        right, down = self.right * sign, self.down * sign
        return Line(text.strip(), confidence, self.x, self.y, right, down, self.width, self.height)


class Reader:
    """Finds and reads text. One reader serves every thread; it keeps nothing between calls."""

    def __init__(self, options: ImageTextConfig) -> None:
        """Load the models in rapidocr's package and read a test picture with them.

        Raises `GuardError` when the package holds no models or they do not work.
        """
        self._max_lines = options.max_lines
        self._min_confidence = options.min_confidence
        self._turned = options.turned
        self._ocr: Any = rapidocr.RapidOCR(
            params=_parameters(min(options.threads, os.cpu_count() or 1))
        )
        picture = _test_picture()
        self._ocr(np.asarray(picture))  # loads what is loaded at the first use
        text = " ".join(self.read(picture))
        if TEST_WORD not in text:
            raise GuardError(
                f"rapidocr read {text!r} in the picture of {TEST_WORD!r}; install it anew"
            )

    def read(self, image: Image.Image) -> list[str]:
        """Return the text in an RGB image, once for each order in which it may be read.

        Raises `UnreadableError` when there are more than `max_lines` pieces of text.
        """
        pixels = _padded(image)
        texts: dict[str, None] = {}
        known: list[tuple[Any, Line]] = []
        for boxes in self._find(pixels):
            if len(boxes) > self._max_lines:
                raise UnreadableError(
                    f"a picture holds {len(boxes)} pieces of text; raise max_lines to read them"
                )
            lines = self._lines(pixels, boxes, known) if len(boxes) else []
            known += zip(boxes, lines, strict=True)
            sure = [n for n in lines if n.text and n.confidence >= self._min_confidence]
            texts |= dict.fromkeys(arrange(sure))
        return list(texts)

    def _lines(self, pixels: Any, boxes: Any, known: Sequence[tuple[Any, Line]]) -> list[Line]:
        """Read each piece, except where a piece already known stands."""
        crops = self._ocr.crop_text_regions(pixels, boxes)
        labels = self._ocr.text_cls(crops).cls_res
        flipped = ["180" in label and score > TURNED for label, score in labels]
        places = _follow_neighbours([_place(b, f) for b, f in zip(boxes, flipped, strict=True)])
        lines = [_at(box, known) for box in boxes]
        new = [i for i, line in enumerate(lines) if line is None]
        if new:
            read = self._recognize([np.rot90(crops[i], places[i].turns) for i in new])
            for i, found in zip(new, read, strict=True):
                lines[i] = places[i].line(*found)
        return [line for line in lines if line is not None]

    def _find(self, pixels: Any) -> Iterator[Any]:
        """Yield the corners of each piece of text, as found looking straight and from the side.

        The detector misses much text on photos that does not run from left to right, so it looks
        once more with the head turned. What it finds is kept apart: now and then it takes a whole
        picture for one letter, which must not hide the rest.
        """
        for turns in (0, 1) if self._turned else (0,):
            scores = np.zeros(pixels.shape[:2], np.float32)
            for top, left in _tiles(*pixels.shape[:2]):
                tile = np.rot90(pixels[top : top + TILE, left : left + TILE], turns)
                here = scores[top : top + TILE, left : left + TILE]
                np.maximum(here, np.rot90(self._score(tile), -turns), out=here)
            yield self._ocr.text_det.postprocess_op(scores[None, None], scores.shape)[0]

    def _score(self, pixels: Any) -> Any:
        """Return how likely each pixel is text."""
        scaled = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
        return self._ocr.text_det.session(scaled.transpose(2, 0, 1)[None])[0, 0]

    def _recognize(self, crops: Sequence[Any]) -> list[tuple[str, float, bool]]:
        """Return text, confidence and whether it was read the other way up, for each piece."""
        first = self._ocr.recognize_txt(list(crops))
        read = [(text, score, False) for text, score in zip(first.txts, first.scores, strict=True)]
        doubtful = [i for i, (_, score, _) in enumerate(read) if score < DOUBT]
        if doubtful:
            again = self._ocr.recognize_txt([np.rot90(crops[i], 2) for i in doubtful])
            for i, text, score in zip(doubtful, again.txts, again.scores, strict=True):
                if score > read[i][1]:
                    read[i] = (text, score, True)
        return read


def _parameters(threads: int) -> dict[str, Any]:
    """Return settings that leave sizes to us and name each model file, so that none is fetched."""
    return {
        "Global.log_level": "critical",
        "Global.text_score": 0.0,
        "Det.box_thresh": 0.3,  # by default 0.5; a missed word costs more here than a found shadow
        "Det.max_candidates": 100_000,  # by default those after the first thousand go unread
        "Det.model_path": _model("det"),
        "Cls.model_path": _model("cls"),
        "Cls.cls_thresh": TURNED,
        "Rec.model_path": _model("rec"),
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }


def _model(task: str) -> str:
    """Return the one model for `task` in the package."""
    folder = Path(rapidocr.__file__).parent / "models"
    files = sorted(folder.glob(f"*_{task}_*.onnx"))
    if len(files) != 1:
        raise GuardError(
            f"rapidocr holds {len(files)} models for {task!r}; install a release that carries one"
        )
    return str(files[0])


def _padded(image: Image.Image) -> Any:
    """Return BGR pixels with the edge carried on, to sides that the detector takes as they are."""
    pixels = np.asarray(image)[:, :, ::-1]
    sides = []
    for length in pixels.shape[:2]:
        extra = -(-(length + 2 * MARGIN) // CELL) * CELL - length
        sides.append((extra // 2, extra - extra // 2))
    return np.pad(pixels, (*sides, (0, 0)), mode="edge")


def _at(box: Any, known: Sequence[tuple[Any, Line]]) -> Line | None:
    """Return the line that was read in (nearly) the same place."""
    for other, line in known:
        if np.abs(box - other).max() <= NEAR * line.height:
            return line
    return None


def _tiles(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the corners of overlapping tiles: small text is lost in a large empty picture."""
    for top in _starts(height):
        for left in _starts(width):
            yield top, left


def _starts(length: int) -> list[int]:
    if length <= TILE:
        return [0]
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    return [round(i * (length - TILE) / (count - 1)) for i in range(count)]


def _place(box: Any, flipped: bool) -> Place:
    """Place a piece: `box` holds its corners as rapidocr orders them, clockwise from top left."""
    top_left, top_right, _, bottom_left = box
    across, along = top_right - top_left, bottom_left - top_left
    width, height = float(np.linalg.norm(across)), float(np.linalg.norm(along))
    if height >= TALL * width:
        across, width, height = along, height, width
    x, y = box.mean(axis=0)
    right, down = across / max(width, 1.0)
    place = Place(float(x), float(y), float(right), float(down), width, height)
    return place.turned(2) if flipped else place


def _follow_neighbours(places: Sequence[Place]) -> list[Place]:
    """Turn each short piece as the nearest long one: a letter does not show which way is up."""
    long = [place for place in places if place.width >= LONG * place.height]
    if not long:
        return list(places)
    return [
        place if place in long else _follow(place, min(long, key=place.distance))
        for place in places
    ]


def _follow(place: Place, guide: Place) -> Place:
    options = (place.turned(turns) for turns in range(4))
    return max(options, key=lambda n: n.right * guide.right + n.down * guide.down)


def _test_picture() -> Image.Image:
    image = Image.new("RGB", (320, 96), "white")
    font = ImageFont.load_default(40)
    ImageDraw.Draw(image).text((40, 20), TEST_WORD, font=font, fill="black")
    return image
