"""Reading order: from pieces of text scattered over a picture to text as a reader would say it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SAME_DIRECTION = math.cos(math.radians(30))


@dataclass(frozen=True, slots=True)
class Line:
    """A piece of text on one straight line.

    `x`, `y` is its centre and (`right`, `down`) the direction it is read in, as a unit vector.
    """

    text: str
    confidence: float
    x: float
    y: float
    right: float
    down: float
    width: float
    height: float

    def seen_along(self, right: float, down: float) -> tuple[float, float]:
        """Return the centre as (across, down) for a reader whose lines run along the direction."""
        return self.x * right + self.y * down, self.y * right - self.x * down


def arrange(lines: Sequence[Line]) -> list[str]:
    """Return the text of `lines`, row by row and, where that differs, column by column.

    A phrase broken over lines is whole in at least one of the two. Lines are joined by newlines.
    """
    groups = _by_direction(lines)
    by_rows = "\n".join("\n".join(_rows(*group)) for group in groups)
    by_columns = "\n".join("\n".join(_columns(*group)) for group in groups)
    return [text for text in dict.fromkeys((by_rows, by_columns)) if text]


def _by_direction(lines: Sequence[Line]) -> list[tuple[list[Line], float, float]]:
    """Group lines that run the same way, the group with the most text first."""
    left = sorted(lines, key=lambda line: -line.width)
    groups: list[tuple[list[Line], float, float]] = []
    while left:
        right, down = left[0].right, left[0].down
        alike = [n.right * right + n.down * down > SAME_DIRECTION for n in left]
        groups.append(([n for n, same in zip(left, alike, strict=True) if same], right, down))
        left = [n for n, same in zip(left, alike, strict=True) if not same]
    return sorted(groups, key=lambda group: -sum(len(line.text) for line in group[0]))


def _rows(lines: Sequence[Line], right: float, down: float) -> list[str]:
    """Join pieces that stand side by side; return the rows from top to bottom."""
    placed = sorted(lines, key=lambda line: line.seen_along(right, down)[::-1])
    rows: list[list[Line]] = []
    for line in placed:
        if rows and _beside(rows[-1][0], line, right, down):
            rows[-1].append(line)
        else:
            rows.append([line])
    for row in rows:
        row.sort(key=lambda line: line.seen_along(right, down))
    return [" ".join(line.text for line in row) for row in rows]


def _columns(lines: Sequence[Line], right: float, down: float) -> list[str]:
    """Follow each line to the one right below it; return block after block."""
    below = sorted(lines, key=lambda line: line.seen_along(right, down)[1])
    blocks: list[list[Line]] = []
    for line in below:
        above = [b for b in blocks if _under(b[-1], line, right, down)]
        if above:
            above[-1].append(line)
        else:
            blocks.append([line])
    blocks.sort(key=lambda block: block[0].seen_along(right, down))
    return [line.text for block in blocks for line in block]


def _beside(one: Line, other: Line, right: float, down: float) -> bool:
    apart = one.seen_along(right, down)[1] - other.seen_along(right, down)[1]
    return abs(apart) < 0.5 * min(one.height, other.height)


def _under(upper: Line, lower: Line, right: float, down: float) -> bool:
    (x0, y0), (x1, y1) = upper.seen_along(right, down), lower.seen_along(right, down)
    height = max(upper.height, lower.height)
    overlaps = abs(x0 - x1) < (upper.width + lower.width) / 2
    return overlaps and 0.5 * min(upper.height, lower.height) <= y1 - y0 < 2.5 * height
