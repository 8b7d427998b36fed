"""Version bounds: every framework is patched only between two versions that were tested."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mmguard_plugins.errors import VersionError


def require(package: str, lower: str, upper: str) -> Version:
    """Return the installed version of `package`; raise `VersionError` outside `[lower, upper)`."""
    wanted = SpecifierSet(f">={lower},<{upper}")
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise VersionError(f"{package} is not installed; mmguard needs {wanted}") from error
    if not wanted.contains(installed, prereleases=True):
        raise VersionError(f"{package} {installed} is untested; mmguard needs {wanted}")
    return Version(installed)
