"""Which file finds text in pictures: the shipped 8-bit detector, or rapidocr's own."""

from __future__ import annotations

from pathlib import Path

import rapidocr

from mmguard_plugins.errors import GuardError
from mmguard_plugins.weights import open_weights

NAME = "text_detector"
MODEL = "detector.onnx"
SHIPPED = Path(__file__).parent / "weights_detector"


def open_detector(path: Path | None = None) -> Path:
    """Check the weights folder (default: the shipped one) and return its model.

    Raises `GuardError` when a file is missing or damaged.
    """
    return open_weights(path or SHIPPED, NAME).file(MODEL)


def rapidocr_model(task: str) -> Path:
    """Return the one model for `task` in rapidocr's package; raises `GuardError` if there is none.

    Naming each file keeps rapidocr from fetching any.
    """
    folder = Path(rapidocr.__file__).parent / "models"
    files = sorted(folder.glob(f"*_{task}_*.onnx"))
    if len(files) != 1:
        raise GuardError(
            f"rapidocr holds {len(files)} models for {task!r}; install a release that carries one"
        )
    return files[0]
