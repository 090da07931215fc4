"""The command line: one command per file of `commands/`, every mistake one line."""

import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from pixelclip import __version__
from pixelclip.commands.ablate import ablate_command
from pixelclip.commands.bias import bias_command
from pixelclip.commands.eval import eval_command
from pixelclip.commands.masks import masks_command
from pixelclip.commands.models import models_command
from pixelclip.commands.pull import pull_command
from pixelclip.commands.push import push_command
from pixelclip.commands.segment import segment_command
from pixelclip.commands.templates import templates_command
from pixelclip.commands.train import train_command
from pixelclip.errors import PixelClipError

# Typer carries its own copy of click or uses the installed one, depending on its version.
_UsageError: type[Exception] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "UsageError"
)

# What torch says on a CPU and on a GPU.
NO_MEMORY = "not enough memory; try a smaller --short-side or --window, in training a smaller batch"
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")

app = typer.Typer(
    name="pixelclip",
    help="Name things in words; every pixel of your photos gets one of those names.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("segment")(segment_command)
app.command("masks")(masks_command)
app.command("eval")(eval_command)
app.command("bias")(bias_command)
app.command("templates")(templates_command)
app.command("train")(train_command)
app.command("ablate")(ablate_command)
app.command("models")(models_command)
app.command("push")(push_command)
app.command("pull")(pull_command)


def _version(wanted: bool | None) -> None:
    if wanted:
        print(f"pixelclip {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    """Name things in words; every pixel of your photos gets one of those names."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 some photos failed, 2 nothing could be done."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name must not end a finished run
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("pixelclip: %(message)s"))
    logging.getLogger("pixelclip").addHandler(handler)
    logging.getLogger("pixelclip").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # its errors come back as ours
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except PixelClipError as error:
        code = _fail(str(error))
    except _UsageError as error:
        code = _fail(f"{_text(error)} (see pixelclip --help)")
    except (typer.Abort, KeyboardInterrupt):
        print("pixelclip: stopped; the files that were written are whole", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # nobody reads on, as in `pixelclip models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the flush at exit must not fail again
        code = 141
    except MemoryError:
        code = _fail(NO_MEMORY)
    except RuntimeError as error:
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        code = _fail(NO_MEMORY)
    except OSError as error:
        code = _fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    sys.exit(code if isinstance(code, int) else 0)


def _text(error: Exception) -> str:
    """Message of a usage error, with the option's name in it."""
    message = getattr(error, "format_message", error.__str__)()
    return str(message).removesuffix(".")


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"pixelclip: error: {line}", file=sys.stderr)
    return 2
