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
    """List the models that can be loaded by name: size, licence, what is on this machine."""
    import json

    from rich.console import Console
    from rich.table import Table

    from pixelclip.backbones.listing import list_models

    rows = [row for row in list_models() if pattern.lower() in row["name"].lower()]
    if json_output:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table("model", "parameters", "licence of the weights", "on this machine")
    table.columns[1].justify = "right"
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.0f} M",
            row["licence"],
            "yes" if row["cached"] else "no",
        )
    console = Console()
    console.print(table)
    console.print(
        "Also: hf-hub:ORGANISATION/REPOSITORY (an open_clip model), a weight file, a run directory."
    )
    return 0
