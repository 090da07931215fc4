"""`pixelclip eval`: mIoU of a model on labelled photos."""

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
)


def eval_command(
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with images/, labels/ (PNG indices, 255 = not labelled) and classes.txt.",
            show_default=False,
        ),
    ],
    model: Model = "mini",
    checkpoint: Checkpoint = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures to this file.", show_default=False),
    ] = None,
    templates: Templates = None,
    fix_article: FixArticle = False,
    preset: Annotated[
        str, typer.Option(help="default (keeps the photo's shape) or authors (their protocol).")
    ] = "default",
    short_side: ShortSide = None,
    attention: Attention = "pixelclip",
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    quiet: Quiet = False,
) -> int:
    """Compare a model's label maps with the truth: mIoU, pixel accuracy, per-class IoU."""
    from pixelclip.backbones import load_backbone
    from pixelclip.config import SegmentConfig, make_config
    from pixelclip.errors import DataError
    from pixelclip.evaluation.datasets import load_folder
    from pixelclip.evaluation.evaluate import evaluate, print_report, write_report
    from pixelclip.images import check_writable
    from pixelclip.progress import hush, progress_bar
    from pixelclip.segmenter import Segmenter

    hush(quiet)
    config = make_config(
        SegmentConfig,
        preset=preset,
        templates=templates,
        fix_article=fix_article,
        short_side=short_side,
        max_pixels=max_pixels,
    )
    dataset = load_folder(data)
    if json_file is not None:
        check_writable(json_file.parent)
        if json_file.is_dir():
            raise DataError(f"--json {json_file} is a folder; name a file")
    backbone = load_backbone(model, checkpoint=checkpoint, device=device, attention=attention)
    segmenter = Segmenter(backbone, dataset.classes, config=config)
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task(dataset.name, total=len(dataset.pairs))
        report = evaluate(segmenter, dataset, on_photo=lambda: bar.advance(task))
    if not quiet:
        print_report(report)
    if json_file is not None:
        write_report(json_file, report)
    return 1 if report["failed"] else 0
