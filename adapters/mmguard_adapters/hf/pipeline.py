"""Guarding `pipeline("image-text-to-text")`.

The pipeline's processor and model are guarded; what is added here is that an image that cannot be
loaded gives a refusal rather than an error, and that every record carries its decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmguard_adapters.hf import images
from mmguard_adapters.hf.decisions import Decisions, GuardedRecord
from mmguard_adapters.hf.session import Session, collecting

_KEY = "mmguard"


def methods(session: Session) -> dict[str, Callable[..., Any]]:
    """Return the methods that guard a pipeline."""

    def preprocess(
        original: Callable[..., Any], _: Any, inputs: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(inputs, Mapping) and inputs.get("images") is not None:
            # The pipeline loads these before the processor sees them.
            limits, timeout = session.engine.config.limits, kwargs.get("timeout")
            loaded = [images.load(i, limits, timeout) for i in images.flat(inputs["images"])]
            found = images.like(inputs["images"], (image.data for image in loaded))
            with images.preloaded(loaded):
                return original({**inputs, "images": found}, *args, **kwargs)
        return original(inputs, *args, **kwargs)

    def _forward(original: Callable[..., Any], _: Any, *args: Any, **kwargs: Any) -> Any:
        with collecting() as decisions:
            output = original(*args, **kwargs)
        rows = len(output["input_ids"]) if output.get("input_ids") is not None else 1
        each = max(1, len(decisions) // rows)
        # One list for each row, as the pipeline takes a batch apart by rows. Last, since it reads
        # the size of the batch from the first value.
        output[_KEY] = [decisions[i : i + each] for i in range(0, len(decisions), each)]
        return output

    def postprocess(
        original: Callable[..., Any], _: Any, model_outputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        decisions = list(_flat(model_outputs.get(_KEY, ())))
        rest = {key: value for key, value in model_outputs.items() if key != _KEY}
        records = original(rest, *args, **kwargs)
        # transformers < 5.20 drops the last of several returned sequences, hence not strict.
        return [_record(record, found) for record, found in zip(records, decisions, strict=False)]

    return {"preprocess": preprocess, "_forward": _forward, "postprocess": postprocess}


def _flat(decisions: Any) -> Iterator[Decisions]:
    for item in decisions:
        if isinstance(item, Decisions):
            yield item
        else:
            yield from _flat(item)


def _record(record: Mapping[str, Any], decisions: Decisions) -> GuardedRecord:
    guarded = GuardedRecord(record)
    guarded.mmguard = (decisions,)
    return guarded
