"""Whether plots can be drawn: by matplotlib, which is an extra."""

from pixelclip.errors import MissingExtra


def check_plots(option: str) -> None:
    """Make sure that plots can be drawn, before the work and not after it.

    Args:
        option: of the command, to go without them.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - only looked for
    except ImportError as error:
        raise MissingExtra(
            f"plots need matplotlib: pip install 'pixelclip[plots]'; or give {option}"
        ) from error
