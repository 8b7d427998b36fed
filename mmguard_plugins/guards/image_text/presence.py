"""The cheap test that comes before reading: it says where in a picture text may stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from mmguard_plugins.errors import GuardError
from mmguard_plugins.weights import open_weights

NAME = "text_presence"
MODEL = "presence.onnx"
SHIPPED = Path(__file__).parent / "weights"
CELL = 8  # pixels of a side that one answer stands for
SMALLER = 3  # the net knows letters of 7 to 44 pixels; larger ones it finds in smaller copies
SMALLEST = 40  # no copy is smaller than this on its longer side
STRIP = 1024  # rows looked at together, which bounds memory

Heat = npt.NDArray[np.float32]


class TextPresence:
    """A small net that finds where a picture may hold text. One serves every thread.

    It knows Latin letters and digits from about seven pixels up, at any angle; other scripts look
    alike to it but were not trained on. Figures are in the card beside its weights.
    """

    def __init__(self, path: Path | None = None, threads: int = 1) -> None:
        """Open the weights folder (default: the shipped one) and look at a blank picture.

        Raises `GuardError` when a file is missing or damaged.
        """
        weights = open_weights(path or SHIPPED, NAME)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False
        try:
            self._session: Any = onnxruntime.InferenceSession(
                weights.file(MODEL).read_bytes(), options, providers=["CPUExecutionProvider"]
            )
            self.score(Image.new("RGB", (64, 64)))
        except Exception as error:  # onnxruntime's classes share no base
            raise GuardError(
                f"model {MODEL!r} cannot be used ({type(error).__name__}: {error});"
                " install the weights anew"
            ) from error

    def score(self, image: Image.Image) -> float:
        """Return how likely it is, 0..1, that an RGB image holds readable text."""
        return float(self.heat(image).max(initial=0.0))

    def heat(self, image: Image.Image) -> Heat:
        """Return the likelihood of text for each cell of `CELL` pixels, row by row."""
        rows, columns = -(-image.height // CELL), -(-image.width // CELL)
        heat = np.zeros((rows, columns), np.float32)
        for copy in _copies(image):
            found = self._look(np.asarray(copy))
            if found.shape != heat.shape:
                size = (columns, rows)
                found = np.asarray(Image.fromarray(found).resize(size, Image.Resampling.NEAREST))
            np.maximum(heat, found, out=heat)
        return heat

    def _look(self, pixels: npt.NDArray[np.uint8]) -> Heat:
        """Look at one size, strip by strip; strips overlap by what the net sees around a cell."""
        height, width = pixels.shape[:2]
        pad = ((0, -height % CELL), (0, -width % CELL), (0, 0))
        pixels = np.pad(pixels, pad, mode="edge")
        edge = 8 * CELL
        parts: list[Heat] = []
        for top in range(0, pixels.shape[0], STRIP):
            above = min(top, edge)
            strip = pixels[top - above : top + STRIP + edge]
            batch = np.ascontiguousarray(strip.transpose(2, 0, 1)[None], np.float32)
            (found,) = self._session.run(None, {"pixels": batch})
            rows = min(STRIP, pixels.shape[0] - top) // CELL
            parts.append(found[0, 0, above // CELL : above // CELL + rows])
        return np.concatenate(parts)


def _copies(image: Image.Image) -> Iterator[Image.Image]:
    """Yield the image and smaller and smaller copies."""
    factor = 1
    while factor == 1 or max(image.size) >= SMALLEST * factor:
        if factor == 1:
            yield image
        else:
            size = (max(1, image.width // factor), max(1, image.height // factor))
            yield image.resize(size, Image.Resampling.BOX)
        factor *= SMALLER
