"""Opening a model in ONNX Runtime the way a server wants it: few threads, no memory hoarded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from mmguard_plugins.errors import GuardError


def open_session(path: Path, threads: int) -> Any:
    """Return an inference session; it may be run from every thread. Raises `GuardError`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # keeps the largest batch ever seen in memory
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, which share no base
        raise GuardError(
            f"model {path.name!r} cannot be loaded ({error}); install the weights anew"
        ) from error
