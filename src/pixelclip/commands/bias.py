"""`pixelclip bias`: what a model's figures owe to words, frequency and size."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.commands.options import (
    Attention,
    Checkpoint,
    Device,
    FixArticle,
    MaxPixels,
    Model,
    Quiet,
    ShortSide,
    Templates,
    Workers,
)


def bias_command(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with images/, labels/ (PNG indices, 255 = not labelled) and classes.txt.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Data set as its makers publish it: voc20, ade150, ...; with --root.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of its download.", show_default=False),
    ] = None,
    model: Model = "mini",
    checkpoint: Checkpoint = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the report; the same command again goes on where it was stopped.",
        ),
    ] = Path("pixelclip-bias"),
    thesaurus: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with synonyms, plurals and near misses (docs/bias.md).",
            show_default="the built-in one",
        ),
    ] = None,
    templates: Templates = None,
    fix_article: FixArticle = False,
    preset: Annotated[
        str,
        typer.Option(
            help="Protocol: default (keeps the photo's shape), authors, sliding (the training-free"
            " field's)."
        ),
    ] = "default",
    short_side: ShortSide = None,
    attention: Attention = "pixelclip",
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no pictures.")] = False,
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> int:
    """Say how a model's mIoU hangs on class frequency and size, and on the words for the classes.

    Tries synonyms, plurals and templates, adds names of things that are nearly a class, and lists
    what is confused. Writes report.json, report.md and pictures. Figures do not depend on the
    number of workers, nor on how often it was stopped.
    """
    from pixelclip.backbones.means import Means
    from pixelclip.biasjob import BiasJob, run_bias_job
    from pixelclip.progress import hush

    hush(quiet)
    job = BiasJob(
        Means(model, checkpoint, device, attention),
        output,
        data=data,
        dataset=dataset,
        root=root,
        thesaurus=thesaurus,
        preset=preset,
        settings={
            "templates": templates,
            "fix_article": fix_article or None,
            "short_side": short_side,
            "max_pixels": max_pixels,
        },
        workers=workers,
        pictures=not no_plots,
        quiet=quiet,
    )
    return run_bias_job(job)
