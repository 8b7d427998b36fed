"""The demo's page: one self-contained HTML file with pictures, answers and reasons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmguard_plugins.demo import pictures

if TYPE_CHECKING:
    from mmguard_plugins.demo.run import Outcome
    from mmguard_plugins.types import Verdict

TEMPLATE = "page.html"


def write_page(path: Path, outcomes: Sequence[Outcome], about: dict[str, str]) -> None:
    """Write the page, whole or not at all."""
    # jinja2 because it escapes what users and models wrote; torch brings it.
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("mmguard_plugins.demo", "."), autoescape=True, trim_blocks=True
    )
    text = environment.get_template(TEMPLATE).render(
        about=about,
        cards=[_card(outcome) for outcome in outcomes],
        right=sum(outcome.right for outcome in outcomes),
        total=len(outcomes),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _card(outcome: Outcome) -> dict[str, Any]:
    turns = [
        {"role": turn["role"], "parts": [_shown(part) for part in turn["content"]]}
        for turn in outcome.case.chat
    ]
    return {
        "name": outcome.case.name,
        "why": outcome.case.why,
        "turns": turns,
        "answer": outcome.answer,
        "wanted": "pass" if outcome.case.must_pass else f"stopped at {outcome.case.stage}",
        "happened": outcome.happened,
        "right": outcome.right,
        "stopped": outcome.decision.blocked,
        "explanation": outcome.explanation,
        "rulings": [
            {
                "stage": decision.stage.value,
                "guard": ruling.verdict.guard,
                "action": ruling.action.name.lower(),
                "score": "" if ruling.verdict.score is None else f"{ruling.verdict.score:.2f}",
                "reason": ruling.verdict.reason,
                "read": [part.text for part in ruling.verdict.found],
                "milliseconds": f"{ruling.seconds * 1e3:.1f}",
                "scores": _scores(ruling.verdict),
            }
            for decision in outcome.decisions
            for ruling in decision.rulings
        ],
        "coverage": outcome.decisions[0].coverage,
        "seconds": f"{outcome.seconds:.1f}",
    }


def _scores(verdict: Verdict) -> list[dict[str, Any]]:
    """Return every category the guard scored, highest first."""
    return [
        {
            "name": name,
            "value": f"{score:.2f}",
            "percent": round(100 * score),
            "raised": name in verdict.categories,
        }
        for name, score in sorted(verdict.scores.items(), key=lambda item: -item[1])
    ]


def _shown(part: dict[str, Any]) -> dict[str, str]:
    if part["type"] == "text":
        return {"text": part["text"]}
    if part["type"] == "image" and "image" in part:
        return {"image": pictures.thumbnail(part["image"])}
    return {
        "other": f"{part['type']} ({'cut off' if part['type'] == 'image' else 'not inspected'})"
    }
