"""Judging what was generated, and building the result a caller gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation import utils as generation

from mmguard_adapters.hf.session import Session
from mmguard_adapters.hf.text import as_response, decode
from mmguard_plugins.types import Action, Decision, Request, redact

Ask = Callable[[Request], str]


@dataclass(frozen=True, slots=True)
class Layout:
    """How `generate` lays out the result of one call."""

    returned: int  # sequences for each row
    pad: int
    eos: int | None
    as_dict: bool
    beams: bool
    encoder_decoder: bool
    prompts: list[list[int]]  # what stands before the new ids of each row, as the model has it


def judge(
    session: Session, request: Request, ids: Sequence[int], ask: Ask | None
) -> tuple[Decision, list[int] | None]:
    """Judge one generated sequence; return other ids where they must change."""
    text = decode(session.tokenizer, ids)
    decision = session.engine.check_output(request, as_response(text), ask)
    if decision.action is not Action.REDACT:
        return decision, None
    redacted = redact(text, decision.redactions)
    encoded = session.tokenizer(redacted, add_special_tokens=False)["input_ids"]
    return decision, [int(i) for i in encoded]


def prompt_length(layout: Layout, sequences: torch.Tensor, row: int, sequence: int) -> int:
    """Return how many ids of a sequence are the prompt: all of its row's, or none."""
    prompt = layout.prompts[row]
    return len(prompt) if sequences[sequence, : len(prompt)].tolist() == prompt else 0


def rebuild(
    result: Any, layout: Layout, sequences: Sequence[Sequence[int]], device: torch.device
) -> Any:
    """Return a result like `result` (None where the model did not run) with other sequences.

    Scores, hidden states, attentions and caches spell out what was replaced, hence they are left
    out.
    """
    width = max(map(len, sequences))
    rows = [[*ids, *[layout.pad] * (width - len(ids))] for ids in sequences]
    tensor = torch.tensor(rows, dtype=torch.long, device=device)
    if not (layout.as_dict if result is None else hasattr(result, "sequences")):
        return tensor
    kind = type(result) if result is not None else _output_class(layout)
    return kind(sequences=tensor)


def _output_class(layout: Layout) -> Any:
    if layout.encoder_decoder:
        if layout.beams:
            return generation.GenerateBeamEncoderDecoderOutput
        return generation.GenerateEncoderDecoderOutput
    if layout.beams:
        return generation.GenerateBeamDecoderOnlyOutput
    return generation.GenerateDecoderOnlyOutput


class StopEarly(StoppingCriteria):
    """Ends each sequence of a batch once what it says so far is blocked.

    Spares the rest of a long answer; the finished answer is judged anyway.
    """

    def __init__(self, session: Session, requests: Sequence[Request]) -> None:
        """Take one request for each sequence."""
        self._session, self._requests = session, requests
        self._every = session.engine.config.stream.check_every_tokens
        self._start = -1
        self._checked = 0
        self.decisions: dict[int, Decision] = {}

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: Any,  # noqa: ARG002 - the interface
        **kwargs: Any,  # noqa: ARG002
    ) -> Any:
        """Say which rows are done."""
        length = input_ids.shape[1]
        if self._start < 0:
            self._start = self._checked = length - 1
        if length - self._checked >= self._every:
            self._checked = length
            self._check(input_ids[:, self._start :].tolist())
        done = [row in self.decisions for row in range(len(input_ids))]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _check(self, rows: list[list[int]]) -> None:
        for row, ids in enumerate(rows):
            if row in self.decisions:
                continue
            response = as_response(decode(self._session.tokenizer, ids), finished=False)
            engine = self._session.engine
            decision = engine.check_output(self._requests[row], response)
            if decision.blocked:
                self.decisions[row] = decision
