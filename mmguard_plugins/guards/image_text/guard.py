"""The guard `image_text`: what stands in a picture is shown to the guards that read text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from mmguard_plugins.errors import GuardError
from mmguard_plugins.guard import Guard, StrictModel
from mmguard_plugins.guards.image_text.config import ImageTextConfig
from mmguard_plugins.guards.image_text.views import UnreadableError, views
from mmguard_plugins.hookspecs import hookimpl
from mmguard_plugins.types import Action, Part, PartKind, Request, Verdict

if TYPE_CHECKING:
    from mmguard_plugins.guards.image_text.reader import Reader

UNREADABLE = "unreadable_image"


class ImageText(Guard):
    """Reads the text in every picture and hands it on; it judges no words itself.

    Each way a model may be shown a picture is read: every orientation, and a transparent one
    without its alpha channel, on black and on white. What the reader is unsure of is handed on too.
    A picture with more text than the configured bounds is blocked, as is one that cannot be turned
    into colours. Nothing is fetched: the recognition models come with the `rapidocr` package.

    Reading is not certain: text can be drawn that a model reads and this does not. Never read are
    scripts other than Latin, Greek, Chinese and Japanese, letters smaller than about six pixels
    after scaling to `max_pixels`, and what appears only once a model has scaled the picture down.
    """

    Config: ClassVar[type[StrictModel]] = ImageTextConfig
    config: ImageTextConfig
    inspects: ClassVar[frozenset[PartKind]] = frozenset({PartKind.IMAGE})

    def __init__(self, config: StrictModel | None = None, name: str = "") -> None:
        """Load the recognition models and read a test picture with them.

        Raises `GuardError` when the package is missing or does not work.
        """
        super().__init__(config, name)
        self._reader = self._open_reader()

    @hookimpl
    def check_input(self, request: Request) -> Verdict:
        """Read every picture of the request."""
        try:
            found = tuple(self._read(request))
        except UnreadableError as error:
            return Verdict(self.name, Action.BLOCK, categories={UNREADABLE: 1.0}, reason=str(error))
        return Verdict(
            self.name, Action.ALLOW, reason=f"{len(found)} text(s) in pictures", found=found
        )

    def _read(self, request: Request) -> Iterator[Part]:
        left = self.config.max_chars
        for part in request.images:
            if part.problem:
                continue  # the engine blocks it
            for text in self._texts(part.data):
                left -= len(text)
                if left < 0:
                    raise UnreadableError(
                        f"pictures hold more than {self.config.max_chars} characters;"
                        " raise max_chars to read them"
                    )
                yield Part(PartKind.TEXT, text=text, source=part.source)

    def _texts(self, image: Image.Image) -> list[str]:
        """Return each text that a view of the picture shows, less those inside another one."""
        texts: dict[str, str] = {}  # by what stays when white space is evened out
        for view in views(image, self.config.max_pixels):
            for text in self._reader.read(view):
                texts.setdefault(" ".join(text.split()), text)
        return [
            text
            for even, text in texts.items()
            if not any(even in other and even != other for other in texts)
        ]

    def _open_reader(self) -> Reader:
        try:
            from mmguard_plugins.guards.image_text.reader import Reader

            return Reader(self.config)
        except ImportError as error:
            raise GuardError(
                f"guard {self.name!r} needs rapidocr, which cannot be imported ({error});"
                " pip install mmguard-plugins[gate]"
            ) from error
