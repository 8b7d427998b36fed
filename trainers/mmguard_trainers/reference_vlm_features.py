"""What the frozen encoder makes of every picture, kept on disk, and stage 2's draws from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from mmguard_trainers import checkpoints
from mmguard_trainers import reference_vlm_data as data
from mmguard_trainers.reference_vlm_documents import Batch, Document, collate, document
from mmguard_trainers.reference_vlm_drawing import CANVAS
from mmguard_trainers.reference_vlm_model import IMAGE_TEXT, build_base, image_processor, move

_CHUNK = 2000  # pictures to a file of the feature cache


class Views:
    """The features of a gallery's pictures, read from the cache as they are asked for."""

    def __init__(self, gallery: data.Gallery, paths: list[Path]) -> None:
        self.gallery = gallery
        self._chunks: list[Tensor] = [
            torch.load(path, mmap=True, weights_only=True) for path in paths
        ]

    def read(self, indices: list[int]) -> Tensor:
        """Return (pictures, IMAGE_TOKENS, 4 * 384) in fp16."""
        if not indices:
            return self._chunks[0][:0].clone()
        return torch.stack([self._chunks[i // _CHUNK][i % _CHUNK] for i in indices])


def cache_features(gallery: data.Gallery, scratch: Path, device: torch.device) -> list[Path]:
    """Encode every picture of `gallery` once; return the files, `_CHUNK` pictures in each.

    A file holds (pictures, IMAGE_TOKENS, 4 * 384) in fp16: the encoder's patches after the pixel
    shuffle, which has no weights. Files that are there are kept, so an interrupted run goes on.
    """
    folder = scratch / "features" / gallery.name
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(gallery), _CHUNK)
    paths = [folder / f"{start:06d}.pt" for start in starts]
    missing = [
        (start, path) for start, path in zip(starts, paths, strict=True) if not path.exists()
    ]
    if not missing:
        return paths
    model = build_base()[0]
    move(model, device)
    move(model, torch.bfloat16)
    processor = image_processor()
    for start, path in tqdm(missing, desc=f"features of {gallery.name}"):
        stop = min(start + _CHUNK, len(gallery))
        parts = []
        for first in range(start, stop, 50):
            images = [gallery.draw(index) for index in range(first, min(first + 50, stop))]
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            parts.append(shuffled_patches(model, pixels.to(device)).to("cpu", torch.float16))
        checkpoints.save(torch.cat(parts), path)
    return paths


@torch.inference_mode()
def shuffled_patches(model: InternVLForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Return what the projector is given for `pixel_values`."""
    tower = model.model.vision_tower
    hidden = tower(pixel_values=pixel_values.to(tower.dtype)).last_hidden_state[:, 1:]
    side = CANVAS // 14
    grid = hidden.reshape(len(hidden), side, side, -1)
    merged: Tensor = model.model.pixel_shuffle(grid, scale_factor=0.5)
    return merged.flatten(1, 2)  # (n, 16, 1536)


class Sampler:
    """Draws stage 2's batches: pictures with questions on them, and chats.

    `shares` are those of each gallery and, last, of chats among a step's `n_documents`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        galleries: list[Views],
        chats: list[data.Turn],
        *,
        shares: Sequence[float],
        n_documents: int,
        device: torch.device,
    ) -> None:
        self._tokenizer = tokenizer
        self._galleries = galleries
        self._chats = chats
        self._shares = shares
        self._n_documents = n_documents
        self._device = device

    def __call__(self, rng: random.Random) -> list[Batch]:
        """Return one step's documents, the shorter half and the longer half, to pad less.

        A chat has a picture beside it, to be ignored, one time in four.
        """
        drawn: list[tuple[Document, Tensor]] = []
        for _ in range(self._n_documents):
            source = rng.choices(range(4), self._shares)[0]
            chat = source == len(self._galleries)
            if chat and rng.random() < 0.75:
                alone = document(self._tokenizer, [rng.choice(self._chats)])
                drawn.append((alone, self._galleries[0].read([])))
                continue
            views = rng.choice(self._galleries) if chat else self._galleries[source]
            index = rng.randrange(len(views.gallery))
            asked = data.turns(views.gallery.pictures[index], rng)
            asked = [rng.choice(self._chats)] if chat else asked
            about = document(self._tokenizer, asked, IMAGE_TEXT)
            drawn.append((about, views.read([index])))
        drawn.sort(key=lambda item: len(item[0].ids))
        half = (len(drawn) + 1) // 2
        return [self._collate(part) for part in (drawn[:half], drawn[half:]) if part]

    def _collate(self, drawn: list[tuple[Document, Tensor]]) -> Batch:
        features = torch.cat([feature for _, feature in drawn])
        documents = [item for item, _ in drawn]
        return collate(documents, features, self._device)
