"""How core tests build an engine out of guard classes that they define themselves."""

from __future__ import annotations

from typing import Any

from mmguard_plugins import Config, Engine, Guard


def make_engine(
    *classes: type[Guard], entries: dict[str, Any] | None = None, **config: Any
) -> Engine:
    """Return an engine of these guards; `entries` holds settings of single guards by class name."""
    entries = entries or {}
    guards = tuple(cls() for cls in classes)
    settings = [{"use": guard.name} | entries.get(guard.name, {}) for guard in guards]
    return Engine(guards, Config.model_validate({"version": 1, "guards": settings} | config))
