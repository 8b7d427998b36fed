"""Quantize the text detector of `image_text`: rapidocr's own, its convolutions in 8 bits.

Ranges of activations come from drawn words and photos. What comes out is compared with the float32
detector on pictures it was not calibrated on, and is not written if too much text is lost.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import skimage.data
from PIL import Image
from pydantic import Field
from sklearn.datasets import load_sample_images

from mmguard_plugins.errors import MMGuardError
from mmguard_plugins.guard import StrictModel
from mmguard_plugins.guards.image_text.detector import MODEL, NAME, open_detector, rapidocr_model
from mmguard_plugins.guards.image_text.reader import TEXT, scaled
from mmguard_plugins.weights import MANIFEST, manifest_of
from mmguard_trainers import checkpoints, packages
from mmguard_trainers.text_presence import KEPT_FONTS, NO_LETTERS
from mmguard_trainers.text_presence_drawing import SIDE, sample

CALIBRATED_ON = (
    "coins", "moon", "page", "text", "clock", "immunohistochemistry", "hubble_deep_field", "retina",
)  # fmt: skip
JUDGED_ON = ("astronaut", "coffee", "chelsea", "rocket")
ACROSS = 3  # drawn pictures side by side in one: text of many sizes and colours at once
# Convolutions left in float32, by place in the graph: on eight pictures 8 bits lost most text in
# these and saved little time. So it is with those behind a pooling, whose input is one pixel.
EXACT = (*range(2), *range(16, 38))
POOLING = ("GlobalAveragePool", "ReduceMean")
OPSET = 17  # per-channel quantization needs 13; rapidocr's file has 11

Input = npt.NDArray[np.float32]
Trial = tuple[Input, npt.NDArray[np.float32]]  # a picture, and where text was drawn (not 0)
Score = Callable[[Input], npt.NDArray[np.float32]]


class NotGoodEnough(MMGuardError):
    """The 8-bit detector loses more text than it may."""


class TextDetectorConfig(StrictModel):
    """How much to calibrate and judge with, what may be lost, and where to write."""

    output: Path = Field(description="The weights folder to write.")
    drawn: int = Field(default=12, ge=1, description="Drawn pictures to calibrate with.")
    judged: int = Field(default=24, ge=1, description="Drawn pictures to compare on.")
    kept: float = Field(
        default=0.87, ge=0, le=1, description="Share of float32's text pixels to find at least."
    )
    false: float = Field(
        default=0.01, ge=0, le=1, description="Share of other pixels to take for text at most."
    )
    seed: int = 0


def train(config: TextDetectorConfig) -> Path:
    """Calibrate, compare and write the weights folder; return it.

    Raises `NotGoodEnough`, and writes nothing, when the comparison ends below the bounds.
    """
    source = rapidocr_model("det")
    drawn = _pictures(config.drawn, f"calibrate {config.seed}", photos(CALIBRATED_ON))
    inputs = [batch for batch, _ in drawn]
    model = quantize(source, inputs)
    others = photos(JUDGED_ON) + [Image.fromarray(a) for a in load_sample_images().images]
    trial = list(_pictures(config.judged, f"judge {config.seed}", others))
    figures = compare(session(source.read_bytes()), session(model), trial)
    if not (figures["kept"] >= config.kept and figures["false"] <= config.false):
        raise NotGoodEnough(
            f"the 8-bit detector keeps {figures['kept']} of the text and adds {figures['false']};"
            f" it must keep {config.kept} and may add {config.false}"
        )
    return save(config, model, source, figures, len(inputs))


def quantize(source: Path, inputs: Sequence[Input]) -> bytes:
    """Return the model with its convolutions in 8 bits, the ranges taken from `inputs`."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.version_converter.convert_version(onnx.load(str(source)), OPSET)
    reader: Any = _Reader(inputs, model.graph.input[0].name)
    with tempfile.TemporaryDirectory() as scratch:
        newer, ready, small = (Path(scratch) / f"{n}.onnx" for n in ("newer", "ready", "small"))
        onnx.save(model, str(newer))
        quant_pre_process(str(newer), str(ready), skip_symbolic_shape=True)
        exact = exact_nodes(onnx.load(str(ready)).graph)
        quantize_static(
            str(ready),
            str(small),
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=exact,
            per_channel=True,
            reduce_range=True,  # processors without VNNI add up products of 8 bits in 16
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return small.read_bytes()


def exact_nodes(graph: Any) -> list[str]:
    """Return the names of the convolutions that stay in float32."""
    maker = {output: node for node in graph.node for output in node.output}
    pooled = set[str]()
    for node in graph.node:
        before = maker.get(node.input[0]) if node.input else None
        follows = before is not None and before.name in pooled
        # at a product or sum the pooled meets the pixels again
        if node.op_type in POOLING or (follows and node.op_type not in ("Mul", "Add")):
            pooled.add(node.name)
    convolutions = [node.name for node in graph.node if node.op_type == "Conv"]
    return [name for i, name in enumerate(convolutions) if i in EXACT or name in pooled]


class _Reader:
    """Hands out one input after the other, as onnxruntime's calibration asks for them."""

    def __init__(self, inputs: Sequence[Input], name: str) -> None:
        self._left = iter(inputs)
        self._name = name

    def get_next(self) -> dict[str, Input] | None:
        batch = next(self._left, None)
        return None if batch is None else {self._name: batch}


def session(model: bytes) -> Score:
    """Return the model as a function, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    run: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = run.get_inputs()[0].name

    def score(batch: Input) -> npt.NDArray[np.float32]:
        scores: npt.NDArray[np.float32] = run.run(None, {name: batch})[0]
        return scores

    return score


def compare(full: Score, small: Score, trial: Sequence[Trial]) -> dict[str, float]:
    """Return how much of what `full` finds `small` finds, what it makes up, and how much faster.

    `kept` is the share of the drawn text's pixels found by `full` that `small` finds too, `false`
    the share of pixels without drawn text that `small` takes for text and `full` does not.
    """
    both = wanted = false = empty = 0
    seconds = [0.0, 0.0]
    for batch, text in trial:
        found = list[npt.NDArray[np.bool_]]()
        for index, score in enumerate((full, small)):
            started = time.process_time()
            found.append(score(batch)[0, 0] > TEXT)
            seconds[index] += time.process_time() - started
        first, second = found
        both += int((first & second & (text != 0)).sum())
        wanted += int((first & (text != 0)).sum())
        false += int((second & ~first & (text == 0)).sum())
        empty += int((text == 0).sum())
    return {
        "kept": round(both / max(wanted, 1), 4),
        "false": round(false / max(empty, 1), 5),
        "times faster": round(seconds[0] / max(seconds[1], 1e-9), 2),
        "pictures": len(trial),
    }


def photos(names: Sequence[str]) -> list[Image.Image]:
    """Return scikit-image's pictures of these names."""
    return [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in names]


def save(
    config: TextDetectorConfig, model: bytes, source: Path, figures: dict[str, float], count: int
) -> Path:
    """Write model, card and manifest, the manifest last; see that the folder opens."""
    config.output.mkdir(parents=True, exist_ok=True)
    checkpoints.write(model, config.output / MODEL)
    card = {
        "what": "finds text in pictures; rapidocr's detector with convolutions in 8 bits",
        "source": {
            "file": source.name,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "package": f"rapidocr {packages.installed('rapidocr')}",
            "by": "PaddlePaddle (PaddleOCR), converted by RapidAI",
        },
        "licence": "Apache-2.0, as the source; no picture or font is part of the weights",
        "calibration": f"{count} pictures: letters drawn with the fonts of"
        " mmguard_trainers.packages.fonts(), less DejaVu, and photos of scikit-image",
        "config": json.loads(config.model_dump_json(exclude={"output"})),
        "versions": packages.versions("onnx", "onnxruntime", "numpy", "pillow"),
        "figures": figures,
        "figures of": "drawn pictures and photos that were not calibrated on; against float32",
    }
    checkpoints.write(json.dumps(card, indent=2) + "\n", config.output / "card.json")
    manifest = manifest_of(config.output, NAME, [MODEL, "card.json"], {})
    checkpoints.write(manifest, config.output / MANIFEST)
    open_detector(config.output)
    return config.output


def _pictures(drawn: int, seed: str, around: Sequence[Image.Image]) -> Iterator[Trial]:
    """Yield drawn pictures with where their text is, then each photo in two sizes, none drawn."""
    fonts = [p for n, p in packages.fonts().items() if not n.startswith(KEPT_FONTS)]
    fonts = [path for path in fonts if not any(mark in path.stem for mark in NO_LETTERS)]
    rng = random.Random(seed)
    for _ in range(drawn):
        picture = Image.new("RGB", (ACROSS * SIDE, ACROSS * SIDE))
        text = np.zeros((picture.height, picture.width), np.float32)
        for left in range(0, picture.width, SIDE):
            for top in range(0, picture.height, SIDE):
                one = sample(rng, around, fonts)
                picture.paste(one.picture, (left, top))
                text[top : top + SIDE, left : left + SIDE] = one.text
        yield _batch(picture), text
    for photo in around:
        for side in (544, 288):
            yield _batch(photo.resize((side, side))), np.zeros((side, side), np.float32)


def _batch(picture: Image.Image) -> Input:
    return np.ascontiguousarray(scaled(np.asarray(picture)[:, :, ::-1]))
