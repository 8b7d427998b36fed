"""Finding guards: discovery is not activation."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from mmguard_plugins import Engine, Guard, GuardError, Request, Verdict, hookimpl, manager
from mmguard_plugins.types import Action


class Installed(Guard):
    """A guard that another package would bring."""

    @hookimpl
    def check_input(self, request: Request) -> Verdict:
        return Verdict(self.name, Action.BLOCK)


def offer(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    group = manager.ENTRY_POINT_GROUP
    found = EntryPoints(EntryPoint(name, value, group) for name, value in points)
    monkeypatch.setattr(manager, "entry_points", lambda group: found)
    monkeypatch.setattr("sys.modules", __import__("sys").modules | {"offered": _module()})


def _module() -> object:
    import types

    module = types.ModuleType("offered")
    module.Installed, module.NotAGuard = Installed, dict  # type: ignore[attr-defined]
    return module


def test_an_installed_guard_runs_only_when_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("extra", "offered:Installed"))
    assert "extra" in manager.installed()
    bundled = {"use": "banned_text", "options": {"phrases": ["bad"]}}
    quiet = Engine.from_config({"version": 1, "guards": [bundled]})
    assert not quiet.check_input(Request("hi")).blocked
    active = Engine.from_config({"version": 1, "guards": [bundled, {"use": "extra"}]})
    assert active.check_input(Request("hi")).blocked


def test_a_name_claimed_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("banned_text", "offered:Installed"))
    with pytest.raises(GuardError, match=r"'banned_text' is claimed by .*; uninstall one"):
        manager.installed()


def test_two_packages_with_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("extra", "offered:Installed"), ("extra", "offered:NotAGuard"))
    with pytest.raises(GuardError, match="'extra' is claimed by"):
        manager.installed()


@pytest.mark.parametrize(
    "value, message",
    [
        ("offered:NotAGuard", "is not a Guard class; derive"),
        ("absent_package:Guard", "cannot be imported"),
    ],
)
def test_what_is_no_guard_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    offer(monkeypatch, ("extra", value))
    with pytest.raises(GuardError, match=message):
        manager.guard_class("extra")


def test_every_bundled_guard_exists_and_has_a_summary() -> None:
    for name in manager.BUNDLED:
        assert manager.guard_class(name).__doc__
