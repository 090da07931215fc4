"""The errors a user can cause; each message is one line that says what to do."""

from unicodedata import category

_UNSEEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, breaks of lines


class PixelClipError(Exception):
    """Base of all errors that a command prints as one line (exit code 2).

    Names of files may hold anything: control characters are shown as Python would write them.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(visible(message))


def visible(text: str) -> str:
    """The text in one line that any encoder takes: other characters as Python escapes them."""
    return "".join(ascii(c)[1:-1] if category(c) in _UNSEEN else c for c in text)


class ConfigError(PixelClipError):
    """An argument or a setting is wrong."""


class DataError(PixelClipError):
    """A photo, a label map or a folder is missing, broken or not as promised."""


class ModelError(PixelClipError):
    """A model name is unknown, or its weights are missing or do not fit."""


class MissingExtra(PixelClipError):
    """An optional package is not installed."""
