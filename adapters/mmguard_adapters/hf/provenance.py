"""Knowing again the inputs that were checked.

The processor turns text and images into tensors; `generate` gets tensors. What connects the two is
a hash of each row's content: it survives `.to(device)`, a cast to half precision, unpacking, other
padding and being cut out of its batch or put into another one, and it changes with any pixel or
token. Nothing is attached to the tensors, so nothing can be forgotten or carried over wrongly.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmguard_adapters.hf import rows
from mmguard_plugins.types import Decision, Request

MAX_ROWS = 512
MAX_BYTES = 512 * 2**20  # of remembered images, which output guards may want to see again
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Admission:
    """A row of inputs that was checked: what it was made from and what was decided."""

    request: Request
    decision: Decision


@dataclass(frozen=True, slots=True)
class _Record:
    admission: Admission
    digests: tuple[bytes, ...]
    weight: int


class Provenance:
    """A bounded memory of admissions by content; the oldest are forgotten first. Thread-safe."""

    def __init__(self, image_token: int | None, pad_token: int | None) -> None:
        """Start empty."""
        self.image_token = image_token
        self._pad_token = pad_token
        self._records: OrderedDict[bytes, _Record] = OrderedDict()
        self._by_digest: dict[bytes, bytes] = {}
        self._images: OrderedDict[bytes, int] = OrderedDict()
        self._weight = 0
        self._lock = threading.Lock()

    def remember(self, inputs: rows.Inputs, admissions: Sequence[Admission]) -> None:
        """Remember each row of what the processor returned."""
        counts = [len(a.request.images) for a in admissions]
        cut = rows.spans(inputs, counts, self.image_token)
        if cut is None or rows.count(inputs) != len(admissions):
            return  # not known again later, hence checked again from what can be read back
        for row, admission in enumerate(admissions):
            content = rows.take(inputs, cut, [row])
            text = self._text_digest(content)
            digests = tuple(self._digest(content, text, dtype) for dtype in _dtypes(content))
            self._store(text, counts[row], _Record(admission, digests, _weight(admission)))

    def find(self, inputs: rows.Inputs) -> list[Admission | None]:
        """Return the admission of each row, None for rows that were never checked as they are."""
        ids = rows.tensors({key: inputs.get(key) for key in (*rows.IDS, "attention_mask")})
        total = rows.count(inputs)
        texts = [
            self._text_digest({key: value[row : row + 1] for key, value in ids.items()})
            for row in range(total)
        ]
        with self._lock:
            counts = [self._images.get(text) for text in texts]
        if any(n is None for n in counts):
            known = [n if n is not None else 0 for n in counts] if not _has_images(inputs) else None
        else:
            known = [n for n in counts if n is not None]
        cut = rows.spans(inputs, known, self.image_token) if known is not None else None
        if cut is None:
            return [None] * total
        found: list[Admission | None] = []
        for row, text in enumerate(texts):
            digest = self._digest(rows.take(inputs, cut, [row]), text, None)
            with self._lock:
                key = self._by_digest.get(digest)
                if key is not None:
                    self._records.move_to_end(key)
                found.append(self._records[key].admission if key is not None else None)
        return found

    def _store(self, text: bytes, images: int, record: _Record) -> None:
        key = record.digests[0]
        with self._lock:
            self._images[text] = images
            self._images.move_to_end(text)
            self._drop(key)
            self._records[key] = record
            self._by_digest.update(dict.fromkeys(record.digests, key))
            self._weight += record.weight
            while len(self._records) > MAX_ROWS or (
                self._weight > MAX_BYTES and len(self._records) > 1
            ):
                self._drop(next(iter(self._records)))
            while len(self._images) > 2 * MAX_ROWS:
                self._images.popitem(last=False)

    def _drop(self, key: bytes) -> None:
        old = self._records.pop(key, None)
        if old is None:
            return
        self._weight -= old.weight
        for digest in old.digests:
            if self._by_digest.get(digest) == key:
                del self._by_digest[digest]

    def _text_digest(self, row: rows.Inputs) -> bytes:
        """Hash the token ids of one row without its padding."""
        state = hashlib.sha256()
        for key in rows.IDS:
            ids = row.get(key)
            if isinstance(ids, torch.Tensor):
                mask = row.get("attention_mask") if key == "input_ids" else None
                shown = unpadded(ids[0], mask, self._pad_token)
                hidden = _hidden(ids[0], mask, self._pad_token)
                state.update(f"{key}:{shown}:{hidden}".encode())
        return state.digest()

    def _digest(self, row: rows.Inputs, text: bytes, dtype: torch.dtype | None) -> bytes:
        """Hash everything in one row that carries content, floats as they are after a cast."""
        state = hashlib.sha256(text)
        for key, value in sorted(rows.tensors(row).items()):
            if key in rows.DERIVED or key in rows.IDS:
                continue
            kind = (dtype or value.dtype) if value.is_floating_point() else torch.int64
            plain = value.detach().to("cpu", kind).contiguous()
            state.update(f"{key}:{plain.dtype}:{tuple(plain.shape)}".encode())
            state.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        return state.digest()


def unpadded(ids: torch.Tensor, mask: Any, pad_token: int | None) -> list[int]:
    """Return the ids of one row without its padding: pad tokens that are masked or at the ends."""
    kept: list[int] = ids.tolist()
    if _fits(mask, ids):
        return [i for i, seen in zip(kept, mask[0].tolist(), strict=True) if seen or i != pad_token]
    while kept and kept[0] == pad_token:
        kept.pop(0)
    while kept and kept[-1] == pad_token:
        kept.pop()
    return kept


def _hidden(ids: torch.Tensor, mask: Any, pad_token: int | None) -> list[int]:
    """Return where tokens other than padding are masked, counted without padding."""
    if not _fits(mask, ids) or bool(mask.all()):
        return []
    pairs = zip(ids.tolist(), mask[0].tolist(), strict=True)
    seen = [bool(shown) for i, shown in pairs if shown or i != pad_token]
    return [place for place, shown in enumerate(seen) if not shown]


def _fits(mask: Any, ids: torch.Tensor) -> bool:
    return isinstance(mask, torch.Tensor) and mask.shape == (1, len(ids))


def _dtypes(row: rows.Inputs) -> Iterator[torch.dtype | None]:
    """Yield what the row's floats may be cast to on their way to the model."""
    yield None
    present = {v.dtype for v in rows.tensors(row).values() if v.is_floating_point()}
    if present:
        yield from (dtype for dtype in _DTYPES if present != {dtype})


def _has_images(inputs: rows.Inputs) -> bool:
    return any(key not in rows.DERIVED and key not in rows.IDS for key in rows.tensors(inputs))


def _weight(admission: Admission) -> int:
    images = (p.data for p in admission.request.images if isinstance(p.data, Image.Image))
    return sum(image.width * image.height * 4 for image in images)
