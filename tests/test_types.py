"""Requests, responses and decisions as values."""

from __future__ import annotations

import pytest

from mmguard_plugins import Message, Part, PartKind, Request, Response
from mmguard_plugins.types import Channel, Redaction, redact


def text(*pieces: str, role: str = "user") -> Message:
    return Message(role, tuple(Part(PartKind.TEXT, text=piece) for piece in pieces))


def test_a_request_of_text_and_images_is_one_user_turn() -> None:
    request = Request("hi", images=[b"one", b"two"])
    assert [message.role for message in request.messages] == ["user"]
    assert [part.source for part in request.parts] == [
        "messages[0].content[0]",
        "messages[0].content[1]",
        "messages[0].content[2]",
    ]
    assert [image.data for image in request.images] == [b"one", b"two"]
    assert request.text == "hi"


@pytest.mark.parametrize(
    "messages",
    [
        [text("for", "bidden")],
        [text("for"), text("bidden")],
        [text("x"), text("reply", role="assistant"), text("forbidden")],
        [text("forbidden"), text("reply", role="assistant"), text("x")],
        [text("forbidden", role="system"), text("x")],
        [text("x"), text("forbidden", role="tool")],
        [text("x"), text("for", "bidden", role="tool")],
    ],
)
def test_matching_text_holds_every_turn_and_joins_what_was_split(messages: list[Message]) -> None:
    assert "forbidden" in Request(messages=messages).text


def test_matching_text_does_not_glue_different_roles() -> None:
    messages = [text("for"), text("bidden", role="assistant")]
    assert "forbidden" not in Request(messages=messages).text


def test_tool_definitions_are_parts() -> None:
    request = Request("hi", tools=["forbidden tool"])
    assert "forbidden tool" in request.text
    assert request.parts[0].source == "tools[0]"


def test_a_growing_response_offers_the_channel_that_grew() -> None:
    growing = Response("answer", "thought", finished=False, channel=Channel.ANSWER, cleared=3)
    assert list(growing.unread()) == [("answer", 3)]
    whole = Response("answer", "thought")
    assert list(whole.unread()) == [("thought", 0), ("answer", 0)]
    assert whole.text == "thought\nanswer"


def test_redaction_prefers_the_longest_text() -> None:
    redactions = [Redaction("bob", "1"), Redaction("bobby", "2")]
    assert redact("bobby and bob", redactions) == "2 and 1"
