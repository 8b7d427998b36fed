"""Options of `gate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, field_validator

from mmguard_plugins.guard import StrictModel
from mmguard_plugins.guards.gate.categories import CATEGORIES, INJECTION, OFFENSIVE
from mmguard_plugins.guards.image_text.config import ImageTextConfig


class TooLongError(Exception):
    """A text with more windows than `max_windows`."""


class GateConfig(StrictModel):
    """What the gate objects to, what it looks at, and how much it may spend."""

    thresholds: dict[str, float] = Field(
        default_factory=dict,
        description="From which probability on a category is objected to; categories not named"
        " keep the threshold that came with the weights. 1.0 never objects. `mmguard calibrate`"
        " writes these.",
    )
    only_flag: tuple[str, ...] = Field(
        default=(OFFENSIVE,),
        description="Categories that are reported and let through: by default swearing.",
    )
    ignore_in_answers: tuple[str, ...] = Field(
        default=(INJECTION,),
        description="Categories not looked for in what the model says. Instructions in an answer"
        " instruct nobody.",
    )
    explicit_images: bool = Field(default=True, description="Score pictures for nudity and sex.")
    read_images: bool = Field(
        default=True,
        description="Read the words in pictures and score them too. Switch it off where the guard"
        " `image_text` does it: its findings are scored in any case.",
    )
    image_text: ImageTextConfig = Field(
        default_factory=ImageTextConfig, description="How to read pictures; as for `image_text`."
    )
    max_windows: int = Field(
        default=512,
        ge=1,
        le=100_000,
        description="A request or answer longer than this many windows of 128 tokens is blocked;"
        " one takes about 6 ms on one core. Give a `timeout_s` to match.",
    )
    weights: Path | None = Field(
        default=None, description="Folder that `mmguard train gate` wrote; default the shipped one."
    )
    threads: int = Field(default=1, ge=1, le=64, description="Threads that one forward may use.")

    @field_validator("thresholds")
    @classmethod
    def _known(cls, thresholds: dict[str, float]) -> dict[str, float]:
        _known_names(thresholds)
        wrong = {name: value for name, value in thresholds.items() if not 0 < value <= 1}
        if wrong:
            raise ValueError(f"thresholds {wrong} are out of range; give more than 0 and at most 1")
        return thresholds

    @field_validator("only_flag", "ignore_in_answers")
    @classmethod
    def _named(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        _known_names(names)
        return names


def _known_names(names: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(CATEGORIES))
    if unknown:
        known = ", ".join(repr(name) for name in CATEGORIES)
        raise ValueError(f"categories {unknown} are unknown; known ones are {known}")
