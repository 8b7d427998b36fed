"""Reading model inputs back that no guarded processor made: ids into text, pixels into images.

Only what can be turned back with certainty is. For anything else (embeddings, tiles of one image,
video, pixels out of range) the answer is a problem, and the row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from mmguard_adapters.hf import rows
from mmguard_adapters.hf.conversation import text_request
from mmguard_adapters.hf.provenance import unpadded
from mmguard_plugins.types import Part, PartKind, Request

UNREADABLE = "unreadable: "
# Rounding, half precision and resampling overshoot a little; more is not an image's pixel.
_SLACK = 4.0
_READABLE = frozenset({*rows.IDS, *rows.DERIVED, "pixel_values", "image_sizes", "image_grid_thw"})


def read_back(
    inputs: rows.Inputs, tokenizer: Any, image_processor: Any, image_token: int | None
) -> list[Request]:
    """Return one request for each row; what cannot be read is a part with a problem."""
    total = rows.count(inputs)
    images = _images(inputs, image_processor)
    shares = rows.by_tokens(len(images), inputs.get("input_ids"), image_token)
    one_each = len(images) == total and (total == 1 or shares == [1] * total)
    requests: list[Request] = []
    for row in range(total):
        texts = []
        for key in ("input_ids", "decoder_input_ids"):
            ids = inputs.get(key)
            if isinstance(ids, torch.Tensor):
                texts.append(_text(ids[row], _mask(inputs, key, row), tokenizer))
        # Which row shows which image is unknown, so each is judged with all of them.
        requests.append(text_request(texts, [images[row]] if one_each else images))
    return requests


def _mask(inputs: rows.Inputs, key: str, row: int) -> torch.Tensor | None:
    mask = inputs.get("attention_mask") if key == "input_ids" else None
    return mask[row : row + 1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _text(ids: torch.Tensor, mask: torch.Tensor | None, tokenizer: Any) -> str:
    kept = unpadded(ids, mask, tokenizer.pad_token_id)
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _images(inputs: rows.Inputs, image_processor: Any) -> list[Part]:
    opaque = sorted(set(rows.tensors(inputs)) - _READABLE) + sorted(
        key for key, value in inputs.items() if holds_tensors(value)
    )
    if opaque:
        return [_unreadable(f"{', '.join(opaque)} cannot be turned back")]
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return []
    try:
        arrays = _arrays(pixels.detach().float().cpu(), inputs, image_processor)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return [_unreadable(f"pixel_values cannot be turned back ({type(error).__name__})")]
    parts: list[Part] = []
    for array in arrays:
        if not torch.isfinite(array).all() or array.min() < -_SLACK or array.max() > 255 + _SLACK:
            return [_unreadable("pixel_values are out of an image's range")]
        data = array.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        parts.append(Part(PartKind.IMAGE, data=Image.fromarray(data)))
    return parts


def _unreadable(problem: str) -> Part:
    return Part(PartKind.IMAGE, problem=UNREADABLE + problem)


def _arrays(pixels: torch.Tensor, inputs: rows.Inputs, processor: Any) -> list[torch.Tensor]:
    """Return each image as (3, height, width) in 0..255. Raises where pixels are something else."""
    if "image_grid_thw" in inputs:
        arrays = list(_unpacked(pixels, inputs["image_grid_thw"].tolist(), processor))
    elif pixels.dim() == 4 and pixels.shape[1] == 3 and not _tiles(processor):
        arrays = list(pixels)
        if "image_sizes" in inputs:
            sizes = inputs["image_sizes"].tolist()
            arrays = [a[:, :h, :w] for a, (h, w) in zip(arrays, sizes, strict=True)]
    else:
        raise ValueError("not one plain image each")
    return [_denormalized(array, processor) for array in arrays]


def _tiles(processor: Any) -> bool:
    """Whether the processor may cut an image up, so that no slice shows the whole of it."""
    names = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan", "image_grid_pinpoints")
    return any(getattr(processor, name, None) for name in names)


def _unpacked(pixels: torch.Tensor, grids: list[list[int]], processor: Any) -> Any:
    """Yield the images of Qwen-VL's packed patches, (patches, channels * time * side * side)."""
    merge, side = processor.merge_size, processor.patch_size
    time, start = processor.temporal_patch_size, 0
    for t, h, w in grids:
        if t != 1:
            raise ValueError("more than one frame")
        patches = pixels[start : start + h * w]
        start += h * w
        # (h/merge, w/merge, merge, merge, channels, time, side, side)
        patches = patches.view(h // merge, w // merge, merge, merge, 3, time, side, side)
        if not torch.equal(patches[:, :, :, :, :, :1].expand_as(patches), patches):
            raise ValueError("frames differ")
        # (channels, h/merge, merge, side, w/merge, merge, side)
        image = patches[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
        yield image.reshape(3, h * side, w * side)
    if start != len(pixels):
        raise ValueError("patches and grid do not match")


def _denormalized(image: torch.Tensor, processor: Any) -> torch.Tensor:
    if processor.do_normalize:
        mean, std = (_channels(v) for v in (processor.image_mean, processor.image_std))
        image = image * std + mean
    return image / processor.rescale_factor if processor.do_rescale else image


def _channels(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


def holds_tensors(value: Any) -> bool:
    """Whether `value` is a container with tensors in it (encoder outputs, a filled cache)."""
    if isinstance(value, torch.Tensor | str | bytes):
        return False
    if hasattr(value, "get_seq_length"):
        return bool(value.get_seq_length())
    if isinstance(value, Mapping):
        return any(isinstance(v, torch.Tensor) or holds_tensors(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(isinstance(v, torch.Tensor) or holds_tensors(v) for v in value)
    return False
