"""Write a file whole or not at all: it gets its name when nothing is left to write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def write(content: str | bytes, path: Path) -> None:
    """Write text, as UTF-8, or bytes."""
    scratch = _scratch(path)
    scratch.write_bytes(content.encode() if isinstance(content, str) else content)
    scratch.replace(path)


def save(content: Any, path: Path) -> None:
    """Write tensors and what holds them, for `torch.load`."""
    scratch = _scratch(path)
    torch.save(content, scratch)
    scratch.replace(path)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
