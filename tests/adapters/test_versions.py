from __future__ import annotations

from importlib import metadata

import pytest

from mmguard_adapters.versions import require
from mmguard_plugins import VersionError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions: dict[str, str] = {}

    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)
    return versions


@pytest.mark.parametrize("version", ["1.2", "1.2.0", "1.9.5", "1.3.0rc1+local"])
def test_a_version_inside_the_bounds_is_returned(installed: dict[str, str], version: str) -> None:
    installed["thing"] = version
    assert str(require("thing", "1.2", "2")) == version


@pytest.mark.parametrize("version", ["1.1.9", "2.0", "2.0.1", "10.0"])
def test_a_version_outside_the_bounds_is_refused(installed: dict[str, str], version: str) -> None:
    installed["thing"] = version
    with pytest.raises(VersionError, match=f"thing {version} is untested; mmguard needs <2,>=1.2"):
        require("thing", "1.2", "2")


def test_an_absent_package_is_named(installed: dict[str, str]) -> None:
    with pytest.raises(VersionError, match=r"thing is not installed; mmguard needs <2,>=1\.2"):
        require("thing", "1.2", "2")
