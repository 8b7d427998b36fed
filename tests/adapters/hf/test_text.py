"""Ids to text, whole and token by token."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from mmguard_adapters.hf.text import ChannelSplitter, Detokenizer, as_response, decode
from mmguard_plugins import Channel
from tests import tiny

TEXTS = ["what is this ?", "Ärger 漢字 🙂 👩‍👩‍👧 x", "  two  spaces\n\nand lines ", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_add_up_to_the_text(text: str) -> None:
    tokenizer = tiny.make_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer(text)["input_ids"]
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == text == decode(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_characters_are_not_held_for_ever() -> None:
    tokenizer = tiny.make_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    half = tokenizer("漢")["input_ids"][0]
    assert any(detokenizer.push(half) for _ in range(20))


@pytest.mark.parametrize(
    "text, reasoning, answer",
    [
        ("plain", "", "plain"),
        ("<think> a </think>\n\nb", " a ", "b"),
        ("a </think> b", "a ", "b"),  # the prompt opened it
        ("\n<think> never ends", " never ends", ""),
        ("b <think> later", "", "b <think> later"),
    ],
)
def test_reasoning_is_split_from_the_answer(text: str, reasoning: str, answer: str) -> None:
    response = as_response(text)
    assert (response.reasoning, response.answer) == (reasoning, answer)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    "text, thinking, channels",
    [
        ("plain <b", False, [("plain <b", Channel.ANSWER)]),
        (
            " <think>a < b</think> c",
            False,
            [(" <think>a < b</think>", Channel.REASONING), (" c", Channel.ANSWER)],
        ),
        ("a</think>b", True, [("a</think>", Channel.REASONING), ("b", Channel.ANSWER)]),
        ("<think>a</thi", False, [("<think>a</thi", Channel.REASONING)]),
        ("<thin", False, [("<thin", Channel.ANSWER)]),
    ],
)
def test_a_stream_is_split_into_channels(
    text: str, thinking: bool, channels: list[tuple[str, Channel]], size: int
) -> None:
    splitter = ChannelSplitter(thinking)
    found: list[tuple[str, Channel]] = []
    for start in range(0, len(text), size):
        found += splitter.push(text[start : start + size])
    found += splitter.flush()
    joined: list[tuple[str, Channel]] = []
    for piece, channel in found:
        if joined and joined[-1][1] is channel:
            joined[-1] = (joined[-1][0] + piece, channel)
        else:
            joined.append((piece, channel))
    assert joined == channels
