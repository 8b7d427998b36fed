"""Turning generated ids into text: whole, or token by token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmguard_plugins.types import Channel, Response

OPEN, CLOSE = "<think>", "</think>"
_THOUGHT = re.compile(rf"\s*(?:{OPEN})?(.*?){CLOSE}(.*)", re.DOTALL)
_BROKEN = "\ufffd"  # the beginning of a character whose other bytes are in the next tokens
_MAX_PENDING = 8


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of `ids` without special tokens, exactly as the ids spell it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def as_response(text: str, finished: bool = True) -> Response:
    """Split a text into reasoning (up to `</think>`) and answer."""
    found = _THOUGHT.fullmatch(text)
    if found:
        return Response(answer=found[2].lstrip(), reasoning=found[1], finished=finished)
    if text.lstrip().startswith(OPEN):
        thought = text.lstrip().removeprefix(OPEN)
        return Response(reasoning=thought, finished=finished, channel=Channel.REASONING)
    return Response(answer=text, finished=finished)


class Detokenizer:
    """Gives each token the text it adds; characters cut in two come with their last byte."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        """Take the options of `tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._options = options
        self._ids: list[int] = []
        self._start = 0  # decoding starts here, for tokenizers that treat a first token differently
        self._read = 0  # ids before this one have been given out

    def push(self, token: int) -> str:
        """Return the text that is certain now that `token` has come."""
        self._ids.append(token)
        text = self._new()
        pending = len(self._ids) - self._read
        if not text or (text.endswith(_BROKEN) and pending < _MAX_PENDING):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """Return what is left, with a mark for broken characters."""
        return self._give(self._new())

    def _new(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _give(self, text: str) -> str:
        self._start, self._read = self._read, len(self._ids)
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, **self._options)) if ids else ""


class ChannelSplitter:
    """Says which channel a growing text is in; a `<think>` opens reasoning, `</think>` ends it."""

    def __init__(self, thinking: bool = False) -> None:
        """`thinking` says that the prompt has opened the reasoning already."""
        self._thinking: bool | None = True if thinking else None
        self._text = ""

    def push(self, text: str) -> Iterator[tuple[str, Channel]]:
        """Yield `text` in pieces, each with its channel; a piece may be held for the next call."""
        self._text += text
        if self._thinking is None:
            start = self._text.lstrip()
            if OPEN.startswith(start) and start != OPEN:
                return  # too short to say
            self._thinking = start.startswith(OPEN)
        if not self._thinking:
            yield from self._out(self._text, Channel.ANSWER)
            return
        end = self._text.find(CLOSE)
        if end >= 0:
            end += len(CLOSE)
            thought, rest = self._text[:end], self._text[end:]
            self._thinking = False
            yield thought, Channel.REASONING
            yield from self._out(rest, Channel.ANSWER)
            return
        held = next(n for n in range(len(CLOSE) - 1, -1, -1) if self._text.endswith(CLOSE[:n]))
        keep = self._text[len(self._text) - held :]
        yield from self._out(self._text[: len(self._text) - held], Channel.REASONING)
        self._text = keep

    def flush(self) -> Iterator[tuple[str, Channel]]:
        """Yield what was held."""
        channel = Channel.REASONING if self._thinking else Channel.ANSWER
        yield from self._out(self._text, channel)

    def _out(self, text: str, channel: Channel) -> Iterator[tuple[str, Channel]]:
        self._text = ""
        if text:
            yield text, channel
