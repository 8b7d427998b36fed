"""OpenAI-shaped messages become parts, all of them."""

from __future__ import annotations

from typing import Any

import pytest

from mmguard_plugins.chat import request_from_chat, response_from_chat
from mmguard_plugins.types import PartKind


def kinds(content: Any) -> list[PartKind]:
    request = request_from_chat([{"role": "user", "content": content}])
    return [part.kind for part in request.parts]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("hi", [PartKind.TEXT]),
        ([{"type": "text", "text": "hi"}, "there"], [PartKind.TEXT, PartKind.TEXT]),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], [PartKind.IMAGE]),
        ([{"type": "input_image", "image_url": "data:"}], [PartKind.IMAGE]),
        ([{"type": "image", "image": object()}], [PartKind.IMAGE]),
        ([{"type": "image", "source": {"type": "base64", "data": "eA=="}}], [PartKind.IMAGE]),
        ([{"type": "input_audio", "input_audio": {}}], [PartKind.AUDIO]),
        ([{"type": "video", "video": "x"}], [PartKind.VIDEO]),
        ([{"type": "file", "file": {}}], [PartKind.FILE]),
        ([{"type": "smell"}], [PartKind.UNKNOWN]),
        ([{"text": "no type"}], [PartKind.UNKNOWN]),
        ([{"type": "text"}], [PartKind.UNKNOWN]),
        ([7], [PartKind.UNKNOWN]),
        (7, [PartKind.UNKNOWN]),
        (None, []),
    ],
)
def test_every_shape_of_content_becomes_parts(content: Any, expected: list[PartKind]) -> None:
    assert kinds(content) == expected


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"function": {"arguments": '{"q": "forbidden"}'}}]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"arguments": '{"q":"\\u0066orbidden"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "forbidden"}]},
        {"role": "user", "content": [{"type": "tool_result", "content": "forbidden"}]},
        {"role": "user", "content": [{"type": "tool_use", "input": {"q": "forbidden"}}]},
        {"role": "assistant", "reasoning_content": "forbidden"},
        {"role": "user", "name": "forbidden", "content": "x"},
        {"role": "developer", "content": "forbidden"},
        {"role": "user", "content": "x", "a_field_of_tomorrow": {"deep": ["forbidden"]}},
    ],
)
def test_text_anywhere_in_a_message_is_seen(message: dict[str, Any]) -> None:
    assert "forbidden" in request_from_chat([message]).text


def test_an_image_in_a_tool_result_is_an_image() -> None:
    result = {"type": "tool_result", "content": [{"type": "image_url", "image_url": "data:"}]}
    request = request_from_chat([{"role": "user", "content": [result]}])
    assert [part.kind for part in request.parts] == [PartKind.IMAGE]
    assert request.parts[0].source == "messages[0].content[0].content[0]"


def test_tool_definitions_are_seen() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "forbidden"}}
    assert "forbidden" in request_from_chat([{"role": "user", "content": "x"}], [tool]).text


@pytest.mark.parametrize("messages", [[], "hi", None, [{}], [{"role": 1}], ["hi"]])
def test_what_is_no_conversation_is_an_error(messages: Any) -> None:
    with pytest.raises(ValueError, match=r"messages|role"):
        request_from_chat(messages)


def test_a_response_is_text_or_a_message() -> None:
    assert response_from_chat("hi").answer == "hi"
    response = response_from_chat(
        {
            "content": [{"type": "text", "text": "a"}],
            "reasoning_content": "r",
            "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "t"}'}}],
        }
    )
    assert (response.answer, response.reasoning) == ("a", "r")
    assert "t" in response.tool_calls.splitlines()
    with pytest.raises(ValueError, match="response must be"):
        response_from_chat(7)
