"""What stages 1 and 2 of the reference VLM's training minimise, as plain functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from mmguard_trainers.reference_vlm_documents import Batch


def naming_loss(tokens: Tensor, names: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Make a picture's tokens, on average, point at the word embeddings of what it shows.

    `tokens` is (n, IMAGE_TOKENS, dim), `names` one (words, dim) for each of the data's `NAMES`,
    `labels` (n, len(names)), -1 where there is no answer. Tokens keep near the embeddings' norm.
    """
    tokens = tokens.float()
    wanted = torch.cat(list(names)).norm(dim=-1).mean()
    total: Tensor = 0.1 * (tokens.norm(dim=-1) / wanted).log().square().mean()
    for index, scores in enumerate(naming_scores(tokens, names)):
        known = labels[:, index] >= 0
        if known.any():
            loss = nn.functional.cross_entropy(scores[known], labels[known, index], reduction="sum")
            total = total + loss / len(tokens)
    return total


def naming_scores(tokens: Tensor, names: Sequence[Tensor]) -> list[Tensor]:
    """Return how much the mean token points at each name: (n, words), for each group of names."""
    pooled = tokens.float().mean(dim=1)  # (n, dim)
    directions = [nn.functional.normalize(group - group.mean(0), dim=-1) for group in names]
    return [8 * pooled @ group.T for group in directions]


def naming_accuracy(tokens: Tensor, names: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return, for each group of names, the share told right where there is an answer: (groups,)."""
    scores = naming_scores(tokens, names)
    right = torch.stack([group.argmax(-1) for group in scores], dim=1) == labels
    return right.sum(0) / (labels >= 0).sum(0).clamp(min=1)


def answer_loss(model: InternVLForConditionalGeneration, batch: Batch) -> Tensor:
    """Return the mean cross entropy of `batch`'s answers; the pictures are projected features."""
    logits, targets = answer_logits(model, batch)
    return nn.functional.cross_entropy(logits.float(), targets)


def answer_logits(model: InternVLForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits and right tokens at every position that predicts a token of an answer."""
    inner = model.model
    embeddings = model.get_input_embeddings()(batch.ids)
    if len(batch.features):
        weight = inner.multi_modal_projector.linear_1.weight
        tokens = inner.multi_modal_projector(batch.features.to(weight.dtype)).to(embeddings.dtype)
        places = (batch.ids == model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(places, tokens)
    blocked = torch.finfo(embeddings.dtype).min
    hidden = inner.language_model(
        inputs_embeds=embeddings,
        attention_mask=torch.zeros_like(batch.sees, dtype=embeddings.dtype).masked_fill(
            ~batch.sees, blocked
        ),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    asked = batch.answers[:, 1:]
    return model.lm_head(hidden[:, :-1][asked]), batch.ids[:, 1:][asked]
