"""What a client sees in place of blocked content. No other module builds it.

It is constant text from the configuration, so it can carry neither a guard's internals nor anything
a user or a model wrote.
"""

from __future__ import annotations

from typing import Any

from mmguard_plugins.engine import Engine
from mmguard_plugins.types import Decision


def refusal_text(engine: Engine, decision: Decision) -> str:
    """Return the configured constant for a blocked stage."""
    return engine.refusal(decision)


def refusal_ids(
    engine: Engine, decision: Decision, tokenizer: Any, eos_token_id: int | None = None
) -> list[int]:
    """Return the refusal as token ids, ended by `eos_token_id` where there is one."""
    ids = tokenizer(refusal_text(engine, decision), add_special_tokens=False)["input_ids"]
    return [*map(int, ids), *([] if eos_token_id is None else [eos_token_id])]
