"""Chats without a picture, answered by the language model before training, which keep it chatty."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mmguard_trainers import checkpoints, packages
from mmguard_trainers.reference_vlm_data import Turn
from mmguard_trainers.reference_vlm_drawing import WORDS
from mmguard_trainers.reference_vlm_model import MARKS, move

_COUNTRIES = (
    "France", "Germany", "Italy", "Spain", "Japan", "China", "India", "Egypt", "Canada", "Brazil",
    "Russia", "England", "Greece", "Norway", "Mexico", "Turkey", "Kenya", "Peru", "Poland",
    "Australia",
)  # fmt: skip
_TOPICS = (
    "cats", "dogs", "the sea", "rain", "winter", "summer", "music", "bread", "coffee", "football",
    "a horse", "a ship", "an airplane", "a truck", "cars", "birds", "frogs", "the moon", "the sun",
    "trees", "mountains", "rivers", "books", "school", "friendship", "happiness", "computers",
    "robots", "the internet", "history", "science", "water", "fire", "a garden", "the weather",
    "painting", "dancing", "cooking", "sleep", "time", "apples", "cheese", "bicycles", "trains",
    "the city", "the forest", "children", "doctors", "teachers", "safety",
)  # fmt: skip
_ASKS = (
    "Write one sentence about {}.",
    "Tell me something about {}.",
    "Write a short poem about {}.",
    "Give me three words about {}.",
    "Why do people like {}?",
    "What is special about {}?",
)
_SMALL_TALK = (
    "Hello!", "Hi, how are you?", "Who are you?", "What can you do?", "Thank you!", "Good morning!",
    "Tell me a joke.", "What day is it today?", "Can you help me?", "What is your name?",
    "Name three colors.", "Name three animals.", "Count from one to five.", "List two fruits.",
    "What color is the sky?", "What color is grass?", "How many legs does a dog have?",
    "How many days are in a week?", "What is the opposite of hot?", "What is the opposite of big?",
    "Translate 'good morning' into French.", "Who wrote Romeo and Juliet?", "What is a haiku?",
    "How do I boil an egg?", "How do I bake bread?", "What is photosynthesis?", "What is gravity?",
    "What is the largest planet?", "What is the fastest animal?", "Who painted the Mona Lisa?",
    "Give me a tip for learning.", "How do I stay healthy?", "Is the earth round?",
    "What is the tallest mountain?", "What language do people speak in Brazil?",
)  # fmt: skip


def distil_chats(
    tokenizer: PreTrainedTokenizerBase, scratch: Path, device: torch.device, seed: int
) -> list[Turn]:
    """Let the language model answer `chat_prompts` as it does before training; add echoes.

    Learning its own answers beside the pictures is what keeps it able to chat.
    """
    path = scratch / "chats.json"
    if not path.exists():
        model = packages.smollm2(MARKS)[0].eval()
        move(model, device)
        move(model, torch.bfloat16)
        turns: list[tuple[str, str]] = []
        prompts = chat_prompts()
        for start in tqdm(range(0, len(prompts), 32), desc="chats"):
            asked = prompts[start : start + 32]
            turns += zip(asked, _answers(model, tokenizer, asked), strict=True)
        checkpoints.write(json.dumps(turns), path)
    own = [Turn(*pair) for pair in json.loads(path.read_text()) if pair[1]]
    return own + echoes(len(own), random.Random(seed))


def chat_prompts() -> list[str]:
    """Return short instructions without a picture, for the base model to answer itself."""
    prompts = [f"What is the capital of {country}?" for country in _COUNTRIES]
    prompts += [ask.format(topic) for topic in _TOPICS for ask in _ASKS]
    prompts += [f"What is {a} plus {b}?" for a in range(1, 10) for b in (2, 5)]
    return prompts + list(_SMALL_TALK)


def echoes(n_echoes: int, rng: random.Random) -> list[Turn]:
    """Return instructions to repeat random words, which the base model is bad at, and answers."""
    asked = []
    for _ in range(n_echoes):
        said = " ".join(rng.sample(WORDS, rng.randint(1, 5)))
        said = rng.choice((said, said.capitalize() + "."))
        form = rng.choice(("Repeat after me: {}", "Repeat this: {}", 'Say "{}"', "Echo: {}"))
        asked.append(Turn(form.format(said), said))
    return asked


@torch.inference_mode()
def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[str]
) -> list[str]:
    """Answer each of `asked` greedily, whole sentences of at most 72 tokens."""
    chats = [[{"role": "user", "content": question}] for question in asked]
    tokenizer.padding_side = "left"  # so that every answer starts where its prompt ends
    batch: Any = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    inputs = batch.to(model.device)
    generate: Any = model.generate
    out: Tensor = generate(**inputs, max_new_tokens=72, do_sample=False)
    texts = []
    for row in out[:, inputs["input_ids"].shape[1] :]:
        text = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
        if tokenizer.eos_token_id not in row.tolist():
            text = text[: max(text.rfind(end) for end in ".!?") + 1]
        texts.append(text)
    return texts
