"""What the README shows works as shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from mmguard_plugins import Config, Engine, Request
from mmguard_plugins.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def code(language: str, holding: str) -> str:
    blocks = [block.split("```")[0] for block in README.split(f"```{language}\n")[1:]]
    return next(block for block in blocks if holding in block)


def test_the_example_guard_blocks_dark_pictures() -> None:
    names: dict[str, Any] = {}
    exec(compile(code("python", "class TooDark"), "README.md", "exec"), names)
    guard = names["TooDark"](names["TooDarkConfig"](), "too_dark")
    config = {"version": 1, "guards": [{"use": "too_dark"}], "uninspected": {"text": "allow"}}
    engine = Engine((guard,), Config.model_validate(config))
    assert engine.check_input(Request("hi", images=[Image.new("RGB", (8, 8))])).blocked
    assert not engine.check_input(Request("hi", images=[Image.new("RGB", (8, 8), "red")])).blocked


def test_every_command_in_the_readme_exists() -> None:
    table = README.split("## The command line")[1].split("##")[0]
    named = {
        row.split("`mmguard ")[1].split("`")[0].split()[0]
        for row in table.splitlines()
        if "`mmguard " in row
    }
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    groups = {group.name for group in app.registered_groups}
    assert named == commands | groups
