"""`pixelclip models`: what `--model` takes."""

from typing import Annotated

import typer

from pixelclip.commands.options import Json


def models_command(
    pattern: Annotated[
        str, typer.Argument(help="Show only names that contain this.", show_default=False)
    ] = "",
    json_output: Json = False,
) -> int:
    """List the models that can be loaded by name: size, licence, what is on this machine.

    Into a file or another program: name, parameters, licence, here, separated by tabs.
    """
    import json
    import sys

    from rich.console import Console
    from rich.table import Table

    from pixelclip.backbones.listing import list_models

    rows = [row for row in list_models() if pattern.lower() in row["name"].lower()]
    if json_output:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        from pixelclip.backbones.catalog import unknown_model

        raise unknown_model(pattern)
    if not sys.stdout.isatty():
        for row in rows:
            cached = "here" if row["cached"] else "-"
            print(row["name"], row["parameters"], row["licence"], cached, sep="\t")
        return 0
    table = Table("model", "float32", "licence of the weights", "here", box=None)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[1].justify = "right"
    for row in rows:
        size = f"{row['parameters'] * 4 / 1e6:.0f} MB"
        table.add_row(row["name"], size, row["licence"], "yes" if row["cached"] else "")
    console = Console()
    console.print(table)
    console.print(
        "Also: hf-hub:ORGANISATION/REPOSITORY (an open_clip model), a weight file, a run directory."
    )
    return 0
