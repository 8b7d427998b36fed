"""Images on their way into a processor: loaded once, for the guards and the model alike."""

from __future__ import annotations

import contextvars
import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from mmguard_plugins import images as core
from mmguard_plugins.config import Limits
from mmguard_plugins.types import Part, PartKind

_BLANK = (224, 224)


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image as a guard sees it (`part`) and as the processor gets it (`data`).

    What cannot be read is a blank image to the processor, so that the batch keeps its shape, and a
    problem to the engine, which blocks: the model never sees the blank.
    """

    part: Part
    data: Any


_preloaded: contextvars.ContextVar[tuple[LoadedImage, ...]] = contextvars.ContextVar(
    "mmguard_preloaded", default=()
)


def load(image: Any, limits: Limits, timeout: float | None = None) -> LoadedImage:
    """Load one image: PIL, array, address, file name or base64, as transformers would."""
    part = Part(PartKind.IMAGE, data=image)
    if isinstance(image, str) and not image.startswith("data:"):
        try:
            image = load_image(image, timeout=timeout)
            part = Part(PartKind.IMAGE, data=image)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong, this blocks
            problem = f"{core.UNDECODABLE}{type(error).__name__}"
            part = Part(PartKind.IMAGE, problem=problem)
    elif isinstance(image, torch.Tensor):
        part = Part(PartKind.IMAGE, data=image.detach().cpu())
    part = core.admit(part, limits)
    if part.problem:
        return LoadedImage(part, Image.new("RGB", _BLANK))
    if isinstance(image, str):
        # As transformers loads an address.
        return LoadedImage(part, ImageOps.exif_transpose(part.data).convert("RGB"))
    return LoadedImage(part, image)


@contextmanager
def preloaded(images: Sequence[LoadedImage]) -> Generator[None]:
    """Remember what could not be loaded for the processor call that follows on this thread.

    The caller loads first and passes blanks on, and whoever copies a blank makes an image of it.
    """
    token = _preloaded.set(tuple(images))
    try:
        yield
    finally:
        _preloaded.reset(token)


def load_all(images: Any, limits: Limits) -> list[LoadedImage]:
    """Load the images of any nesting, in order."""
    loaded, earlier = [load(image, limits) for image in flat(images)], _preloaded.get()
    if len(earlier) != len(loaded) and any(image.part.problem for image in earlier):
        return [next(i for i in earlier if i.part.problem)] * len(loaded)
    return [
        first if first is not None and first.part.problem else image
        for image, first in itertools.zip_longest(loaded, earlier[: len(loaded)])
    ]


def by_row(images: Any, texts: Sequence[str], placeholders: Sequence[str]) -> list[list[Any]]:
    """Return the images of each row, from whatever nesting a processor takes.

    Where no nesting and no placeholder tells the rows apart, each row is given every image: a guard
    then sees too much rather than too little.
    """
    if images is None:
        return [[] for _ in texts]
    rows = len(texts)
    nested = isinstance(images, list | tuple) and any(isinstance(i, list | tuple) for i in images)
    if nested and len(images) == rows:
        return [list(flat(row)) for row in images]
    every = list(flat(images))
    if rows <= 1:
        return [every] if rows else [[image] for image in every]
    for placeholder in placeholders:
        counts = [text.count(placeholder) for text in texts]
        if sum(counts) == len(every):
            left = iter(every)
            return [[next(left) for _ in range(n)] for n in counts]
    if len(every) == rows:
        return [[image] for image in every]
    return [every for _ in texts]


def like(images: Any, replacements: Iterator[Any]) -> Any:
    """Return `images` in the same nesting, each image replaced by the next of `replacements`."""
    if isinstance(images, list | tuple):
        return [like(image, replacements) for image in images]
    if getattr(images, "ndim", 0) == 4:
        return [next(replacements) for _ in range(len(images))]
    return None if images is None else next(replacements)


def flat(images: Any) -> Iterator[Any]:
    """Yield the single images of any nesting; an array of four dimensions is a list of images."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        for image in images:
            yield from flat(image)
    elif images is not None:
        yield images
