"""What stands in a chat becomes text to judge, however it is wrapped."""

from __future__ import annotations

from typing import Any

import pytest

from mmguard_adapters.hf.conversation import chat_request, conversations, readable


def forbidden() -> None:
    """Do a forbidden thing."""


@pytest.mark.parametrize(
    "message",
    [
        {
            "role": "assistant",
            "tool_calls": [{"function": {"arguments": {"q": "forbidden\nthing"}}}],
        },
        {
            "role": "assistant",
            "tool_calls": [{"function": {"arguments": '{"q": "forbidden\\nthing"}'}}],
        },
        {"role": "assistant", "reasoning_content": "forbidden\nthing"},
        {"role": "tool", "content": [{"type": "text", "text": "forbidden\nthing"}]},
    ],
)
def test_no_wrapping_hides_a_word_or_a_line_break(message: dict[str, Any]) -> None:
    assert "forbidden\nthing" in chat_request(conversations([message], ())[0], []).text


def test_a_python_function_as_tool_is_read_by_name_and_docstring() -> None:
    assert readable(forbidden) == "forbidden: Do a forbidden thing."
