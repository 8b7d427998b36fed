"""The `mmguard` command.

Exit codes: 0 everything passed; 1 something was blocked or a check of `doctor` or a case of `demo`
failed; 2 the command line, the configuration or a file cannot be used.

This module, `cli_evaluate` and `demo/` put the packages together; nothing else in mmguard_plugins
knows adapters or trainers, and both are imported inside the commands that need them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from mmguard_plugins import cli_evaluate
from mmguard_plugins import doctor as doctor_checks
from mmguard_plugins.chat import request_from_chat, response_from_chat
from mmguard_plugins.config import json_schema
from mmguard_plugins.engine import Engine
from mmguard_plugins.errors import MMGuardError
from mmguard_plugins.manager import BUNDLED, HOOK_STAGES, guard_class, installed
from mmguard_plugins.types import Decision

PASSED, BLOCKED, UNUSABLE = 0, 1, 2

app = typer.Typer(
    help="Guardrails inside the vision-language serving stack.",
    epilog="Exit codes: 0 passed, 1 blocked or failed, 2 bad command line, configuration or file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train the weights that mmguard ships.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(cli_evaluate.eval_app, name="eval")
app.command()(cli_evaluate.calibrate)

_out = Console()
_err = Console(stderr=True)

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="Configuration; default $MMGUARD_CONFIG or mmguard.yaml."),
]


@app.command("list")
def list_guards() -> None:
    """List the installed guards, their hooks and where they come from."""
    with _clear_errors():
        table = Table("guard", "hooks", "looks at", "from", "what it does")
        for name, place in sorted(installed().items()):
            try:
                cls = guard_class(name)
            except MMGuardError as error:
                table.add_row(name, "-", "-", place, Text(str(error), style="red"))
                continue
            hooks = [hook for hook in HOOK_STAGES if hasattr(cls, hook)]
            kinds = ", ".join(sorted(cls.inspects))
            origin = "bundled" if name in BUNDLED else place
            summary = (cls.__doc__ or "").strip().splitlines()[0]
            table.add_row(name, "\n".join(hooks), kinds, origin, summary)
        _out.print(table)


@app.command()
def schema() -> None:
    """Print the JSON Schema of mmguard.yaml, for editors."""
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")


@app.command()
def check(
    file: Annotated[str, typer.Argument(help="JSONL file, or - for standard input.")] = "-",
    config: ConfigOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the JSONL here.")
    ] = None,
) -> None:
    """Judge conversations: JSONL in, one JSON decision a line out.

    A line in is `{"messages": [...OpenAI chat...], "response": optional text or message}`.
    A line that cannot be read is blocked and named on standard error. Exit code 1 when anything is
    blocked.
    """
    with _clear_errors():
        engine = Engine.from_config(config)
        lines = _read_lines(file)
        blocked = False
        with _writer(output) as write, _progress(len(lines) if file != "-" else 0) as advance:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    advance()
                    continue
                result = _check_line(engine, line, number)
                blocked |= result["action"] == "block"
                write(json.dumps(result, ensure_ascii=False))
                advance()
        raise typer.Exit(BLOCKED if blocked else PASSED)


@app.command()
def doctor(
    config: ConfigOption = None,
) -> None:
    """Check versions, guards and the configuration of this installation."""
    with _clear_errors():
        table = Table("check", "result", "what to do")
        findings = doctor_checks.examine(config)
        for finding in findings:
            colour = {"ok": "green", "absent": "yellow", "bad": "red"}[finding.state]
            result = Text(finding.result, style=colour)
            table.add_row(Text(finding.what), result, Text(finding.advice))
        _out.print(table)
        raise typer.Exit(BLOCKED if any(f.state == "bad" for f in findings) else PASSED)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Any image-text-to-text model; default the reference VLM.")
    ] = None,
    html: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("mmguard-demo.html"),
    config: ConfigOption = None,
) -> None:
    """Run a real model behind mmguard on real cases; exit code 0 only if each went as it should."""
    with _clear_errors():
        from mmguard_plugins.demo.run import run_demo

        raise typer.Exit(PASSED if run_demo(model, html, config, _out) else BLOCKED)


@train_app.command("reference-vlm")
def train_reference_vlm(
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Measure the shipped weights; train nothing.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Weights folder; default the one this package ships.")
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="For features and checkpoints, 8 GB; a second run goes on.")
    ] = None,
) -> None:
    """Train the reference VLM's projector and LoRA, or measure the shipped ones."""
    with _clear_errors():
        with _training_packages():
            from mmguard_trainers import reference_vlm
        config = reference_vlm.ReferenceVLMConfig(
            scratch=scratch or reference_vlm.default_cache() / "training",
            out=output or reference_vlm.WEIGHTS,
        )
        if evaluate:
            figures = reference_vlm.evaluate(config)
        else:
            figures = {"weights": str(reference_vlm.train(config))}
        _out.print_json(data=figures)


@train_app.command("gate")
def train_gate(
    data: Annotated[
        Path | None,
        typer.Option(envvar="MMGUARD_DATA", help="Labelled sets; default ../shared/data."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Weights folder; default the one this package ships.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="At most; training stops early.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Runs whose weights are averaged.")] = 2,
) -> None:
    """Train the gate's text model, write its weights and card; tens of minutes on a CPU."""
    with _clear_errors():
        with _training_packages():
            from mmguard_plugins.guards.gate.guard import WEIGHTS
            from mmguard_trainers import gate
            from mmguard_trainers.reference_vlm_model import default_cache
        config = gate.GateTraining(
            data=data,
            out=output or WEIGHTS,
            scratch=default_cache() / "gate",
            epochs=epochs,
            seeds=tuple(range(seeds)),
        )
        _out.print_json(data={"weights": str(gate.train(config))})


@train_app.command("text-presence")
def train_text_presence(
    output: Annotated[
        Path | None, typer.Option(help="Weights folder; default the one this package ships.")
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Wallpapers; what is missing is fetched with apt-get.")
    ] = None,
) -> None:
    """Train the net that tells pictures without text, which need not be read."""
    with _clear_errors():
        with _training_packages():
            from mmguard_plugins.guards.image_text.presence import SHIPPED
            from mmguard_trainers import text_presence
            from mmguard_trainers.reference_vlm_model import default_cache
        config = text_presence.TextPresenceConfig(
            output=output or SHIPPED, photos=photos or default_cache() / "wallpapers"
        )
        _out.print_json(data={"weights": str(text_presence.train(config))})


@train_app.command("text-detector")
def train_text_detector(
    output: Annotated[
        Path | None, typer.Option(help="Weights folder; default the one this package ships.")
    ] = None,
) -> None:
    """Make the 8-bit text detector out of rapidocr's."""
    with _clear_errors():
        with _training_packages():
            from mmguard_plugins.guards.image_text.detector import SHIPPED
            from mmguard_trainers import text_detector
        config = text_detector.TextDetectorConfig(output=output or SHIPPED)
        _out.print_json(data={"weights": str(text_detector.train(config))})


def _check_line(engine: Engine, line: str, number: int) -> dict[str, Any]:
    """Judge one line; a line that cannot be read counts as blocked at the input."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or "messages" not in record:
            raise ValueError("is not an object with `messages`")
        unknown = record.keys() - {"messages", "response", "tools", "id"}
        if unknown:
            raise ValueError(f"has unknown fields {sorted(unknown)}; use messages, response, tools")
        request = request_from_chat(record["messages"], record.get("tools") or ())
        response = record.get("response")
        judged = None if response is None else response_from_chat(response)
    except (ValueError, TypeError, RecursionError) as error:
        problem = f"line {number}: {error}"
        _complain(problem)
        return {
            "action": "block",
            "stage": "input",
            "categories": [],
            "verdicts": [],
            "coverage": {},
            "failed": True,
            "reason": problem,
        }
    decision = engine.check_input(request)
    result = decision.to_dict()
    if judged is not None and not decision.blocked:
        result = _merged(decision, engine.check_output(request, judged))
    return result | ({"id": record["id"]} if "id" in record else {})


def _merged(before: Decision, after: Decision) -> dict[str, Any]:
    """Return one result for both stages: the stricter action (the later stage in a tie)."""
    stricter = before if before.action > after.action else after
    result = stricter.to_dict()
    first, second = before.to_dict(), after.to_dict()
    result["categories"] = list(dict.fromkeys(first["categories"] + second["categories"]))
    result["verdicts"] = first["verdicts"] + second["verdicts"]
    result["coverage"] = first["coverage"]
    result["skipped"] = first["skipped"] + second["skipped"]
    result["failed"] = first["failed"] or second["failed"]
    return result


def _read_lines(file: str) -> Any:
    """Return the lines of a file, or an iterator over standard input as it comes."""
    if file == "-":
        return sys.stdin
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MMGuardError(f"{file!r} cannot be read ({error}); name a UTF-8 JSONL file") from error


@contextmanager
def _writer(output: Path | None) -> Generator[Any]:
    """Yield a function that writes a line and flushes, so that nothing decided is lost."""

    def line_to(stream: TextIO) -> Any:
        def write(text: str) -> None:
            stream.write(text + "\n")
            stream.flush()

        return write

    if output is None:
        yield line_to(sys.stdout)
        return
    try:
        stream = output.open("w", encoding="utf-8")
    except OSError as error:
        raise MMGuardError(f"{str(output)!r} cannot be written ({error}); name a file") from error
    with stream:
        yield line_to(stream)


@contextmanager
def _progress(total: int) -> Generator[Any]:
    """Show a progress bar on a terminal's standard error when the length is known."""
    with Progress(console=_err, transient=True, disable=not (total and _err.is_terminal)) as bar:
        task = bar.add_task("checking", total=total)
        yield lambda: bar.advance(task)


def _complain(text: str) -> None:
    _err.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _training_packages() -> Generator[None]:
    """Name the extra that training needs when an import of the block fails."""
    try:
        yield
    except ImportError as error:
        raise MMGuardError(
            f"training needs more packages ({error}); pip install 'mmguard-plugins[demo]'"
        ) from error


@contextmanager
def _clear_errors() -> Generator[None]:
    """Turn mmguard's own errors into one message and exit code 2."""
    try:
        yield
    except MMGuardError as error:
        _complain(f"error: {error}")
        raise typer.Exit(UNUSABLE) from error


if __name__ == "__main__":
    app()
