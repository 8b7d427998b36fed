"""Letting an image in: bounds first, then a full decode, so that guards and model see the same.

Nothing is fetched and no file is opened here: an image is pixels, encoded bytes or a data URL.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import replace
from typing import Any

from PIL import Image

from mmguard_plugins.config import Limits
from mmguard_plugins.types import Part

REFUSED = "refused: "
UNDECODABLE = "undecodable: "


def admit(part: Part, limits: Limits) -> Part:
    """Return the part with `data` as a decoded `PIL.Image.Image`, or with `problem` set.

    A problem starts with `refused: ` (a limit is broken) or `undecodable: ` (not a readable image).
    """
    if part.problem:
        return part
    try:
        return replace(part, data=_decode(part.data, limits))
    except _RefusedError as error:
        return replace(part, data=None, problem=f"{REFUSED}{error}")
    except _UnreadableError as error:
        return replace(part, data=None, problem=f"{UNDECODABLE}{error}")
    except Exception as error:  # noqa: BLE001 - PIL raises anything on crafted bytes
        return replace(part, data=None, problem=f"{UNDECODABLE}{type(error).__name__}")


def _from_data_url(url: str) -> bytes:
    """Return the bytes of a base64 data URL. Raises an error for any other address."""
    head, comma, body = url.partition(",")
    if not (head.startswith("data:") and comma and head.endswith(";base64")):
        raise _UnreadableError("an address is not fetched; send a base64 data URL")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise _UnreadableError("the data URL is not valid base64") from error


class _RefusedError(Exception):
    """An image breaks a limit."""


class _UnreadableError(Exception):
    """What stands for an image is none; the message holds nothing of the user's."""


def _decode(data: Any, limits: Limits) -> Image.Image:
    if isinstance(data, str):
        if len(data) > limits.max_image_bytes * 4 // 3 + 100:
            raise _RefusedError(f"data URL of {len(data)} characters is over max_image_bytes")
        data = _from_data_url(data)
    if isinstance(data, bytes | bytearray | memoryview):
        if len(data) > limits.max_image_bytes:
            raise _RefusedError(f"{len(data)} bytes are over max_image_bytes")
        image: Image.Image = Image.open(io.BytesIO(data))
    elif isinstance(data, Image.Image):
        image = data
    else:
        image = _from_array(data)
    _check_size(image, limits)
    image.load()  # a truncated file fails here, not later inside a guard or the model
    return image


def _check_size(image: Image.Image, limits: Limits) -> None:
    if image.width < 1 or image.height < 1:
        raise _UnreadableError("the image has no pixels")
    if image.width * image.height > limits.max_image_pixels:
        raise _RefusedError(f"{image.width}x{image.height} pixels are over max_image_pixels")
    frames = getattr(image, "n_frames", 1)
    if frames > limits.max_frames:
        raise _RefusedError(f"{frames} frames are over max_frames")


def _from_array(data: Any) -> Image.Image:
    """Read a numpy array or torch tensor: (h, w), (h, w, 3|4) or (3|4, h, w); uint8 or 0..1."""
    array = data.numpy() if hasattr(data, "numpy") else data
    if not hasattr(array, "__array_interface__"):
        raise _UnreadableError(f"a {type(data).__name__} is not an image")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind == "f":
        scale = 255.0 if float(array.max()) <= 1.0 else 1.0
        array = (array * scale).round().clip(0, 255).astype("uint8")
    return Image.fromarray(array)
