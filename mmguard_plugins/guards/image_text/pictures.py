"""The words in a picture, however a model may be shown it: what guards build on."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from mmguard_plugins.guards.image_text.config import ImageTextConfig
from mmguard_plugins.guards.image_text.presence import TextPresence
from mmguard_plugins.guards.image_text.reader import Reader
from mmguard_plugins.guards.image_text.views import views


@dataclass(frozen=True, slots=True)
class Reading:
    """What one picture gave: its texts, and in how many of its views none was looked for."""

    texts: tuple[str, ...] = ()
    views: int = 0
    passed_over: int = 0


class PictureReader:
    """Reads pictures of any mode. One serves every thread; it keeps nothing between calls."""

    def __init__(self, options: ImageTextConfig) -> None:
        """Load the models. Raises `GuardError` when they are missing or do not work."""
        self._options = options
        self._reader = Reader(options)
        self._presence = TextPresence(threads=options.threads) if options.presence else None

    def texts(self, image: Image.Image) -> list[str]:
        """Return each text that a view of the picture shows, less those inside another one.

        Raises `UnreadableError` for a picture that must not pass unread.
        """
        return list(self.read(image).texts)

    def read(self, image: Image.Image) -> Reading:
        """Return the texts and how the picture was looked at; raises as `texts` does."""
        texts: dict[str, str] = {}  # by what stays when white space is evened out
        count = passed_over = 0
        for view in views(image, self._options.max_pixels):
            count += 1
            heat = self._presence.heat(view) if self._presence else None
            if heat is not None and heat.max() < self._options.presence_threshold:
                passed_over += 1
                continue
            for text in self._reader.read(view, heat, self._options.presence_threshold):
                texts.setdefault(" ".join(text.split()), text)
        kept = (
            text
            for even, text in texts.items()
            if not any(even in other and even != other for other in texts)
        )
        return Reading(tuple(kept), count, passed_over)
