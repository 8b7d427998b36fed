"""Running the demo's cases through a guarded pipeline and saying how each went."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from mmguard_plugins import __version__
from mmguard_plugins.config import load_config
from mmguard_plugins.demo.cases import Case, all_cases
from mmguard_plugins.demo.page import write_page
from mmguard_plugins.engine import Engine
from mmguard_plugins.errors import MMGuardError
from mmguard_plugins.types import Action, Decision, Verdict

POLICY = Path(__file__).parent / "mmguard.yaml"
STREAM_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case.

    `decisions` are those of the stages that ran; `sent` are the pieces the client received.
    """

    case: Case
    answer: str
    decisions: tuple[Decision, ...]
    seconds: float
    sent: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def decision(self) -> Decision:
        """The decision that settled what the client read."""
        return self.decisions[-1]

    @property
    def right(self) -> bool:
        """Whether everything went as the case says."""
        return not self.problems

    @property
    def happened(self) -> str:
        """Say what happened in two words."""
        if not self.decision.blocked:
            return "passed"
        return f"stopped at {self.decision.stage.value}"

    @property
    def explanation(self) -> str:
        """Say why, for an operator."""
        if self.problems:
            return "; ".join(self.problems)
        if not self.decision.blocked:
            return "every guard looked and none objected"
        blocking = [r.verdict for r in self.decision.rulings if r.action is Action.BLOCK]
        reasons = [f"{v.guard}: {v.reason}{_also(v)}" for v in blocking]
        if len(self.sent) > 1:
            reasons.append(f"sent before the cut: {''.join(self.sent[:-1])!r}")
        return "; ".join(reasons) or self.decision.reason


def _also(verdict: Verdict) -> str:
    """Return the categories in brackets, unless the guard's reason names them itself."""
    names = ", ".join(verdict.categories)
    named = all(name in verdict.reason for name in verdict.categories)
    return "" if named else f" ({names})"


def run_demo(model: str | None, html: Path, config: str | None, console: Console) -> bool:
    """Run every case, print the table, write the page; return whether all went as they should.

    Without `model` the reference VLM is assembled (once) and used, and its answers are checked too.
    """
    start = time.perf_counter()
    engine = Engine.from_config(load_config(config or POLICY))
    with console.status("loading the model (the first time, assembling it)"):
        pipe, name = _pipeline(model)
        from mmguard_adapters.hf import guard

        guard(pipe, config=engine)
    own_policy, own_model = config is None, model is None
    outcomes: list[Outcome] = []
    with Progress(console=console, transient=True) as bar:
        cases = all_cases()
        task = bar.add_task("cases", total=len(cases))
        for case in cases:
            outcomes.append(_run(pipe, case, own_policy, own_model))
            bar.advance(task)
    console.print(_table(outcomes))
    about = _about(name, time.perf_counter() - start)
    write_page(html, outcomes, about)
    right = sum(outcome.right for outcome in outcomes)
    seconds = about["time"]
    console.print(f"{right} of {len(outcomes)} cases as they should be, {seconds}; page: {html}")
    return right == len(outcomes)


def _pipeline(model: str | None) -> tuple[Any, str]:
    """Return an image-text-to-text pipeline, and the model's name."""
    try:
        from transformers import pipeline
        from transformers.utils import logging
    except ImportError as error:
        raise MMGuardError(
            f"the demo needs more packages ({error}); pip install 'mmguard-plugins[demo]'"
        ) from error
    logging.set_verbosity_error()  # keep hints and progress bars out of the demo's table
    logging.disable_progress_bar()
    if model is not None:
        try:
            return pipeline("image-text-to-text", model=model), model
        except (OSError, ValueError, ImportError) as error:
            problem = str(error).splitlines()[0]
            raise MMGuardError(f"model {model!r} cannot be loaded ({problem})") from error
    from mmguard_trainers import reference_vlm

    loaded, processor = reference_vlm.load(reference_vlm.assemble())
    return pipeline("image-text-to-text", model=loaded, processor=processor), "reference VLM"


def _run(pipe: Any, case: Case, own_policy: bool, own_model: bool) -> Outcome:
    """Ask the guarded pipeline, as a client that reads a stream, and judge what came of it."""
    from transformers import TextIteratorStreamer

    from mmguard_adapters.hf import decision_of

    streamer = TextIteratorStreamer(
        pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=STREAM_TIMEOUT_S
    )
    results: list[Any] = []

    def ask() -> None:
        try:
            options = {"do_sample": False, "streamer": streamer}
            results.append(
                pipe(
                    text=case.chat,
                    max_new_tokens=case.max_new_tokens,
                    return_full_text=False,
                    generate_kwargs=options,
                )
            )
        except Exception as error:  # noqa: BLE001 - shown as the case's problem
            results.append(error)
            streamer.end()

    start = time.perf_counter()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    sent = tuple(piece for piece in streamer if piece)
    thread.join()
    seconds = time.perf_counter() - start
    if isinstance(results[0], Exception):
        raise MMGuardError(f"case {case.name!r} failed: {results[0]}") from results[0]
    record = results[0][0] if isinstance(results[0], list) else results[0]
    found = decision_of(results[0])
    decisions = tuple(decision for decision in (found.input, found.output) if decision)
    answer = record["generated_text"]
    problems = _problems(case, decisions[-1], answer, "".join(sent), own_policy, own_model)
    return Outcome(case, answer, decisions, seconds, sent, tuple(problems))


def _problems(
    case: Case, decision: Decision, answer: str, sent: str, own_policy: bool, own_model: bool
) -> list[str]:
    """Name everything that did not go as the case says."""
    problems = []
    if case.stage == "output" and not own_model and not decision.blocked:
        pass  # another model may have kept the secret by itself; `never` is what counts
    elif decision.blocked is case.must_pass:
        problems.append("should have passed" if case.must_pass else f"should stop at {case.stage}")
    elif decision.blocked:
        blocking = [r.verdict.guard for r in decision.rulings if r.action is Action.BLOCK]
        if decision.stage.value != case.stage:
            problems.append(f"stopped at {decision.stage.value}, not at {case.stage}")
        if own_policy and blocking != ([case.guard] if case.guard else []):
            problems.append(f"stopped by {blocking or 'the engine'}")
        if decision.failed:
            problems.append("a guard failed")
    elif own_model and case.says and not any(word in answer.lower() for word in case.says):
        problems.append(f"the answer names none of {', '.join(case.says)}")
    if not decision.blocked and sent.strip() != answer.strip():
        problems.append("the stream and the result differ")
    leaked = [text for text in case.never if text in sent or text in answer]
    return problems + [f"{text!r} reached the client" for text in leaked]


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("", "case", "what happened", "what the client read", "s")
    for outcome in outcomes:
        mark = Text("ok", style="green") if outcome.right else Text("WRONG", style="bold red")
        colour = "red" if outcome.decision.blocked else "green"
        happened = Text(outcome.happened, style=colour)
        if outcome.decision.blocked or not outcome.right:
            happened.append(f"\n{outcome.explanation}", style="dim")
        answer = Text(outcome.answer.strip())
        table.add_row(mark, Text(outcome.case.name), happened, answer, f"{outcome.seconds:.1f}")
    return table


def _about(model: str, seconds: float) -> dict[str, str]:
    frameworks = (f"{name} {version(name)}" for name in ("transformers", "torch"))
    return {
        "model": model,
        "versions": ", ".join((f"mmguard {__version__}", *frameworks)),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "time": f"{seconds:.0f} s",
    }
