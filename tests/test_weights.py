import json
from pathlib import Path

import pytest

from mmguard_plugins.errors import GuardError
from mmguard_plugins.weights import MANIFEST, manifest_of, open_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.bin").write_bytes(b"numbers")
    (tmp_path / MANIFEST).write_text(manifest_of(tmp_path, "mine", ["model.bin"], {"k": 1}))
    return tmp_path


def test_an_intact_folder_opens_with_its_settings(folder: Path) -> None:
    weights = open_weights(folder, "mine")
    assert weights.settings == {"k": 1}
    assert weights.file("model.bin").read_bytes() == b"numbers"


@pytest.mark.parametrize("content", [b"number", b"numbers ", b""])
def test_a_changed_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.bin").write_bytes(content)
    with pytest.raises(GuardError, match=r"model\.bin.* is damaged.*install the weights anew"):
        open_weights(folder, "mine")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model.bin").unlink()
    with pytest.raises(GuardError, match=r"model\.bin.* cannot be read"):
        open_weights(folder, "mine")


def test_weights_of_another_guard_are_refused(folder: Path) -> None:
    with pytest.raises(GuardError, match=r"are for 'mine'.*'yours' needs its own"):
        open_weights(folder, "yours")


def test_weights_of_another_format_are_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | {"format": 99}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(GuardError, match="format 99"):
        open_weights(folder, "mine")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"guard": "mine", "format": 1}'])
def test_a_manifest_that_says_nothing_is_one_clear_error(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(GuardError, match=r"guard\.json.* cannot be read.*mmguard train"):
        open_weights(folder, "mine")


def test_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="cannot be read"):
        open_weights(tmp_path / "nowhere", "mine")
