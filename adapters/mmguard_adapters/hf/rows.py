"""Cutting a batch of model inputs into its rows.

Text tensors have one slice a row. Image tensors come in four layouts: one slice a row (Idefics,
Mllama), one an image (LLaVA), one a tile (InternVL), or many patches an image (Qwen-VL). Which one
it is shows from the sizes; where it does not, the batch is not cut at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Inputs = Mapping[str, Any]
Spans = dict[str, list[tuple[int, int]]]

# Token ids: what the model reads as text.
IDS = ("input_ids", "decoder_input_ids", "qformer_input_ids")
# Made from the ids by counting: they say where text and images stand, not what they are.
DERIVED = frozenset(
    {
        "attention_mask",
        "cross_attention_mask",
        "decoder_attention_mask",
        "mm_token_type_ids",
        "position_ids",
        "qformer_attention_mask",
        "special_tokens_mask",
        "token_type_ids",
    }
)
IMAGES = frozenset(
    {
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "batch_num_images",
        "image_grid_thw",
        "image_sizes",
        "pixel_attention_mask",
        "pixel_values",
    }
)
_BY_ROW = frozenset({*IDS, *DERIVED, "batch_num_images"})
_ROW_LAYOUT = frozenset({"pixel_attention_mask", "aspect_ratio_ids"})  # Idefics, Mllama


def tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Return the tensors among `inputs`; one without dimensions is a setting."""
    return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.dim()}


def count(inputs: Inputs) -> int:
    """Return the number of rows."""
    found = tensors(inputs)
    for key in (*IDS[:2], "pixel_values", "inputs_embeds"):
        if key in found:
            return len(found[key])
    return max((len(value) for value in found.values() if value.dim()), default=1)


def spans(inputs: Inputs, images: Sequence[int], image_token: int | None) -> Spans | None:
    """Return where each row's slices start and end along dimension 0; None if that is unclear.

    `images` holds the number of images in each row.
    """
    found, rows = tensors(inputs), len(images)
    cut: Spans = {}
    for key, value in found.items():
        sizes = [len(value)] if rows == 1 else _sizes(key, value, found, images, image_token)
        if sizes is None or sum(sizes) != len(value):
            return None
        ends = list(itertools.accumulate(sizes))
        cut[key] = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return cut


def take(inputs: Inputs, cut: Spans, rows: Sequence[int]) -> dict[str, Any]:
    """Return `inputs` with these rows only."""
    taken = dict(inputs)
    for key, places in cut.items():
        parts = [inputs[key][start:end] for start, end in (places[row] for row in rows)]
        taken[key] = torch.cat(parts)
    return {k: v for k, v in taken.items() if not (k in IMAGES and k in cut and not len(v))}


def by_tokens(length: int, ids: torch.Tensor | None, image_token: int | None) -> list[int] | None:
    """Share `length` slices out in proportion to the rows' image tokens (tiles of one size)."""
    if ids is None or image_token is None:
        return None
    tokens = (ids == image_token).sum(-1).tolist()
    total = sum(tokens)
    if not total or any(length * n % total for n in tokens):
        return None
    return [length * n // total for n in tokens]


def _sizes(
    key: str,
    value: torch.Tensor,
    found: Mapping[str, torch.Tensor],
    images: Sequence[int],
    image_token: int | None,
) -> list[int] | None:
    rows, total = len(images), sum(images)
    by_row = key in _BY_ROW or not _ROW_LAYOUT.isdisjoint(found)
    if by_row or (len(value) == rows and all(n == 1 for n in images)):
        return [1] * rows if len(value) == rows else None
    grid = found.get("image_grid_thw")
    if grid is not None and key == "pixel_values":
        if len(grid) != total:
            return None
        patches = iter(grid.prod(-1).tolist())
        return [sum(itertools.islice(patches, n)) for n in images]
    if len(value) == total:
        return list(images)
    return by_tokens(len(value), found.get("input_ids"), image_token)
