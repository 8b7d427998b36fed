"""From the trained gate to one int8 ONNX file, refused when int8 changes what it says."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mmguard_plugins.errors import MMGuardError

if TYPE_CHECKING:
    from mmguard_trainers.gate import GateModel

MAX_DRIFT = 0.35  # logits, root mean square, over the categories
MAX_FLIPS = 0.02  # share of texts whose top category's side of 0 changes
MAX_LOSS = 0.003  # mean AUROC over the categories, on the tuning split
OPSET = 18


class ExportError(MMGuardError):
    """The exported model does not say what the trained one says."""


def export(model: GateModel, path: Path, texts: Sequence[str]) -> dict[str, float]:
    """Write `path`, the int8 model, and return how far it is from `model` on `texts`.

    Weights are int8 per channel, activations quantised as they come. Raises `ExportError` when the
    drift is beyond MAX_DRIFT or MAX_FLIPS: then nothing is written.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    model = model.eval().cpu()
    model.encoder.set_attn_implementation("eager")  # exports to plain operators
    with tempfile.TemporaryDirectory() as scratch:
        plain, fused = Path(scratch) / "plain.onnx", Path(scratch) / "fused.onnx"
        _to_onnx(model, plain)
        optimized = optimizer.optimize_model(
            str(plain), model_type="bert", num_heads=12, hidden_size=384
        )
        # The exporter's shapes do not survive the fusion, and the quantiser believes them.
        del optimized.model.graph.value_info[:]
        _forget_sources(optimized.model)
        onnx.save(optimized.model, fused)
        quantize_dynamic(
            fused,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # The head is tiny, and what it is given has no noise to spare.
            nodes_to_exclude=_head_nodes(optimized.model),
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
        )
    quality = compare(model, path, texts)
    if quality["drift"] > MAX_DRIFT or quality["flips"] > MAX_FLIPS:
        path.unlink()
        raise ExportError(f"int8 changes the model too much ({quality}); train with more smoothing")
    return quality


def compare(model: GateModel, path: Path, texts: Sequence[str]) -> dict[str, float]:
    """Return how far the int8 file's logits are from the model's own."""
    from mmguard_trainers.gate import logits_of

    ours, theirs = logits_of(model, texts), served_logits(model, path, texts)
    top = ours.argmax(axis=1)[:, None]
    sides = np.take_along_axis(ours, top, 1) > 0, np.take_along_axis(theirs, top, 1) > 0
    return {
        "drift": round(float(np.sqrt(((ours - theirs) ** 2).mean())), 4),
        "flips": round(float((sides[0] != sides[1]).mean()), 4),
        "texts": len(texts),
        "megabytes": round(path.stat().st_size / 1e6, 1),
    }


def served_logits(model: GateModel, path: Path, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return what the int8 file says of the first 128 tokens of each text, (texts, categories)."""
    from mmguard_plugins.guards.gate.sessions import open_session

    session = open_session(path, 1)
    rows = []
    for text in texts:  # one by one: activations are quantised by batch
        feed = {name: tensor.numpy() for name, tensor in model.tokens([text], 128).items()}
        rows.append(session.run(None, feed)[0][0])
    return np.asarray(rows, np.float64)


def _forget_sources(model: Any) -> None:
    """Drop what the exporter notes of each node: lines and paths of the machine it ran on."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:], model.graph.metadata_props[:]


def _head_nodes(model: Any) -> list[str]:
    """Return the names of the nodes that make the output: the linear head."""
    return [node.name for node in model.graph.node if "logits" in node.output]


def _to_onnx(model: GateModel, path: Path) -> None:
    tokens = model.tokens(["two texts of", "different lengths, one longer than the other"], 128)
    size: Any = {
        0: torch.export.Dim("texts", min=1, max=1024),
        1: torch.export.Dim("tokens", min=2, max=512),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the exporter's own old calls
        torch.onnx.export(
            model,
            (tokens["input_ids"], tokens["attention_mask"]),
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": size, "attention_mask": size},
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            verbose=False,
        )
