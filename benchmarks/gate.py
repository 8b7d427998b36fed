"""What the gate costs: `python benchmarks/gate.py [--json FILE]`, on one core.

Every figure is a ratio to bare model forwards measured in the same process, taking turns with ours:
the same texts through the gate's own ONNX file, the same pictures through open_nsfw's and through
the net that looks for text. Texts differ from run to run of the
loop, so that nothing comes from the gate's cache. Needs the extras `gate` and `demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

from mmguard_plugins import Engine, Request
from mmguard_plugins.guards.gate.guard import WEIGHTS
from mmguard_plugins.guards.gate.picture import PictureScorer
from mmguard_plugins.guards.gate.sessions import open_session
from mmguard_plugins.guards.image_text.presence import TextPresence

REPEATS = 60
WORDS = 100
SIDE = 512
GOALS = {
    "text check / bare forward": 1.3,
    "text + picture / sum of bare forwards": 1.3,
    "text of 100 words, ms": 10.0,
    "text + 512-px picture without text, ms": 60.0,
    "text + 512-px picture with text (OCR), ms": 250.0,
    "RSS MB": 600.0,
    "cold start s": 2.0,
}
_SENTENCES = (
    "the committee met on {} to discuss the new library and the {} roof",
    "my grandmother grows {} beside the old {} and sells them on Saturdays",
    "please compare the {} of last year with the {} of this one",
    "we walked along the river until the {} closed and the {} came out",
)
_NOUNS = ("tomato", "bridge", "ticket", "window", "garden", "engine", "kettle", "violin", "lantern")


def text(rng: random.Random, words: int = WORDS) -> str:
    """Return harmless prose of so many words, new at every call."""
    out: list[str] = []
    while len(out) < words:
        sentence = rng.choice(_SENTENCES).format(*rng.sample(_NOUNS, 2))
        out += sentence.split()
    return " ".join(out[:words])


def photo(name: str = "chelsea") -> Image.Image:
    """Return a photo of 512 px out of scikit-image: the cat has no text on it."""
    image = Image.fromarray(getattr(skimage.data, name)())
    side = min(image.size)
    return image.crop((0, 0, side, side)).resize((SIDE, SIDE))


def poster() -> Image.Image:
    """Return a picture of 512 px with three lines of text."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(36)
    for row, line in enumerate(("Summer fair", "in the old town hall", "Saturday, ten o'clock")):
        draw.text((40, 120 + 80 * row), line, font=font, fill="black")
    return image


def turns(functions: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, float]:
    """Return each function's median milliseconds, the functions taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def engine(**options: Any) -> Engine:
    """Return an engine with the gate alone."""
    return Engine.from_config({"version": 1, "guards": [{"use": "gate", "options": options}]})


def bare(session: Any, tokenizer: Any) -> Callable[[str], Any]:
    """Return a function that tokenises a text and runs a model on it, and nothing else."""

    def run(given: str) -> Any:
        ids = np.asarray([tokenizer.encode(given).ids], np.int64)
        return session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})

    return run


def texts_ms() -> dict[str, float]:
    """Return what 100 words take, bare and guarded."""
    from tokenizers import Tokenizer

    rng = random.Random(3)
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    forward = bare(open_session(WEIGHTS / "text.onnx", 1), tokenizer)
    gate = engine(explicit_images=False, read_images=False)
    out = turns(
        {
            "bare forward of the gate's model, ms": lambda: forward(text(rng)),
            "text of 100 words, ms": lambda: gate.check_input(Request(text(rng))),
        }
    )
    gate.close()
    out["text check / bare forward"] = (
        out["text of 100 words, ms"] / out["bare forward of the gate's model, ms"]
    )
    return out


def pictures_ms() -> dict[str, float]:
    """Return what a picture takes, bare and guarded, without text and with."""
    from tokenizers import Tokenizer

    rng = random.Random(4)
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    tokenizer.no_padding()
    forward = bare(open_session(WEIGHTS / "text.onnx", 1), tokenizer)
    scorer, presence = PictureScorer(), TextPresence()
    plain, doubtful, worded = photo(), photo("astronaut"), poster()
    gate, unread = engine(), engine(read_images=False)

    def both() -> None:
        forward(text(rng))
        scorer.score(plain)
        presence.score(plain)

    out = turns(
        {
            "sum of bare forwards, ms": both,
            "text + 512-px picture, words in it not read, ms": lambda: unread.check_input(
                Request(text(rng), images=[plain])
            ),
            "text + 512-px picture without text, ms": lambda: gate.check_input(
                Request(text(rng), images=[plain])
            ),
            "text + 512-px photo that looks like text in places, ms": lambda: gate.check_input(
                Request(text(rng), images=[doubtful])
            ),
            "text + 512-px picture with text (OCR), ms": lambda: gate.check_input(
                Request(text(rng), images=[worded])
            ),
        },
        REPEATS // 3,
    )
    gate.close()
    unread.close()
    out["text + picture / sum of bare forwards"] = (
        out["text + 512-px picture without text, ms"] / out["sum of bare forwards, ms"]
    )
    return out


def throughput() -> dict[str, float]:
    """Return texts a second when 32 come at once."""
    from mmguard_plugins.guards.gate.categories import TEXT_CATEGORIES
    from mmguard_plugins.guards.gate.text import TextScorer
    from mmguard_plugins.weights import open_weights

    rng = random.Random(5)
    scorer = TextScorer(open_weights(WEIGHTS, "gate"), TEXT_CATEGORIES)
    taken = turns({"batch": lambda: scorer.score([text(rng) for _ in range(32)], 512)}, 10)
    return {"batch of 32 texts of 100 words, texts a second": 32e3 / taken["batch"]}


def fresh_process() -> dict[str, float]:
    """Return seconds until the first verdict of a new process, and its memory after 20 requests."""
    code = """
import time
start = time.perf_counter()
from mmguard_plugins import Engine, Request
engine = Engine.from_config({"version": 1, "guards": [{"use": "gate"}]})
engine.check_input(Request("hello"))
cold = time.perf_counter() - start
import os, sys, random
sys.path.insert(0, "benchmarks")
import gate
rng = random.Random(1)
for _ in range(10):
    for image in (gate.photo(), gate.poster()):
        engine.check_input(Request(gate.text(rng), images=[image]))
pages = int(open("/proc/self/statm").read().split()[1])
print(cold, pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    found = [tuple(map(float, run.stdout.split())) for run in runs]
    return {"cold start s": min(f[0] for f in found), "RSS MB": max(f[1] for f in found)}


def main() -> int:
    """Print the table; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    results = {**texts_ms(), **pictures_ms(), **throughput(), **fresh_process()}
    names = ("onnxruntime", "tokenizers", "rapidocr", "numpy", "Pillow")
    about = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }
    print(about)
    missed = 0
    for name, value in results.items():
        goal = GOALS.get(name)
        note = "" if goal is None else f"  goal <= {goal:g}: {'met' if value <= goal else 'MISSED'}"
        missed += "MISSED" in note
        print(f"{name:<56} {value:>9.2f}{note}")
    if arguments.json:
        arguments.json.write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
