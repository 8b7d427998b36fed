"""Reading one RGB image with rapidocr's recognition models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rapidocr
from PIL import Image, ImageDraw, ImageFont

from mmguard_plugins.errors import GuardError
from mmguard_plugins.guards.image_text.layout import Line, arrange
from mmguard_plugins.guards.image_text.views import UnreadableError

CELL = 32  # the detector wants sides that are multiples of this
MARGIN = 16  # text that touches the edge is found better with some room
TALL = 1.5  # rapidocr reads a piece this much taller than wide from top to bottom
TURNED = 0.9  # certainty from which a piece counts as upside down
DOUBT = 0.8  # a piece read with less confidence is read the other way up too
TEST_WORD = "mmguard"


class Reader:
    """Finds and reads text. One reader serves every thread; it keeps nothing between calls."""

    def __init__(self, threads: int = 1, max_lines: int = 400, min_confidence: float = 0.0) -> None:
        """Load the models in rapidocr's package and read a test picture with them.

        Raises `GuardError` when the package holds no models or they do not work.
        """
        self._max_lines = max_lines
        self._min_confidence = min_confidence
        self._ocr = rapidocr.RapidOCR(params=_parameters(min(threads, os.cpu_count() or 1)))
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
        return arrange(self._lines(_padded(image)))

    def _lines(self, pixels: Any) -> list[Line]:
        boxes = self._ocr.text_det(pixels).boxes
        if boxes is None:
            return []
        if len(boxes) > self._max_lines:
            raise UnreadableError(
                f"a picture holds {len(boxes)} pieces of text; raise max_lines to read them"
            )
        crops = self._ocr.crop_text_regions(pixels, boxes)
        turns = self._ocr.text_cls(crops)
        flipped = ["180" in label and score > TURNED for label, score in turns.cls_res]
        read = self._recognize(turns.img_list, flipped)
        lines = [
            _line(box, text, confidence, turn)
            for box, (text, confidence, turn) in zip(boxes, read, strict=True)
        ]
        return [n for n in lines if n.text and n.confidence >= self._min_confidence]

    def _recognize(
        self, crops: Sequence[Any], flipped: Sequence[bool]
    ) -> list[tuple[str, float, bool]]:
        """Return text, confidence and whether it stood upside down, for each piece."""
        first = self._ocr.recognize_txt(list(crops))
        read = list(zip(first.txts, first.scores, flipped, strict=True))
        doubtful = [i for i, (_, confidence, _) in enumerate(read) if confidence < DOUBT]
        if doubtful:
            again = self._ocr.recognize_txt([np.rot90(crops[i], 2) for i in doubtful])
            for i, text, confidence in zip(doubtful, again.txts, again.scores, strict=True):
                if confidence > read[i][1]:
                    read[i] = (text, confidence, not flipped[i])
        return read


def _parameters(threads: int) -> dict[str, Any]:
    """Return settings that leave sizes to us and name each model file, so that none is fetched."""
    return {
        "Global.log_level": "critical",
        "Global.text_score": 0.0,
        "Det.limit_type": "min",
        "Det.limit_side_len": CELL,
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


def _line(box: Any, text: str, confidence: float, flipped: bool) -> Line:
    """Place a piece: `box` holds its corners as rapidocr orders them, clockwise from top left."""
    top_left, top_right, _, bottom_left = box
    across, along = top_right - top_left, bottom_left - top_left
    width, height = float(np.linalg.norm(across)), float(np.linalg.norm(along))
    if height >= TALL * width:
        across, width, height = along, height, width
    x, y = box.mean(axis=0)
    right, down = across / max(width, 1.0) * (-1 if flipped else 1)
    return Line(text.strip(), float(confidence), float(x), float(y), right, down, width, height)


def _test_picture() -> Image.Image:
    image = Image.new("RGB", (320, 96), "white")
    font = ImageFont.load_default(40)
    ImageDraw.Draw(image).text((40, 20), TEST_WORD, font=font, fill="black")
    return image
