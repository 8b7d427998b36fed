"""Turning what users hand to transformers into `Request`s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmguard_plugins.chat import words_of
from mmguard_plugins.types import Message, Part, PartKind, Request

Chat = Sequence[Mapping[str, Any]]

_KINDS = {
    "text": PartKind.TEXT,
    "image": PartKind.IMAGE,
    "image_url": PartKind.IMAGE,
    "audio": PartKind.AUDIO,
    "input_audio": PartKind.AUDIO,
    "video": PartKind.VIDEO,
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat before templating, with what else the template writes into the prompt.

    Its images are empty parts: transformers takes them out of the chat and loads them.
    """

    messages: tuple[Message, ...]
    extras: tuple[str, ...] = ()  # the words of tool definitions and documents


def conversations(chats: Any, extras: tuple[str, ...]) -> list[Conversation]:
    """Return one conversation for each row of what `apply_chat_template` was given."""
    if hasattr(chats, "messages"):
        chats = chats.messages
    first = chats[0] if len(chats) else None
    batched = isinstance(first, list | tuple) or hasattr(first, "messages")
    return [
        Conversation(tuple(_messages(getattr(chat, "messages", chat))), extras)
        for chat in (chats if batched else [chats])
    ]


def readable(value: Any) -> str:
    """Return the words in whatever a template may print; a tool may be a Python function."""
    if callable(value):
        return f"{getattr(value, '__name__', '')}: {getattr(value, '__doc__', '')}"
    return words_of(value)


def chat_request(
    conversation: Conversation, images: Sequence[Part], others: Sequence[Part] = ()
) -> Request:
    """Build the request of a chat; `images` are its loaded images in order.

    Images that no turn mentions, and `others` (video, audio), go to the last turn.
    """
    left = iter(images)
    turns = [Message(turn.role, tuple(_filled(turn.parts, left))) for turn in conversation.messages]
    rest = [
        replace(part, source=f"images[{n}]") if part.kind is PartKind.IMAGE else part
        for n, part in enumerate([*left, *others])
    ]
    if rest:
        last = turns.pop() if turns else Message("user")
        turns.append(Message(last.role, (*last.parts, *rest)))
    return Request(messages=turns, tools=conversation.extras)


def text_request(
    texts: Sequence[str], images: Sequence[Part], others: Sequence[Part] = ()
) -> Request:
    """Build the request of a prompt that was not a chat: one user turn."""
    parts = [replace(part, source=f"images[{i}]") for i, part in enumerate(images)]
    parts += others
    parts += [
        Part(PartKind.TEXT, text=text, source=f"text[{i}]" if i else "text")
        for i, text in enumerate(texts)
    ]
    return Request(messages=[Message("user", tuple(parts))])


def _filled(parts: Sequence[Part], images: Iterator[Part]) -> Iterator[Part]:
    """Yield the parts with the next images; a place without an image shows the model nothing."""
    for part in parts:
        if part.kind is not PartKind.IMAGE:
            yield part
        elif image := next(images, None):
            yield replace(image, source=part.source)


def _messages(chat: Chat) -> Iterator[Message]:
    for i, message in enumerate(chat):
        parts = tuple(_parts(message, f"messages[{i}]"))
        yield Message(str(message.get("role", "user")), parts)


def _parts(message: Mapping[str, Any], where: str) -> Iterator[Part]:
    content = message.get("content")
    blocks = [content] if isinstance(content, str | Mapping) else list(content or ())
    for i, block in enumerate(blocks):
        source = f"{where}.content[{i}]"
        if isinstance(block, str):
            yield Part(PartKind.TEXT, text=block, source=source)
            continue
        kind = _KINDS.get(str(block.get("type")), PartKind.UNKNOWN)
        if kind is PartKind.TEXT:
            yield Part(kind, text=str(block.get("text", "")), source=source)
        else:
            text = readable(block) if kind is PartKind.UNKNOWN else ""
            yield Part(kind, text=text, source=source)
    for key, value in message.items():
        if key not in ("role", "content") and value:
            yield Part(PartKind.TEXT, text=readable(value), source=f"{where}.{key}")
