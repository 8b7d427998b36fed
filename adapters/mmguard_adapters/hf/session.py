"""What a guarded model, its processor and its pipeline share."""

from __future__ import annotations

import contextvars
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from mmguard_adapters.hf.conversation import Conversation
from mmguard_adapters.hf.decisions import Decisions
from mmguard_adapters.hf.provenance import Provenance
from mmguard_plugins.engine import Engine

OnDecision = Callable[[Decisions], None]

MAX_TEMPLATED = 512

# Objects whose calls are part of a call that is guarded already: the assistant of assisted
# decoding, or the model while it answers a guard's own question.
_trusted: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar(
    "mmguard_trusted", default=frozenset()
)
# Where a pipeline gathers the decisions of the `generate` call it makes.
_collected: contextvars.ContextVar[list[Decisions] | None] = contextvars.ContextVar(
    "mmguard_collected", default=None
)


class Session:
    """The engine and the memory of one guarded model.

    Thread-safe: calls on several threads share nothing but the memory of what was checked.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Any,
        image_token: int | None,
        *,
        raise_on_block: bool = False,
        stop_early: bool = False,
        on_decision: OnDecision | None = None,
    ) -> None:
        """Take what `guard` was given."""
        self.engine = engine
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.raise_on_block = raise_on_block
        self.stop_early = stop_early
        self.on_decision = on_decision
        self.provenance = Provenance(image_token, self.tokenizer.pad_token_id)
        self.owner: Any = None  # a weak reference to the model that `guard` was called with
        self._templated: OrderedDict[bytes, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def report(self, decisions: Sequence[Decisions]) -> None:
        """Tell the pipeline at work and the caller's `on_decision` about every sequence."""
        collected = _collected.get()
        if collected is not None:
            collected += decisions
        if self.on_decision is not None:
            for decision in decisions:
                self.on_decision(decision)

    def remember_prompt(self, prompt: str, conversation: Conversation) -> None:
        """Remember the chat a prompt was rendered from, for a later call of the processor."""
        with self._lock:
            self._templated[_key(prompt)] = conversation
            while len(self._templated) > MAX_TEMPLATED:
                self._templated.popitem(last=False)

    def chat_of(self, prompt: str) -> Conversation | None:
        """Return the chat that rendered to exactly this prompt, if it is still known."""
        with self._lock:
            return self._templated.get(_key(prompt))


def trusts(instance: Any) -> bool:
    """Whether the call at hand is part of one that is guarded already."""
    return id(instance) in _trusted.get()


@contextmanager
def trusting(*instances: Any) -> Generator[None]:
    """Let calls of these objects through, on this thread only."""
    trusted = _trusted.get() | {id(i) for i in instances if i is not None}
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


@contextmanager
def collecting() -> Generator[list[Decisions]]:
    """Gather the decisions of the `generate` calls made meanwhile on this thread."""
    collected: list[Decisions] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def _key(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
