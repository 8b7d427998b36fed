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
from mmguard_plugins.guards.image_text.detector import open_detector, rapidocr_model
from mmguard_plugins.guards.image_text.layout import Line, arrange
from mmguard_plugins.guards.image_text.presence import CELL as PRESENCE_CELL
from mmguard_plugins.guards.image_text.presence import Heat
from mmguard_plugins.guards.image_text.regions import Region, merged, regions
from mmguard_plugins.guards.image_text.views import UnreadableError

CELL = 32  # the detector wants sides that are multiples of this
TILE, OVERLAP = 704, 64
MARGIN = 16  # text that touches the edge is found better with some room
TALL = 1.5  # rapidocr reads a piece this much taller than wide from top to bottom
TURNED = 0.9  # certainty from which a piece counts as upside down
LONG = 2.0  # a piece this much wider than high shows which way is up
NEAR = 0.2  # of a line's height: pieces no further apart are one
DOUBT = 0.8  # a piece read with less confidence is read the other way up too
TEXT = 0.3  # score from which the detector's pixel is text
RUN, FURTHER = 64, 3  # pixels to look further where text runs on, and how many looks in all
NEAR_EDGE = 24  # pixels: text this near the edge of a region may have its next word outside
HALO = 0.75  # of a line's height: cells this near it are hot because of it
SURE = 0.9  # a piece read with this confidence needs no look from the side
OPEN = 0.1  # share of hot cells that may be left without a sure piece
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
            params=_parameters(
                open_detector() if options.int8 else rapidocr_model("det"),
                min(options.threads, os.cpu_count() or 1),
            )
        )
        picture = _test_picture()
        self._ocr(np.asarray(picture))  # loads what is loaded at the first use
        text = " ".join(self.read(picture))
        if TEST_WORD not in text:
            raise GuardError(
                f"rapidocr read {text!r} in the picture of {TEST_WORD!r}; install it anew"
            )

    def read(
        self, image: Image.Image, heat: Heat | None = None, threshold: float = 0.0
    ) -> list[str]:
        """Return the text in an RGB image, once for each order in which it may be read.

        With a `heat` map of `TextPresence`, only what is around its cells of at least `threshold`
        is looked at, and looked at from the side only where that did not settle it.

        Raises `UnreadableError` when there are more than `max_lines` pieces of text.
        """
        pixels, top, left = _padded(image)
        height, width = pixels.shape[:2]
        places = [Region(0, 0, height, width)]
        if heat is not None:
            near = regions(heat, threshold, image.height, image.width)
            places = [
                Region(r.top + top, r.left + left, r.bottom + top, r.right + left).grown(
                    MARGIN, height, width
                )
                for r in near
            ]
        texts: dict[str, None] = {}
        known: list[tuple[Any, Line]] = []
        for turns in (0, 1) if self._turned else (0,):
            if turns and heat is not None:
                cells = _cells(heat >= threshold, top, left)
                places = [place for place in places if not _settled(place, cells, known)]
            boxes = self._find(pixels, merged(places), turns)
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

    def _find(self, pixels: Any, places: Sequence[Region], turns: int) -> Any:
        """Return the corners of each piece of text, as found with the head turned `turns` quarters.

        The detector misses much text on photos that does not run from left to right, so it looks
        straight and from the side. What it finds is kept apart: now and then it takes a whole
        picture for one letter, which must not hide the rest.
        """
        if not places:
            return []
        scores = np.zeros(pixels.shape[:2], np.float32)
        for place in places:
            self._look(pixels, place, turns, scores)
        return self._ocr.text_det.postprocess_op(scores[None, None], scores.shape)[0]

    def _look(self, pixels: Any, place: Region, turns: int, scores: Any) -> None:
        """Write into `scores` what stands in `place`, and beyond it where text runs on."""
        height, width = pixels.shape[:2]
        for _ in range(FURTHER):
            place = _on_grid(place, height, width)
            for row, column in _tiles(place.bottom - place.top, place.right - place.left):
                top, left = place.top + row, place.left + column
                bottom, right = min(top + TILE, place.bottom), min(left + TILE, place.right)
                tile = np.rot90(pixels[top:bottom, left:right], turns)
                here = scores[top:bottom, left:right]
                np.maximum(here, np.rot90(self._score(tile), -turns), out=here)
            further = _followed(scores, place)
            if further == place:
                return
            place = further

    def _score(self, pixels: Any) -> Any:
        """Return how likely each pixel is text."""
        return self._ocr.text_det.session(scaled(pixels))[0, 0]

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


def scaled(pixels: Any) -> Any:
    """Return BGR pixels, rows first, as the batch of one that the detector takes."""
    return ((pixels.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]


def _parameters(detector: Path, threads: int) -> dict[str, Any]:
    """Return settings that leave sizes to us and name each model file, so that none is fetched."""
    return {
        "Global.log_level": "critical",
        "Global.text_score": 0.0,
        "Det.limit_side_len": CELL,  # concerns the test picture only: ours are never scaled
        "Det.box_thresh": 0.3,  # by default 0.5; a missed word costs more here than a found shadow
        "Det.max_candidates": 100_000,  # by default those after the first thousand go unread
        "Det.model_path": str(detector),
        "Cls.model_path": str(rapidocr_model("cls")),
        "Cls.cls_thresh": TURNED,
        "Rec.model_path": str(rapidocr_model("rec")),
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        "EngineConfig.onnxruntime.enable_cpu_mem_arena": False,  # keeps the largest picture's
    }


def _padded(image: Image.Image) -> tuple[Any, int, int]:
    """Return BGR pixels with the edge carried on, and by how much at the top and on the left.

    Both sides become what the detector takes as it is.
    """
    pixels = np.asarray(image)[:, :, ::-1]
    sides = []
    for length in pixels.shape[:2]:
        extra = -(-(length + 2 * MARGIN) // CELL) * CELL - length
        sides.append((extra // 2, extra - extra // 2))
    return np.pad(pixels, (*sides, (0, 0)), mode="edge"), sides[0][0], sides[1][0]


def _on_grid(place: Region, height: int, width: int) -> Region:
    """Return a region around `place` with sides that are multiples of `CELL`."""
    rows = -(-(place.bottom - place.top) // CELL) * CELL
    columns = -(-(place.right - place.left) // CELL) * CELL
    top = max(0, min(place.top, height - rows))
    left = max(0, min(place.left, width - columns))
    return Region(top, left, top + rows, left + columns)


def _followed(scores: Any, place: Region) -> Region:
    """Return `place` with more room on each side that text comes near, within the picture."""
    here = scores[place.top : place.bottom, place.left : place.right]
    wider = place.grown(RUN, *scores.shape)
    return Region(
        wider.top if here[:NEAR_EDGE].max() > TEXT else place.top,
        wider.left if here[:, :NEAR_EDGE].max() > TEXT else place.left,
        wider.bottom if here[-NEAR_EDGE:].max() > TEXT else place.bottom,
        wider.right if here[:, -NEAR_EDGE:].max() > TEXT else place.right,
    )


def _cells(hot: Any, top: int, left: int) -> Any:
    """Return the centres of the hot cells as x, y in padded pixels."""
    rows, columns = np.nonzero(hot)
    return np.stack([columns * PRESENCE_CELL + left, rows * PRESENCE_CELL + top], 1) + (
        PRESENCE_CELL / 2
    )


def _settled(place: Region, cells: Any, known: Sequence[tuple[Any, Line]]) -> bool:
    """Return whether what was surely read in `place` accounts for its hot cells."""
    x, y = cells[:, 0], cells[:, 1]
    inside = (x >= place.left) & (x < place.right) & (y >= place.top) & (y < place.bottom)
    open_cells = inside.copy()
    for box, line in known:
        if line.confidence >= SURE and len(line.text) > 1 and line.width >= line.height:
            halo = max(PRESENCE_CELL, HALO * line.height)
            low, high = box.min(axis=0) - halo, box.max(axis=0) + halo
            open_cells &= ~((x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]))
    return int(open_cells.sum()) <= OPEN * int(inside.sum())


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
    image = Image.new("RGB", (192, 64), "white")
    font = ImageFont.load_default(28)
    ImageDraw.Draw(image).text((30, 14), TEST_WORD, font=font, fill="black")
    return image
