"""One harness for guards and baselines: the same sets, the same figures, one table."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mmguard_plugins.errors import MMGuardError
from mmguard_trainers.evaluation import metrics
from mmguard_trainers.evaluation.baselines import (
    NOT_INSTALLABLE,
    CloneGuard,
    GuardJudge,
    Judge,
    Outcome,
    Toxicity,
    minilm_regressions,
    outcome_of,
)
from mmguard_trainers.evaluation.metrics import Proportion
from mmguard_trainers.evaluation.sets import Kind, LabelledSet

JudgeOf = Callable[[Kind], Judge]

_PACKAGES = ("mmguard-plugins", "numpy", "scikit-learn", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True)
class Figures:
    """What one judge does on one set; None where the set holds no row to measure it on.

    `tpr` and `fpr` are those of the judge's own action: what a guard really blocks, what a packaged
    classifier calls unsafe at its own threshold.
    """

    set: str
    kind: Kind
    judge: str
    n: int
    n_unsafe: int
    auroc: float | None = None
    interval: tuple[float, float] | None = None
    average_precision: float | None = None
    f1: dict[str, float] | None = None
    tpr: Proportion | None = None
    fpr: Proportion | None = None
    failed: int = 0
    trained_on: bool = False
    note: str = ""


def evaluate(
    judges: Sequence[JudgeOf], labelled: Iterable[LabelledSet], seed: int = 0, resamples: int = 1000
) -> list[Figures]:
    """Measure every judge on every set, with 95 % bootstrap intervals; sets are read one by one.

    A judge comes as a function of the kind of set, since a baseline may be fitted for each. One
    that cannot read a set (pictures, for a text classifier) has a row that says so.
    """
    return [
        _figures(judge_of(chosen.kind), chosen, seed, resamples)
        for chosen in labelled
        for judge_of in judges
    ]


def always(judge: Judge) -> JudgeOf:
    """Return `judge` for sets of every kind."""
    return lambda _kind: judge


def baselines(data: Path | None, cache: Path, seed: int = 0) -> tuple[list[JudgeOf], list[str]]:
    """Return the baselines that are at hand, and a line for each that is not, with the reason."""
    found: list[JudgeOf] = []
    absent = [f"{name}: {reason}" for name, reason in NOT_INSTALLABLE.items()]
    makers: dict[str, Callable[[], JudgeOf]] = {
        "MiniLM + LR": lambda: minilm_regressions(data, seed),
        CloneGuard.name: lambda: always(CloneGuard()),
        Toxicity.name: lambda: always(Toxicity(cache)),
    }
    for name, make in makers.items():
        try:
            found.append(make())
        except (MMGuardError, ImportError) as error:
            absent.append(f"{name}: {error}")
    return found, absent


def at_most(labelled: LabelledSet, limit: int, seed: int = 0) -> LabelledSet:
    """Return the set with `limit` of its rows, drawn by seed, as many of each class as it had."""
    if len(labelled.rows) <= limit:
        return labelled
    draw = random.Random(seed)
    kept = [
        row
        for label in (0, 1)
        for rows in [[row for row in labelled.rows if row.label == label]]
        for row in draw.sample(rows, round(limit * len(rows) / len(labelled.rows)))
    ]
    note = f"{len(kept)} of {len(labelled.rows)} rows; {labelled.note}".removesuffix("; ")
    return replace(labelled, rows=tuple(kept), note=note)


def environment() -> dict[str, str]:
    """Return versions and hardware, which belong beside every figure."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found | {"processor": _processor(), "cores": str(os.cpu_count())}


def as_json(figures: Sequence[Figures], absent: Sequence[str], seed: int) -> dict[str, Any]:
    """Return everything measured as JSON-ready values."""
    rows = [asdict(row) | {"tpr": _rate(row.tpr), "fpr": _rate(row.fpr)} for row in figures]
    return {"seed": seed, "environment": environment(), "absent": list(absent), "figures": rows}


def _figures(judge: Judge, labelled: LabelledSet, seed: int, resamples: int) -> Figures:
    labels = np.array([row.label for row in labelled.rows], dtype=np.int64)
    unsafe = int(labels.sum())
    empty = Figures(
        labelled.name, labelled.kind, judge.name, len(labels), unsafe,
        trained_on=labelled.trained_on, note=labelled.note,
    )  # fmt: skip
    outcome = outcome_of(judge, labelled)
    if outcome is None:
        return replace(empty, note="reads one text, and this set holds more")
    _require_scores(judge, outcome)
    tpr, fpr = metrics.rates(labels, outcome.blocked)
    figures = replace(
        empty,
        tpr=tpr if tpr.n else None,
        fpr=fpr if fpr.n else None,
        failed=int(outcome.failed.sum()),
    )
    if not tpr.n or not fpr.n:
        return figures
    groups = [row.group for row in labelled.rows]
    return replace(
        figures,
        auroc=metrics.auroc(labels, outcome.scores),
        interval=metrics.bootstrap_interval(
            metrics.auroc, labels, outcome.scores, groups, seed=seed, resamples=resamples
        ),
        average_precision=metrics.average_precision(labels, outcome.scores),
        f1=metrics.f1_scores(labels, outcome.blocked),
    )


def _require_scores(judge: Judge, outcome: Outcome) -> None:
    scores = outcome.scores
    if not (np.isfinite(scores).all() and ((scores >= 0) & (scores <= 1)).all()):
        kind = "guard" if isinstance(judge, GuardJudge) else "baseline"
        raise MMGuardError(f"{kind} {judge.name!r} has scores outside 0..1; mend its verdicts")


def _rate(rate: Proportion | None) -> dict[str, float] | None:
    return None if rate is None else {"rate": rate.rate} | rate._asdict()


def _processor() -> str:
    """Return the processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
