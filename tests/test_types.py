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


@pytest.mark.parametrize(
    "text, redactions, expected",
    [
        ("bobby and bob", {"bob": "1", "bobby": "2"}, "1 and 1"),
        ("abcd", {"ab": "[x]", "bcd": "[x]"}, "[x]"),
        ("bad red", {"bad": "[red]", "red": "[red]"}, "[red] [red]"),
        ("a.b axb", {"a.b": "-"}, "- axb"),
    ],
)
def test_redaction_leaves_no_rest(text: str, redactions: dict[str, str], expected: str) -> None:
    assert redact(text, [Redaction(*pair) for pair in redactions.items()]) == expected
