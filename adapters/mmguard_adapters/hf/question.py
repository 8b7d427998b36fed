"""Letting a guard ask the guarded model a question of its own.

Only once an answer is whole: some models (Qwen-VL) keep state while they generate, which a question
in between would overwrite. Guards of a growing answer get no `generate`.
"""

from __future__ import annotations

from typing import Any

import torch

from mmguard_adapters.hf.session import Session, trusting
from mmguard_adapters.hf.text import decode
from mmguard_plugins.types import Message, PartKind, Request

MAX_NEW_TOKENS = 64


def ask(session: Session, model: Any, request: Request) -> str:
    """Return the model's greedy answer to `request`, unguarded: the asker is a guard."""
    processor = session.processor
    with trusting(model, processor), torch.inference_mode():
        inputs = _inputs(processor, request).to(model.device)
        inputs = inputs.to(model.dtype)
        ids = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
        )
    prompt = inputs.get("input_ids")
    start = 0 if model.config.is_encoder_decoder or prompt is None else prompt.shape[1]
    return decode(session.tokenizer, ids[0, start:].tolist())


def _inputs(processor: Any, request: Request) -> Any:
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            [_chat_message(message) for message in request.messages],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
    images = [part.data for part in request.images]
    return processor(text=request.text, images=images or None, return_tensors="pt")


def _chat_message(message: Message) -> dict[str, Any]:
    content = [
        {"type": "image", "image": part.data}
        if part.kind is PartKind.IMAGE
        else {"type": "text", "text": part.text}
        for part in message.parts
    ]
    return {"role": message.role, "content": content}
