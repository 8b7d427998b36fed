"""Every error mmguard raises; messages read `<what> <is wrong>; <what would be right>`."""


class MMGuardError(Exception):
    """The root of mmguard's errors: catch it to catch them all."""


class ConfigError(MMGuardError):
    """The configuration cannot be used; the message names the line and what would be right."""


class GuardError(MMGuardError):
    """A guard cannot be found, built or registered."""


class AdapterError(MMGuardError):
    """A framework object cannot be guarded as asked."""


class VersionError(AdapterError):
    """An installed framework is outside the range mmguard was tested with."""


class Blocked(MMGuardError):  # noqa: N818 - reads as what happened
    """A request or answer was blocked and the caller asked for an exception (`raise_on_block`)."""


class EncodeError(MMGuardError):
    """The smoother failed, so there are no features that may reach the language model."""
