"""Options of `image_text`."""

from __future__ import annotations

from pydantic import Field

from mmguard_plugins.guard import StrictModel

PRESENCE_THRESHOLD = 0.6  # chosen with the shipped weights; their card has the figures


class ImageTextConfig(StrictModel):
    """How carefully to read, and where reading stops."""

    min_confidence: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Lines the reader is less sure of are dropped. Above 0, whoever blurs a word"
        " until the reader doubts it but the model does not has hidden it.",
    )
    max_pixels: int = Field(
        default=1_000_000,
        ge=65_536,
        le=50_000_000,
        description="A larger picture is scaled down to this many pixels before it is read. Give at"
        " least what the model sees, and a `timeout_s` to match: time and memory grow with it.",
    )
    max_lines: int = Field(
        default=400,
        ge=1,
        le=10_000,
        description="A picture with more pieces of text than this is blocked.",
    )
    max_chars: int = Field(
        default=100_000,
        ge=1,
        description="A request whose pictures hold more text than this is blocked.",
    )
    turned: bool = Field(
        default=True,
        description="Look for text on a quarter-turned copy as well: finds much more slanted and"
        " upright text on photos, for twice the time on pictures without text.",
    )
    presence: bool = Field(
        default=True,
        description="First ask a small net where text may stand, and read only there. It costs"
        " hundredths of what reading costs; without it every picture is read in full.",
    )
    presence_threshold: float = Field(
        default=PRESENCE_THRESHOLD,
        gt=0,
        le=1,
        description="A view of a picture in which that net is less sure of text is not read. Lower"
        " loses fewer words and reads more pictures that have none.",
    )
    int8: bool = Field(
        default=True,
        description="Find text with the shipped 8-bit detector, in less than half the time that"
        " rapidocr's own takes, which is float32 and is used otherwise.",
    )
    threads: int = Field(
        default=1, ge=1, le=64, description="Threads that one reading may use; at most all cores."
    )
