"""Guarding `model.generate`.

What was checked by the guarded processor is known again by content (`provenance`); anything else is
read back and checked here, or refused where it cannot be read back. A blocked row never reaches the
model: the other rows run without it.

Closed, with an error that says so: `custom_generate`, paged caches and the continuous-batching
methods (`generate_batch` and its relatives), which take ids past `generate`. Refused: embeddings,
encoder outputs, filled caches, `negative_prompt_ids`, and media that no guarded processor made.
Open, because training and every wrapper around a model need it: `forward`; so are `generate` of a
submodule (`model.language_model`), private methods, and a `generate` that was looked up before the
model was guarded. Whoever calls these is not guarded.

Where ranks share one model (FSDP, ZeRO-3), a rank whose whole batch is refused does not take part
in the others' passes; give each rank the same requests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import StoppingCriteriaList

from mmguard_adapters.hf import output, rows
from mmguard_adapters.hf.decisions import Decisions, attach
from mmguard_adapters.hf.inversion import holds_tensors, read_back
from mmguard_adapters.hf.processor import bind
from mmguard_adapters.hf.provenance import Admission
from mmguard_adapters.hf.question import ask
from mmguard_adapters.hf.session import Session, trusting, trusts
from mmguard_adapters.hf.streamer import GuardedStreamer, StopWhenBlocked
from mmguard_adapters.refusal import refusal_ids
from mmguard_plugins.errors import AdapterError, Blocked
from mmguard_plugins.types import Action, Coverage, Decision, Stage

CLOSED = (
    "continuous_batching_context_manager",
    "generate_batch",
    "init_continuous_batching",
)
_UNSPLITTABLE = "another row of the batch is blocked, and the batch cannot be split"
_NO_REDACTION = "text to redact stands in token ids, where it cannot be replaced"


def methods(session: Session, model: Any) -> dict[str, Callable[..., Any]]:
    """Return the methods that guard a model."""

    def generate(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        if trusts(model):
            return original(*args, **kwargs)
        return _Call(session, model, original, args, kwargs).run()

    closed = {name: functools.partial(_closed, name) for name in CLOSED if hasattr(model, name)}
    return {"generate": generate} | closed


def admit(session: Session, inputs: rows.Inputs) -> list[Admission]:
    """Return what was decided about each row, judging rows that were never checked as they are."""
    opaque = any(holds_tensors(value) for value in inputs.values())
    known = [None] * rows.count(inputs) if opaque else session.provenance.find(inputs)
    if all(known):
        return [admission for admission in known if admission]
    image_token = session.provenance.image_token
    requests = read_back(inputs, session.tokenizer, session.image_processor, image_token)
    return [
        admission or _admit_unknown(session, request)
        for admission, request in zip(known, requests, strict=True)
    ]


@dataclass
class _Row:
    """One returned sequence in the making."""

    decisions: Decisions
    ids: list[int]
    changed: bool = True


class _Call:
    """One call of `generate`."""

    def __init__(
        self,
        session: Session,
        model: Any,
        original: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        self.session, self.model, self.original = session, model, original
        self.arguments = arguments = bind(original, args, kwargs)
        inputs = arguments.pop("inputs", None)
        if inputs is not None:
            name = model.main_input_name if inputs.is_floating_point() else "input_ids"
            arguments[name] = inputs
        self.inputs = {key: v for key, v in arguments.items() if _is_input(v)}
        self.ask = functools.partial(ask, session, model) if session.processor else None

    def run(self) -> Any:
        """Check, generate, check, and build the result."""
        inner = self.arguments.get("streamer")
        if inner is None:
            self._require_open()
            return self._run(None, admit(self.session, self.inputs))
        streamer: GuardedStreamer | None = None
        try:
            self._require_open()
            admissions = admit(self.session, self.inputs)
            streamer = GuardedStreamer(inner, self.session, admissions[0])
            return self._run(streamer, admissions)
        finally:
            # Whoever reads the stream waits for its end, whatever went wrong here.
            streamer.close() if streamer else inner.end()

    def _require_open(self) -> None:
        if self.arguments.get("custom_generate") is not None:
            raise AdapterError("custom_generate is closed on a guarded model; unguard it first")
        if self._setting("cache_implementation") == "paged":
            raise AdapterError("a paged cache is closed on a guarded model; use another cache")

    def _run(self, streamer: GuardedStreamer | None, admissions: list[Admission]) -> Any:
        images = [len(a.request.images) for a in admissions]
        allowed = [i for i, a in enumerate(admissions) if not a.decision.blocked]
        cut: rows.Spans | None = None
        if 0 < len(allowed) < len(admissions):
            cut = rows.spans(self.inputs, images, self.session.provenance.image_token)
            if cut is None:
                admissions = [_refused(a, _UNSPLITTABLE) for a in admissions]
                allowed = []
        if self.session.raise_on_block and len(allowed) < len(admissions):
            allowed = []  # what they would say is lost to the exception
        layout = self._layout()
        result, generated = None, dict[int, list[_Row]]()
        if allowed:
            result, generated = self._generate(streamer, admissions, allowed, cut, layout)
        elif streamer is not None:
            prompt = self.inputs.get("input_ids")
            shown = None if layout.encoder_decoder or prompt is None else prompt.cpu()
            streamer.refuse(shown)
        return self._finish(streamer, result, layout, admissions, generated)

    def _generate(
        self,
        streamer: GuardedStreamer | None,
        admissions: list[Admission],
        allowed: list[int],
        cut: rows.Spans | None,
        layout: output.Layout,
    ) -> tuple[Any, dict[int, list[_Row]]]:
        """Run the model on the allowed rows and judge what it says."""
        arguments = dict(self.arguments)
        if cut is not None:
            taken = rows.take(self.inputs, cut, allowed)
            arguments = {k: v for k, v in arguments.items() if k not in self.inputs} | taken
        requests = [admissions[i].request for i in allowed for _ in range(layout.returned)]
        stop: list[Any] = []
        early: output.StopEarly | None = None
        checks = self.session.engine.checks_output
        if streamer is not None and checks:
            arguments["streamer"] = streamer
            stop = [StopWhenBlocked(streamer)]
        elif streamer is None and checks and self.session.stop_early and not layout.beams:
            early = output.StopEarly(self.session, requests)
            stop = [early]
        if stop:
            given = arguments.get("stopping_criteria") or ()
            arguments["stopping_criteria"] = StoppingCriteriaList([*given, *stop])
        with trusting(arguments.get("assistant_model")):
            result = self.original(**arguments)
        if streamer is not None:
            streamer.end() if checks else streamer.leave()
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        found: dict[int, list[_Row]] = {}
        for n, ids in enumerate(sequences.tolist()):
            row = allowed[n // layout.returned]
            start = output.prompt_length(layout, sequences, row, n)
            stopped = early.decisions.get(n) if early else None
            if streamer is not None and streamer.blocked:
                stopped = streamer.decision
            made = self._judge(admissions[row], ids, start, stopped, layout)
            found.setdefault(row, []).append(made)
        return result, found

    def _judge(
        self,
        admission: Admission,
        ids: list[int],
        start: int,
        stopped: Decision | None,
        layout: output.Layout,
    ) -> _Row:
        if not self.session.engine.checks_output:
            return _Row(Decisions(admission.decision), ids, changed=False)
        other: list[int] | None = None
        decision = stopped
        if decision is None:
            decision, other = output.judge(self.session, admission.request, ids[start:], self.ask)
        decisions = Decisions(admission.decision, decision)
        if decision.blocked:
            return _Row(decisions, ids[:start] + self._refusal(decision, layout))
        if other is not None:
            ended = [] if layout.eos is None else [layout.eos]
            return _Row(decisions, ids[:start] + other + ended)
        return _Row(decisions, ids, changed=False)

    def _finish(
        self,
        streamer: GuardedStreamer | None,
        result: Any,
        layout: output.Layout,
        admissions: list[Admission],
        generated: dict[int, list[_Row]],
    ) -> Any:
        made: list[_Row] = []
        for i, admission in enumerate(admissions):
            refused = _Row(Decisions(admission.decision), [])
            if i not in generated:
                refused.ids = layout.prompts[i] + self._refusal(admission.decision, layout)
            made += generated.get(i, [refused] * layout.returned)
        decisions = tuple(row.decisions for row in made)
        if streamer is not None:
            streamer.report(decisions[0])
        self.session.report(decisions)
        if self.session.raise_on_block:
            _raise_if_blocked(decisions)
        if result is None or any(row.changed for row in made):
            result = output.rebuild(result, layout, [row.ids for row in made], self.model.device)
        attach(result, decisions)
        return result

    def _refusal(self, decision: Decision, layout: output.Layout) -> list[int]:
        return refusal_ids(self.session.engine, decision, self.session.tokenizer, layout.eos)

    def _layout(self) -> output.Layout:
        total = rows.count(self.inputs)
        ids = self.inputs.get("input_ids")
        eos = _first(self._setting("eos_token_id"))
        pad = _first(self._setting("pad_token_id"))
        encoder_decoder = bool(self.model.config.is_encoder_decoder)
        if encoder_decoder:
            ids = self.inputs.get("decoder_input_ids")
            start = _first(self._setting("decoder_start_token_id"))
            start = self.model.config.decoder_start_token_id if start is None else start
            prompts = [[] if start is None else [int(start)]] * total
        else:
            prompts = [[]] * total
        return output.Layout(
            returned=int(self._setting("num_return_sequences") or 1),
            pad=pad if pad is not None else eos if eos is not None else 0,
            eos=eos,
            as_dict=bool(self._setting("return_dict_in_generate")),
            beams=int(self._setting("num_beams") or 1) > 1,
            encoder_decoder=encoder_decoder,
            prompts=ids.tolist() if ids is not None else prompts,
        )

    def _setting(self, name: str) -> Any:
        """Return a generation setting as this call has it."""
        if self.arguments.get(name) is not None:
            return self.arguments[name]
        given = getattr(self.arguments.get("generation_config"), name, None)
        return given if given is not None else getattr(self.model.generation_config, name, None)


def _closed(name: str, *_: Any, **__: Any) -> Any:
    raise AdapterError(f"{name} is closed on a guarded model; use generate, or unguard first")


def _is_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or holds_tensors(value)


def _admit_unknown(session: Session, request: Any) -> Admission:
    decision = session.engine.check_input(request)
    if decision.action is Action.REDACT:
        decision = replace(decision, action=Action.BLOCK, reason=_NO_REDACTION)
    return Admission(request, decision)


def _refused(admission: Admission, reason: str) -> Admission:
    if admission.decision.blocked:
        return admission
    coverage: Coverage = admission.decision.coverage
    decision = Decision(Action.BLOCK, Stage.INPUT, coverage=coverage, reason=reason)
    return Admission(admission.request, decision)


def _raise_if_blocked(decisions: Sequence[Decisions]) -> None:
    for row, found in enumerate(decisions):
        if found.blocked:
            stage = found.last.stage.value
            raise Blocked(f"row {row} is blocked at the {stage}; see .decision", found.last)


def _first(value: Any) -> int | None:
    """Return the first of one or several token ids."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return None if value is None else int(value)
