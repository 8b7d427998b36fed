"""Questions and answers on a picture as the language model reads them: token ids and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmguard_trainers.reference_vlm_data import Turn


@dataclass(frozen=True)
class Document:
    """A prompt's beginning, mostly a picture, and turns on it that do not see one another.

    So one pass over the picture serves several questions, and no answer gives another away.
    """

    ids: list[int]
    turns: list[int]  # 0 for the shared beginning, then 1, 2, ...
    positions: list[int]
    answers: list[bool]


@dataclass(frozen=True)
class Batch:
    """Documents side by side, padded on the right."""

    ids: Tensor  # (n, length)
    positions: Tensor  # (n, length)
    answers: Tensor  # (n, length), true where a token belongs to an answer
    turns: Tensor  # (n, length)
    sees: Tensor  # (n, 1, length, length), true where a token attends
    features: Tensor  # (pictures, IMAGE_TOKENS, 4 * 384), in the documents' order


def document(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Turn], image_tokens: str = ""
) -> Document:
    """Lay `asked` out as the chat template does, behind `image_tokens` or nothing."""
    start = f"<|im_start|>user\n{image_tokens}"
    ids = _encode(tokenizer, start + "\n" if image_tokens else start)
    turns_, positions = [0] * len(ids), list(range(len(ids)))
    answers = [False] * len(ids)
    shared = len(ids)
    end: Any = tokenizer.eos_token_id
    for number, turn in enumerate(asked, start=1):
        prompt = _encode(tokenizer, f"{turn.question}<|im_end|>\n<|im_start|>assistant\n")
        answer = [*_encode(tokenizer, turn.answer), end]
        length = len(prompt) + len(answer)
        ids += prompt + answer
        turns_ += [number] * length
        positions += range(shared, shared + length)
        answers += [False] * len(prompt) + [True] * len(answer)
    return Document(ids, turns_, positions, answers)


def collate(documents: Sequence[Document], features: Tensor, device: torch.device) -> Batch:
    """Pad `documents` to one length; a padded place sees itself alone."""
    length = max(len(item.ids) for item in documents)

    def pad(rows: list[list[int]]) -> Tensor:
        padded = [row + [0] * (length - len(row)) for row in rows]
        return torch.tensor(padded, device=device)

    turns_ = pad([[turn + 1 for turn in item.turns] for item in documents])  # 0 is padding
    there, earlier = turns_.unsqueeze(2), turns_.unsqueeze(1)
    related = (earlier == there) | ((earlier == 1) & (there > 0))
    order = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    alone = torch.eye(length, dtype=torch.bool, device=device)
    sees = (related & order & (there > 0)) | alone
    return Batch(
        ids=pad([item.ids for item in documents]),
        positions=pad([item.positions for item in documents]),
        answers=pad([[int(a) for a in item.answers] for item in documents]).bool(),
        turns=turns_ - 1,
        sees=sees.unsqueeze(1),
        features=features.to(device),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
