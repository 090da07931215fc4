"""The errors a user can cause; each message is one line that says what to do."""


class PixelClipError(Exception):
    """Base of all errors that a command prints as one line (exit code 2)."""


class ConfigError(PixelClipError):
    """An argument or a setting is wrong."""


class DataError(PixelClipError):
    """A photo, a label map or a folder is missing, broken or not as promised."""


class ModelError(PixelClipError):
    """A model name is unknown, or its weights are missing or do not fit."""


class MissingExtra(PixelClipError):
    """An optional package is not installed."""
