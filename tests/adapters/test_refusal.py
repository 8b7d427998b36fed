from __future__ import annotations

from typing import Any

import pytest

from mmguard_adapters.refusal import refusal_ids, refusal_text
from mmguard_plugins import Action, Decision, Ruling, Stage, Verdict
from tests.adapters.hf import guarding


def decision(stage: Stage, failed: bool = False) -> Decision:
    verdict = Verdict("Watcher", Action.BLOCK, reason="a guard's internals", failed=failed)
    return Decision(Action.BLOCK, stage, (Ruling(verdict, Action.BLOCK),))


@pytest.mark.parametrize(
    "blocked, text",
    [
        (decision(Stage.INPUT), guarding.INPUT_REFUSAL),
        (decision(Stage.OUTPUT), guarding.OUTPUT_REFUSAL),
        (decision(Stage.OUTPUT, failed=True), guarding.ERROR_REFUSAL),
    ],
)
def test_a_refusal_is_constant_text(blocked: Decision, text: str) -> None:
    assert refusal_text(guarding.engine_of(guarding.Watcher()), blocked) == text


def test_a_refusal_in_ids_is_ended() -> None:
    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False}
        return {"input_ids": [ord(c) for c in text]}

    engine, blocked = guarding.engine_of(guarding.Watcher()), decision(Stage.INPUT)
    expected = [ord(c) for c in guarding.INPUT_REFUSAL]
    assert refusal_ids(engine, blocked, tokenizer) == expected
    assert refusal_ids(engine, blocked, tokenizer, 7) == [*expected, 7]
