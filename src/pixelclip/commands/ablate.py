"""`pixelclip ablate`: which part of the method is worth what, trained and measured."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.commands.options import Device, Json, Quiet


def ablate_command(
    config: Annotated[
        str,
        typer.Argument(
            help="A plan of the package (mini, mini-components, vit-clusters, ...;"
            " docs/ablations.md) or a TOML file.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder of runs, masks, table and plot; an unfinished grid there goes on.",
            show_default=False,
        ),
    ],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="Values of one setting, as in k=64,128,256; several: all combinations.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Photo or folder to train on; may be given several times.",
            show_default="the plan's",
        ),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="superpixels, mini, dino or sam: made once; live-dino or live-mini; or a path.",
            show_default="the plan's",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Data set to evaluate on: a folder with images/, labels/, classes.txt, or"
            " NAME=FOLDER (voc20=VOCdevkit); may be given several times.",
            show_default="the plan's",
        ),
    ] = None,
    photos: Annotated[
        int | None,
        typer.Option(
            help="At most so many photos of each data set, evenly spaced.",
            show_default="the plan's",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="To start from.", show_default="the plan's"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights that replace the model's.", show_default="the plan's"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One training setting for all cells, as in steps=1000; may be given several"
            " times.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Draw plot.png and plot.svg (an extra).")] = True,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train and evaluate a grid of settings; one table and plot. The same command resumes."""
    import os

    from pixelclip.ablation.plan import parse_vary, read_plan
    from pixelclip.ablation.table import markdown
    from pixelclip.ablation.work import ablate
    from pixelclip.config import parse_settings
    from pixelclip.device import keep_heap
    from pixelclip.errors import ConfigError
    from pixelclip.progress import hush

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("ablate trains in one process; start it without torchrun")
    hush(quiet)
    keep_heap()
    given: dict[str, object] = {
        "images": images,
        "masks": masks,
        "data": data,
        "photos": photos,
        "model": model,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "vary": parse_vary(vary or []) or None,
        "settings": parse_settings(settings or []) or None,
    }
    plan = read_plan(
        config, {key: value for key, value in given.items() if value not in (None, [])}
    )
    table = ablate(plan, output, device=device, plot=plot, quiet=quiet)
    if as_json:
        print((output / "table.json").read_text(encoding="utf-8"), end="")
    elif not quiet:
        print(markdown(table), end="")
    if table.stopped:
        return 130
    return 1 if table.failed else 0
