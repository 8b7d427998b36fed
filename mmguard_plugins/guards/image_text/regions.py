"""Which rectangles of a picture to read, from where the text-in-image test sees text."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from mmguard_plugins.guards.image_text.presence import CELL, Heat

FAINT = 0.5  # of the threshold: cells this warm belong to the text beside them
AROUND = 2  # cells to read around what is warm
WHOLE = 0.6  # of the picture: from here on rectangles save nothing


class Region(NamedTuple):
    """A rectangle in pixels, `bottom` and `right` just outside it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def area(self) -> int:
        """Return its size in pixels."""
        return max(0, self.bottom - self.top) * max(0, self.right - self.left)

    def grown(self, by: int, height: int, width: int) -> Region:
        """Return it with `by` pixels more on each side, within a picture of that size."""
        return Region(
            max(0, self.top - by),
            max(0, self.left - by),
            min(height, self.bottom + by),
            min(width, self.right + by),
        )

    def joined(self, other: Region) -> Region:
        """Return the rectangle around both."""
        return Region(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
        )

    def meets(self, other: Region) -> bool:
        """Return whether they overlap or touch."""
        return (
            self.top <= other.bottom
            and other.top <= self.bottom
            and self.left <= other.right
            and other.left <= self.right
        )


def regions(heat: Heat, threshold: float, height: int, width: int) -> list[Region]:
    """Return rectangles, apart from each other, around all cells of at least `threshold`."""
    warm = (heat >= threshold * FAINT).astype(np.uint8)
    near = cv2.dilate(warm, np.ones((2 * AROUND + 1, 2 * AROUND + 1), np.uint8))
    count, labels = cv2.connectedComponents(near)
    hot = set(np.unique(labels[heat >= threshold]).tolist())
    found: list[Region] = []
    for label in range(1, count):
        if label in hot:
            rows, columns = np.nonzero(labels == label)
            found.append(
                Region(
                    int(rows.min()) * CELL,
                    int(columns.min()) * CELL,
                    min(height, (int(rows.max()) + 1) * CELL),
                    min(width, (int(columns.max()) + 1) * CELL),
                )
            )
    found = merged(found)
    whole = Region(0, 0, height, width)
    return [whole] if sum(r.area for r in found) >= WHOLE * whole.area else found


def merged(found: list[Region]) -> list[Region]:
    """Return the rectangles with those that meet made one."""
    apart: list[Region] = []
    left = list(found)
    while left:
        one = left.pop()
        near = [other for other in apart if one.meets(other)]
        if near:
            apart = [other for other in apart if other not in near]
            for other in near:
                one = one.joined(other)
            left.append(one)  # it is larger now and may meet more
        else:
            apart.append(one)
    return sorted(apart)
