"""What the tests of the hf adapter share: an engine that looks for words, and a count of passes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar

from mmguard_plugins import (
    Action,
    Config,
    Engine,
    Guard,
    PartKind,
    Redaction,
    Request,
    Response,
    Verdict,
    hookimpl,
)

INPUT_REFUSAL = "refused at the input"
OUTPUT_REFUSAL = "refused at the output"
ERROR_REFUSAL = "not checked"
BAD_COLOUR = (255, 0, 0)


class Watcher(Guard):
    """Looks for `forbidden` and pure red images in requests, for `needle` in answers."""

    inspects: ClassVar[frozenset[PartKind]] = frozenset({PartKind.TEXT, PartKind.IMAGE})
    inline: ClassVar[bool] = True

    def __init__(self, needle: str = "", action: Action = Action.BLOCK) -> None:
        super().__init__()
        self.needle = needle
        self.action = action
        self.requests: list[Request] = []
        self.responses: list[Response] = []

    @hookimpl
    def check_input(self, request: Request) -> Verdict:
        self.requests.append(request)
        shown = (part.data for part in request.images if not part.problem)
        bad = any(image.getpixel((5, 5)) == BAD_COLOUR for image in shown)
        if bad or "forbidden" in request.text:
            return Verdict(self.name, Action.BLOCK, score=1.0, categories={"test": 1.0})
        if "secret" in request.text:
            return Verdict(self.name, Action.REDACT, redactions=(Redaction("secret", "hidden"),))
        return Verdict(self.name, Action.ALLOW, score=0.0)

    @hookimpl
    def check_output(self, response: Response) -> Verdict:
        self.responses.append(response)
        if not self.needle or self.needle not in response.text:
            return Verdict(self.name, Action.ALLOW, score=0.0)
        redactions = (Redaction(self.needle),) if self.action is Action.REDACT else ()
        return Verdict(self.name, self.action, score=1.0, redactions=redactions)


class InputOnly(Guard):
    """Looks at requests only, so that the engine judges no answers."""

    inspects: ClassVar[frozenset[PartKind]] = frozenset({PartKind.TEXT, PartKind.IMAGE})
    inline: ClassVar[bool] = True

    @hookimpl
    def check_input(self, request: Request) -> Verdict:
        return Verdict(self.name, Action.BLOCK if "forbidden" in request.text else Action.ALLOW)


def engine_of(guard: Guard, **settings: Any) -> Engine:
    refusals = {"input": INPUT_REFUSAL, "output": OUTPUT_REFUSAL, "error": ERROR_REFUSAL}
    data = {"version": 1, "guards": [{"use": guard.name}], "refusals": refusals} | settings
    return Engine((guard,), Config.model_validate(data))


@contextmanager
def counted(model: Any) -> Generator[list[str]]:
    """Count calls of the model's own forward and of its parts, which some families call instead."""
    calls: list[str] = []

    def note(module: Any, *_: Any) -> None:
        calls.append(type(module).__name__)

    modules = [model, *model.children()]
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
