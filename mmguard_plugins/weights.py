"""A weights folder: a `guard.json` that names the guard, its settings and the hash of every file.

A file that was changed, cut short or swapped is found before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmguard_plugins.errors import GuardError

MANIFEST = "guard.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Weights:
    """An opened folder whose files are what its manifest says."""

    folder: Path
    settings: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Return the path of one of the folder's files."""
        return self.folder / name


def open_weights(folder: Path, guard: str) -> Weights:
    """Check a folder and return it. Raises `GuardError` naming the file that is wrong."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        made_for, form = manifest["guard"], manifest["format"]
        files, settings = dict(manifest["files"]), dict(manifest["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuardError(
            f"weights {str(path)!r} cannot be read ({type(error).__name__}: {error});"
            f" name a folder that `mmguard train` wrote for {guard!r}"
        ) from error
    if made_for != guard or form != FORMAT:
        raise GuardError(
            f"weights {str(folder)!r} are for {made_for!r}, format {form!r};"
            f" {guard!r} needs its own, format {FORMAT}"
        )
    for name, expected in files.items():
        _check(folder / name, expected)
    return Weights(folder, settings)


def manifest_of(folder: Path, guard: str, files: list[str], settings: Mapping[str, Any]) -> str:
    """Return the manifest of a folder whose `files` are in place."""
    hashes = {name: _sha256(folder / name) for name in sorted(files)}
    content = {"format": FORMAT, "guard": guard, "files": hashes, "settings": dict(settings)}
    return json.dumps(content, indent=2) + "\n"


def _check(path: Path, expected: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise GuardError(
            f"weights file {str(path)!r} cannot be read ({error}); install the weights anew"
        ) from error
    if found != expected:
        raise GuardError(
            f"weights file {str(path)!r} is damaged (its sha256 is {found[:12]}, not"
            f" {expected[:12]}); install the weights anew"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
