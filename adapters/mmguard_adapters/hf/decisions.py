"""How a caller reaches the decisions behind a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmguard_plugins.errors import AdapterError
from mmguard_plugins.types import Decision

ATTRIBUTE = "mmguard"


@dataclass(frozen=True, slots=True)
class Decisions:
    """What was decided about one returned sequence; `output` is None when nothing was generated."""

    input: Decision
    output: Decision | None = None

    @property
    def last(self) -> Decision:
        """The decision that settled what the client reads."""
        return self.output or self.input

    @property
    def blocked(self) -> bool:
        """Whether the text of this sequence is a refusal."""
        return self.last.blocked

    def to_dict(self) -> dict[str, Any]:
        """Return both decisions as JSON-ready values; see `Decision.to_dict`."""
        return {
            "input": self.input.to_dict(),
            "output": self.output.to_dict() if self.output else None,
        }


class GuardedRecord(dict[str, Any]):
    """A pipeline's record: equal to the plain dict, with the decisions as an attribute."""

    mmguard: tuple[Decisions, ...]


def attach(result: Any, decisions: tuple[Decisions, ...]) -> None:
    """Leave the decisions on a result, one for each sequence."""
    setattr(result, ATTRIBUTE, decisions)
    sequences = getattr(result, "sequences", None)
    if sequences is not None:
        setattr(sequences, ATTRIBUTE, decisions)


def decision_of(result: Any, row: int = 0) -> Decisions:
    """Return the decisions behind one sequence of a result.

    `result` is what a guarded `generate` or pipeline returned (tensor, generate output, record,
    list of records), or the streamer that was passed in, once it has ended. A tensor made from the
    result (a slice, another device) does not carry them.
    """
    if isinstance(result, list) and result:
        return decision_of(result[row])
    found: tuple[Decisions, ...] | None = getattr(result, ATTRIBUTE, None)
    if found is None:
        raise AdapterError(
            f"this {type(result).__name__} carries no decision; pass the very object that a guarded"
            " generate or pipeline returned"
        )
    return found[row]
