"""Streaming through a guard: the user's streamer only ever receives text that was released.

transformers calls a streamer before the stopping criteria up to 5.16 or so and after them later,
hence nothing here depends on the order. A streamer made for text is fed through its documented
`on_finalized_text`; any other gets token ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer, TextStreamer

from mmguard_adapters.hf.decisions import Decisions, attach
from mmguard_adapters.hf.provenance import Admission
from mmguard_adapters.hf.session import Session
from mmguard_adapters.hf.text import OPEN, ChannelSplitter, Detokenizer
from mmguard_adapters.refusal import refusal_ids, refusal_text
from mmguard_plugins.errors import AdapterError
from mmguard_plugins.streaming import Delta
from mmguard_plugins.types import Decision


class GuardedStreamer(BaseStreamer):
    """Stands between `generate` and the user's streamer.

    Text is held back until the output guards have seen it. Once `blocked`, what was held is
    dropped, the refusal follows, and `StopWhenBlocked` ends the generation. The user's streamer is
    ended exactly once, whatever happens: `close` does it where `generate` did not.
    """

    def __init__(self, inner: Any, session: Session, admission: Admission) -> None:
        """Wrap `inner` for one answer to an admitted (or refused) request."""
        self._inner = inner
        self._session = session
        self._input = admission.decision
        self._stream = session.engine.open_stream(admission.request)
        self._sink, options = _sink(inner, session)
        self._detokenizer = Detokenizer(session.tokenizer, **options)
        self._channels = ChannelSplitter()
        self._started = False
        self._ended = False
        self.report(Decisions(self._input))

    @property
    def blocked(self) -> bool:
        """Whether the answer was stopped."""
        return self._stream.blocked

    @property
    def decision(self) -> Decision:
        """The strictest decision so far."""
        return self._stream.decision

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one or several tokens at a time."""
        if not self._started:
            self._begin(value)
            return
        for token in value.reshape(-1).tolist():
            if self.blocked:
                return
            text = self._detokenizer.push(token)
            self._sink.token(token, text)
            self._push(text)

    def end(self) -> None:
        """Judge the whole answer, show what is left of it or the refusal, and end."""
        if self._ended:
            return
        if not self.blocked:
            self._push(self._detokenizer.flush(), last=True)
        if not self.blocked:
            self._show(self._stream.finish())
        if self.blocked:
            self._sink.refuse(self.decision)
        else:
            self._sink.rest()
        # Before the end, since whoever reads the stream may ask right after it.
        self.report(Decisions(self._input, self.decision))
        self.close()

    def refuse(self, prompt: torch.Tensor | None) -> None:
        """Show the refusal of a request that never reached the model."""
        if prompt is not None:
            self._sink.prompt(prompt)
        self._sink.refuse(self._input)

    def report(self, decisions: Decisions) -> None:
        """Leave the decisions on the user's streamer."""
        attach(self._inner, (decisions,))

    def close(self) -> None:
        """End the user's streamer, if that is still to be done; held text is dropped."""
        if not self._ended:
            self._ended = True
            self._inner.end()

    def leave(self) -> None:
        """Note that the user's streamer was fed and ended without this one."""
        self._ended = True

    def _begin(self, prompt: torch.Tensor) -> None:
        if prompt.dim() > 1 and len(prompt) > 1:
            raise AdapterError(
                f"{len(prompt)} sequences cannot share a guarded streamer; stream them one by one"
            )
        self._started = True
        text = str(self._session.tokenizer.decode(prompt.reshape(-1)[-16:]))
        self._channels = ChannelSplitter(thinking=text.rstrip().endswith(OPEN))
        self._sink.prompt(prompt)

    def _push(self, text: str, last: bool = False) -> None:
        pieces = [*self._channels.push(text), *(self._channels.flush() if last else ())]
        for piece, channel in pieces:
            if not self.blocked:
                self._show(self._stream.push(piece, channel))

    def _show(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            self._sink.release(delta.text)


class StopWhenBlocked(StoppingCriteria):
    """Ends the generation whose stream was blocked."""

    def __init__(self, streamer: GuardedStreamer) -> None:
        """Watch one stream."""
        self._streamer = streamer

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: Any,  # noqa: ARG002 - the interface
        **kwargs: Any,  # noqa: ARG002
    ) -> Any:
        """Say which rows are done: all or none."""
        blocked = self._streamer.blocked
        return torch.full((len(input_ids),), blocked, dtype=torch.bool, device=input_ids.device)


class TextSink:
    """Feeds a `TextStreamer` or one of its kind with text."""

    def __init__(self, inner: Any, session: Session) -> None:
        """Wrap the user's streamer."""
        self._inner, self._session = inner, session

    def prompt(self, ids: torch.Tensor) -> None:
        """Show the prompt, unless the streamer skips it."""
        if not self._inner.skip_prompt:
            text = self._inner.tokenizer.decode(ids.reshape(-1), **self._inner.decode_kwargs)
            self._inner.on_finalized_text(text)

    def token(self, token: int, text: str) -> None:
        """Ignore tokens: text is what this streamer shows."""

    def release(self, text: str) -> None:
        """Show text."""
        self._inner.on_finalized_text(text)

    def refuse(self, decision: Decision) -> None:
        """Show the refusal in place of what is left."""
        self._inner.on_finalized_text(refusal_text(self._session.engine, decision))

    def rest(self) -> None:
        """Nothing is left: text is shown as it is released."""


class IdSink:
    """Feeds any other `BaseStreamer` with token ids, one at a time.

    A token is shown once all its text is released. From the first redaction on, the ids no longer
    spell what may be shown, and released text is encoded anew.
    """

    def __init__(self, inner: Any, session: Session) -> None:
        """Wrap the user's streamer."""
        self._inner, self._session = inner, session
        self._held: list[tuple[int, str]] = []
        self._pending = ""  # released, but only part of a token
        self._encoding = False

    def prompt(self, ids: torch.Tensor) -> None:
        """Show the prompt."""
        self._inner.put(ids)

    def token(self, token: int, text: str) -> None:
        """Hold a token until its text is released."""
        self._held.append((token, text))

    def release(self, text: str) -> None:
        """Show the tokens that `text` completes."""
        self._pending += text
        if not self._encoding:
            self._show_whole_tokens()
            following = "".join(text for _, text in self._held)
            self._encoding = not following.startswith(self._pending)
        if self._encoding:
            self._show(_encode(self._session, self._pending))
            self._pending = ""

    def refuse(self, decision: Decision) -> None:
        """Show the refusal in place of what is left."""
        self._show(refusal_ids(self._session.engine, decision, self._session.tokenizer))

    def rest(self) -> None:
        """Show tokens without text, such as the one that ends the answer."""
        if not self._encoding:
            self._show([token for token, _ in self._held])

    def _show_whole_tokens(self) -> None:
        silent: list[int] = []  # no text of their own: part of a character, or special
        for i, (token, text) in enumerate(self._held):
            if not text:
                silent.append(token)
            elif self._pending.startswith(text):
                self._pending = self._pending[len(text) :]
                self._show([*silent, token])
                silent = []
            else:
                self._held = self._held[i - len(silent) :]
                return
        self._held = [(token, "") for token in silent]

    def _show(self, ids: Iterable[int]) -> None:
        for token in ids:
            self._inner.put(torch.tensor([token]))


def _sink(inner: Any, session: Session) -> tuple[TextSink | IdSink, dict[str, Any]]:
    """Choose how to feed a streamer, and how its tokens become text."""
    feeds_text = (
        isinstance(inner, TextStreamer)
        and type(inner).put is TextStreamer.put
        and type(inner).end is TextStreamer.end
    )
    if feeds_text:
        return TextSink(inner, session), dict(inner.decode_kwargs)
    return IdSink(inner, session), {"skip_special_tokens": True}


def _encode(session: Session, text: str) -> list[int]:
    return [int(i) for i in session.tokenizer(text, add_special_tokens=False)["input_ids"]]
