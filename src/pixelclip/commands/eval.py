"""`pixelclip eval`: figures of models on labelled photos."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.commands.options import (
    Attention,
    Checkpoint,
    Device,
    Engine,
    FixArticle,
    MaxPixels,
    Model,
    Quiet,
    Refine,
    ShortSide,
    Templates,
    Workers,
)


def eval_command(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder with images/, labels/ (PNG indices, 255 = not labelled) and classes.txt;"
            " may be given several times.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Data set as its makers publish it: voc20, voc21, context59, context60,"
            " coco-stuff, coco-object, ade150, cityscapes, ...; may be given several times.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="A protocol over data sets, beside published figures: paper (the authors'), eight"
            " (the training-free field's).",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the downloads: of one data set, or of a folder named like each.",
            show_default=False,
        ),
    ] = None,
    model: Model = "mini",
    checkpoint: Checkpoint = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            help="Training-free method on the same weights, as a row of its own; may be given"
            " several times. docs/rivals.md lists them.",
            show_default=False,
        ),
    ] = None,
    dino: Annotated[
        str | None,
        typer.Option(
            help="Tower for rivals that need one: a name, folder or weight file.",
            show_default=False,
        ),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="Name given masks instead of pixels: truth (regions of each class), superpixels,"
            " mini, dino, sam, or a file or folder of masks.",
            show_default=False,
        ),
    ] = None,
    mask_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--mask-set",
            help="One setting of the source of --masks, as in --mask-set clusters=8; may be given"
            " several times. docs/masks.md lists them.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="What stands for a mask: pooled (dense features), crop, masked-crop; may be given"
            " several times.",
            show_default="all three",
        ),
    ] = None,
    photos: Annotated[
        int | None,
        typer.Option(
            help="At most so many photos of each data set, evenly spaced.", show_default="all"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for table, figures per class, confusion, worst photos; the same command"
            " again goes on where it was stopped.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures to this file.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Protocol: default (keeps the photo's shape), authors, sliding (the training-free"
            " field's).",
            show_default="the suite's, or default",
        ),
    ] = None,
    templates: Templates = None,
    fix_article: FixArticle = False,
    short_side: ShortSide = None,
    attention: Attention = "pixelclip",
    refine: Refine = None,
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    workers: Workers = None,
    engine: Engine = "local",
    quiet: Quiet = False,
) -> int:
    """Compare label maps of models with the truth: mIoU, boundary IoU, accuracy, per-class IoU.

    With --masks, name given masks: accuracy, mIoU, AP.
    All models, data sets and rivals make one table. Figures do not depend on the number of
    workers, nor on how often a run was stopped.
    """
    from pixelclip.backbones.means import Means
    from pixelclip.config import parse_settings
    from pixelclip.errors import ConfigError
    from pixelclip.evaljob import EvalJob, run_eval_job
    from pixelclip.maskeval import MaskQuestion, run_mask_eval
    from pixelclip.progress import hush

    hush(quiet)
    job = EvalJob(
        Means(model, checkpoint, device, attention),
        data=tuple(data or ()),
        datasets=tuple(dataset or ()),
        suite=suite,
        root=root,
        rivals=tuple(rival or ()),
        dino=dino,
        photos=photos,
        preset=preset,
        settings={
            "templates": templates,
            "fix_article": fix_article or None,
            "short_side": short_side,
            "max_pixels": max_pixels,
        },
        refine=refine,
        workers=workers,
        engine=engine,
        output=output,
        json_file=json_file,
        quiet=quiet,
    )
    if masks is None:
        if mask_settings or variant:
            raise ConfigError("--mask-set and --variant go with --masks")
        return run_eval_job(job)
    if refine is not None:
        raise ConfigError("--refine gives label maps their masks, --masks names some; give one")
    settings = parse_settings(mask_settings or [], "--mask-set")
    return run_mask_eval(job, MaskQuestion(masks, settings, tuple(variant or ())))
