"""Options of `banned_text`."""

from __future__ import annotations

from typing import Literal

import regex
from pydantic import Field, field_validator, model_validator

from mmguard_plugins.guard import StrictModel


class BannedTextConfig(StrictModel):
    """What to look for and what finding it means."""

    phrases: tuple[str, ...] = Field(
        default=(),
        description="Literal phrases: case is ignored, any white space matches any other.",
    )
    patterns: tuple[str, ...] = Field(
        default=(), description="Regular expressions (the `regex` package's syntax), case ignored."
    )
    category: str = Field(
        default="banned_text", min_length=1, description="Category that a hit is reported under."
    )
    action: Literal["flag", "redact", "block"] = Field(
        default="block", description="What a hit leads to."
    )
    replacement: str = Field(default="[redacted]", description="Stands in for redacted text.")
    pattern_timeout_s: float = Field(
        default=0.1, gt=0, le=10, description="Time for one pattern on one text, seconds."
    )

    @field_validator("phrases")
    @classmethod
    def _phrases_have_words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for phrase in value:
            if not phrase.split():
                raise ValueError("an empty phrase would match everything; remove it")
        return value

    @field_validator("patterns")
    @classmethod
    def _patterns_compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                compiled = regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"pattern {pattern!r} is invalid ({error}); correct it") from error
            if compiled.fullmatch("") is not None:
                raise ValueError(
                    f"pattern {pattern!r} matches the empty text; make it need a letter"
                )
        return value

    @model_validator(mode="after")
    def _something_to_look_for(self) -> BannedTextConfig:  # noqa: N804
        if not self.phrases and not self.patterns:
            raise ValueError("nothing to look for; give phrases or patterns")
        return self
