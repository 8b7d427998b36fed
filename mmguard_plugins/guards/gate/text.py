"""Scoring text: tokens, windows, the fine-tuned MiniLM on ONNX Runtime, calibrated scores."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from mmguard_plugins.errors import GuardError
from mmguard_plugins.guards.gate.config import TooLongError
from mmguard_plugins.guards.gate.plain import readings
from mmguard_plugins.guards.gate.sessions import open_session

if TYPE_CHECKING:
    from tokenizers import Encoding

    from mmguard_plugins.weights import Weights

Scores = npt.NDArray[np.float32]

WINDOW, OVERLAP = 128, 32  # tokens; the model was trained on at most WINDOW
PART = 62  # tokens of the shorter windows that a longer text is read in as well
BATCH = 16
CACHED = 4096  # texts: earlier turns of a conversation come back with every request


class TextScorer:
    """Scores texts by category. One scorer serves every thread.

    A text is scored as it stands and as it reads once disguises are undone (`plain.readings`); a
    long one in overlapping windows, all of them, longer and shorter ones. Its score is the highest
    of these, category by category. Scores of texts seen before come from a cache that keeps hashes,
    not texts.
    """

    def __init__(self, weights: Weights, categories: Sequence[str], threads: int = 1) -> None:
        """Open tokenizer and model and run them once. Raises `GuardError` when they do not work."""
        settings = weights.settings
        if list(settings.get("categories", ())) != list(categories):
            raise GuardError(
                f"weights {str(weights.folder)!r} score other categories; train them anew"
            )
        self._slope = np.asarray(settings["slope"], np.float32)
        self._offset = np.asarray(settings["offset"], np.float32)
        try:
            self._tokenizer = Tokenizer.from_file(str(weights.file("tokenizer.json")))
        except Exception as error:
            raise GuardError(f"the gate's tokenizer cannot be loaded ({error})") from error
        self._tokenizer.enable_truncation(WINDOW, stride=OVERLAP)
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a user's "[SEP]" is text
        self._session = open_session(weights.file("text.onnx"), threads)
        self._cache: OrderedDict[bytes, Scores] = OrderedDict()
        self._lock = threading.Lock()
        self._nothing = np.zeros(len(categories), np.float32)
        first = self.score(["start"], max_windows=1)
        if first.shape != (1, len(categories)) or not np.isfinite(first).all():
            raise GuardError("the gate's model gives no scores; install the weights anew")

    def score(self, texts: Sequence[str], max_windows: int) -> Scores:
        """Return calibrated probabilities, (texts, categories), each in 0..1.

        Raises `TooLongError` when the texts that are not in the cache have more windows together.
        """
        keys = [_key(text) for text in texts]
        with self._lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            fresh = self._score_new(list(new.values()), max_windows)
            found = dict(zip(new, fresh, strict=True))
            known |= found
            self._remember(found)
        if not keys:
            return np.zeros((0, len(self._nothing)), np.float32)
        return np.stack([known[key] for key in keys])

    def _score_new(self, texts: Sequence[str], max_windows: int) -> list[Scores]:
        windows: list[tuple[int, ...]] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            for window in self._windows(text):
                windows.append(window)
                owners.append(owner)
                if len(windows) > max_windows:
                    raise TooLongError(f"more than {max_windows} windows of {WINDOW} tokens")
        highest = [self._nothing.copy() for _ in texts]
        unique = list(dict.fromkeys(windows))
        by_window = dict(zip(unique, self._forward(unique), strict=True))
        for owner, window in zip(owners, windows, strict=True):
            np.maximum(highest[owner], by_window[window], out=highest[owner])
        return highest

    def _windows(self, text: str) -> Iterator[tuple[int, ...]]:
        """Yield the token ids of every window of every reading."""
        for reading in readings(text):
            if not reading or reading.isspace():
                continue
            encoding: Encoding = self._tokenizer.encode(reading)
            yield tuple(encoding.ids)
            for rest in encoding.overflowing:
                yield tuple(rest.ids)
            if encoding.overflowing:
                for window in (encoding, *encoding.overflowing):
                    yield from _parts(tuple(window.ids))

    def _forward(self, windows: Sequence[tuple[int, ...]]) -> list[Scores]:
        """Return the probabilities of each window, those of like length in one batch."""
        order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
        out: list[Scores] = [self._nothing] * len(windows)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            length = len(windows[batch[-1]])
            ids = np.zeros((len(batch), length), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : len(windows[i])] = windows[i]
                mask[row, : len(windows[i])] = 1
            (logits,) = self._session.run(None, {"input_ids": ids, "attention_mask": mask})
            if not np.isfinite(logits).all():  # compared with a threshold it would pass
                raise FloatingPointError("the gate's text model gave no numbers")
            probabilities = 1 / (1 + np.exp(-(logits * self._slope + self._offset)))
            for row, i in enumerate(batch):
                out[i] = probabilities[row]
        return out

    def _remember(self, found: dict[bytes, Scores]) -> None:
        with self._lock:
            self._cache.update(found)
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)


def _parts(window: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield a window's parts: in a whole one, much harmless text may outweigh one bad sentence."""
    first, *tokens, last = window
    for start in range(0, max(1, len(tokens) - PART // 4), PART - PART // 4):
        yield (first, *tokens[start : start + PART], last)


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
