"""How a stream ends: once, and without reading on after a block."""

from __future__ import annotations

from collections.abc import Iterator

from mmguard_plugins import Engine, Request

CONFIG = {
    "version": 1,
    "guards": [{"use": "banned_text", "options": {"phrases": ["bad word"]}}],
    "stream": {"check_every_tokens": 1},
}


def test_a_stream_finishes_once() -> None:
    stream = Engine.from_config(CONFIG).open_stream(Request("hi"))
    stream.push("good")
    assert "".join(delta.text for delta in stream.finish()) == ""
    checks = stream.checks
    assert stream.finish() == []
    assert stream.checks == checks


def test_a_blocked_stream_stops_reading_and_ends_with_the_refusal() -> None:
    read: list[str] = []

    def tokens() -> Iterator[str]:
        for token in ["so ", "bad ", "word ", "and ", "more"]:
            read.append(token)
            yield token

    stream = Engine.from_config(CONFIG).open_stream(Request("hi"))
    out = list(stream.filter(tokens()))
    assert out == ["so ", stream.refusal]
    assert read == ["so ", "bad ", "word "]
    assert stream.finish() == []
