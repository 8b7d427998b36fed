"""Guarding a processor: raw text, images and chats are judged here, before they become tensors.

A processor returns tensors and nothing else, so a blocked row looks like any other until `generate`
gets it. Text that a guard redacts is replaced before it is tokenized. Of a chat template's input,
messages, tools and documents are judged; its other variables are the caller's own, as the template
itself is.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mmguard_adapters.hf import images as pictures
from mmguard_adapters.hf.conversation import (
    Conversation,
    chat_request,
    conversations,
    readable,
    text_request,
)
from mmguard_adapters.hf.provenance import Admission
from mmguard_adapters.hf.session import Session, trusts
from mmguard_plugins.types import Action, Part, PartKind, Request, redact

# Further arguments whose text reaches the model, in some family or other.
_MORE_TEXT = ("text_pair", "suffix", "text_target", "text_pair_target")
_MEDIA = {"videos": PartKind.VIDEO, "audio": PartKind.AUDIO, "audios": PartKind.AUDIO}

# The chats that `apply_chat_template` is about to tokenize: it calls the processor for that.
_chats: contextvars.ContextVar[list[Conversation] | None] = contextvars.ContextVar(
    "mmguard_chats", default=None
)


def methods(session: Session) -> dict[str, Callable[..., Any]]:
    """Return the methods that guard a processor."""

    def call(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
        if trusts(processor):
            return original(*args, **kwargs)
        arguments = bind(original, args, kwargs)
        prepared = _Prepared(session, processor, arguments)
        output = original(**prepared.arguments)
        session.provenance.remember(_as_tensors(output), prepared.admissions)
        return output

    def apply_chat_template(
        original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if trusts(processor):
            return original(*args, **kwargs)
        arguments = bind(original, args, kwargs)
        extras = [*(arguments.get("tools") or ()), *(arguments.get("documents") or ())]
        # The first parameter; its name differs between processors.
        chat = next(iter(arguments.values()))
        chats = conversations(chat, tuple(readable(extra) for extra in extras))
        token = _chats.set(chats)
        try:
            output = original(*args, **kwargs)
        finally:
            _chats.reset(token)
        prompts = [output] if isinstance(output, str) else output
        if isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts):
            for prompt, conversation in zip(prompts, chats, strict=False):
                session.remember_prompt(prompt, conversation)
        return output

    return {"__call__": call, "apply_chat_template": apply_chat_template}


def bind(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a call's arguments by name, those for `**kwargs` among them."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


class _Prepared:
    """The arguments of a processor call, judged, with images loaded and text redacted."""

    def __init__(self, session: Session, processor: Any, arguments: dict[str, Any]) -> None:
        text = arguments.get("text")
        texts = [] if text is None else [text] if isinstance(text, str) else list(text)
        texts = [t if isinstance(t, str) else " ".join(map(str, t)) for t in texts]
        limits, images = session.engine.config.limits, arguments.get("images")
        loaded = pictures.load_all(images, limits)
        grouped = pictures.by_row(
            pictures.like(images, iter(loaded)), texts, list(_placeholders(processor))
        )
        more = _more(arguments)
        chats = _chats.get()
        requests = [
            _request(
                session,
                texts[row] if row < len(texts) else None,
                chats[row] if chats is not None and len(chats) == len(texts) else None,
                [image.part for image in row_images],
                more,
            )
            for row, row_images in enumerate(grouped)
        ]
        self.arguments = dict(arguments)
        self.admissions: list[Admission] = []
        for row, request in enumerate(requests):
            admission = Admission(request, session.engine.check_input(request))
            if admission.decision.action is Action.REDACT:
                admission, texts = _redacted(session, admission, texts, row)
            self.admissions.append(admission)
        if loaded:
            self.arguments["images"] = pictures.like(images, (image.data for image in loaded))
        if any(a.decision.action is Action.REDACT for a in self.admissions):
            self.arguments["text"] = texts[0] if isinstance(text, str) else texts


def _request(
    session: Session,
    text: str | None,
    chat: Conversation | None,
    images: Sequence[Part],
    more: tuple[list[str], list[Part]],
) -> Request:
    if chat is None and text is not None:
        chat = session.chat_of(text)
    texts, others = more
    if chat is not None:
        return chat_request(replace(chat, extras=(*chat.extras, *texts)), images, others)
    return text_request([*([] if text is None else [text]), *texts], images, others)


def _redacted(
    session: Session, admission: Admission, texts: list[str], row: int
) -> tuple[Admission, list[str]]:
    """Redact one row's prompt; block where the template has made the text unrecognisable."""
    request, decision = admission.request, admission.decision
    if not all(r.text in texts[row] for r in decision.redactions):
        reason = "text to redact is not in the prompt as it stands in the request"
        blocked = replace(decision, action=Action.BLOCK, reason=reason)
        return Admission(request, blocked), texts
    texts = [*texts[:row], redact(texts[row], decision.redactions), *texts[row + 1 :]]
    return Admission(session.engine.redact_request(request, decision), decision), texts


def _more(arguments: Mapping[str, Any]) -> tuple[list[str], list[Part]]:
    """Return what else is in the call: more text, and media that the engine may not let pass."""
    texts: list[str] = []
    for key in _MORE_TEXT:
        value = arguments.get(key)
        if value is not None:
            texts += [value] if isinstance(value, str) else [str(v) for v in value]
    others = [
        Part(kind, source=key) for key, kind in _MEDIA.items() if arguments.get(key) is not None
    ]
    return texts, others


def _placeholders(processor: Any) -> Iterator[str]:
    """Yield the texts that may stand for one image in a prompt."""
    for name in ("boi_token", "image_token", "start_image_token"):
        for owner in (processor, getattr(processor, "tokenizer", None)):
            token = getattr(owner, name, None)
            if isinstance(token, str) and token:
                yield token


def _as_tensors(output: Any) -> dict[str, Any]:
    """Return the processor's output with lists and arrays as the tensors they will become."""
    converted: dict[str, Any] = {}
    for key, value in output.items():
        if isinstance(value, torch.Tensor):
            converted[key] = value
            continue
        try:
            tensor = _tensor(value)
        except (TypeError, ValueError, RuntimeError):
            continue  # ragged: not known again later, hence checked again then
        is_row = key in ("input_ids", "attention_mask") and tensor.dim() == 1
        converted[key] = tensor[None] if is_row else tensor
    return converted


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return torch.stack(value)
    return torch.as_tensor(np.asarray(value))
