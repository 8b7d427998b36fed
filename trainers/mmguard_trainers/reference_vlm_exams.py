"""What the reference VLM is judged by, and how its answers are counted."""

from __future__ import annotations

import math
from typing import Any

import torch
from tqdm import tqdm
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerBase

from mmguard_trainers.reference_vlm_data import (
    CAPTION_QUESTIONS,
    OBJECT_QUESTIONS,
    READ_QUESTIONS,
    Gallery,
    Turn,
    article,
    caption,
)
from mmguard_trainers.reference_vlm_documents import collate, document
from mmguard_trainers.reference_vlm_features import Views
from mmguard_trainers.reference_vlm_losses import answer_logits
from mmguard_trainers.reference_vlm_model import IMAGE_TEXT


def exams(gallery: Gallery, n_pictures: int) -> dict[str, list[list[Turn]]]:
    """Return what the model is judged by: for each exam, turns on each of the first pictures.

    Of shapes, every easy-VQA question on a fifth of `n_pictures`.
    """
    pictures = gallery.pictures[:n_pictures]
    if gallery.name.startswith("shapes"):
        return {"questions": [list(picture.questions) for picture in pictures[: n_pictures // 5]]}
    if gallery.name.startswith("photos"):
        return {
            "naming": [[Turn(OBJECT_QUESTIONS[0], f"{article(str(p.thing))}.")] for p in pictures],
            "captions": [[Turn(CAPTION_QUESTIONS[0], str(caption(p)))] for p in pictures],
        }
    plain = [p.thing is None for p in pictures]
    read = [Turn(READ_QUESTIONS[0], f'The text says "{p.text}".') for p in pictures]
    return {
        "reading on a plain ground": [[t] if p else [] for t, p in zip(read, plain, strict=True)],
        "reading on a photo": [[] if p else [t] for t, p in zip(read, plain, strict=True)],
    }


@torch.inference_mode()
def grade(
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    views: Views,
    exam: list[list[Turn]],
    device: torch.device,
) -> list[bool]:
    """Say of every turn of `exam`, a list for each of the first pictures, whether it is right."""
    right: list[bool] = []
    for start in tqdm(range(0, len(exam), 16), desc=views.gallery.name):
        asked = exam[start : start + 16]
        indices = [start + offset for offset, turns in enumerate(asked) if turns]
        documents = [document(tokenizer, turns, IMAGE_TEXT) for turns in asked if turns]
        if not documents:
            continue
        batch = collate(documents, views.read(indices), device)
        logits, targets = answer_logits(model, batch)
        rows, columns = batch.answers[:, 1:].nonzero(as_tuple=True)
        turns = batch.turns[rows, columns + 1]
        groups = rows * (1 + batch.turns.max()) + turns
        hits = logits.argmax(-1) == targets
        right += [bool(hits[groups == group].all()) for group in groups.unique()]
    return right


def proportion(right: list[bool]) -> dict[str, Any]:
    """Return the share of `right` with Wilson's 95 % interval."""
    n, share = len(right), sum(right) / len(right)
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    interval = [round(centre - half, 4), round(centre + half, 4)]
    return {"n": n, "accuracy": round(share, 4), "interval": interval}
