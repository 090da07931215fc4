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
)


def bias_command(
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with images/, labels/ (PNG indices, 255 = not labelled) and classes.txt.",
            show_default=False,
        ),
    ],
    model: Model = "mini",
    checkpoint: Checkpoint = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path(
        "pixelclip-bias"
    ),
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
        str, typer.Option(help="default (keeps the photo's shape) or authors (their protocol).")
    ] = "default",
    short_side: ShortSide = None,
    attention: Attention = "pixelclip",
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no pictures.")] = False,
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    quiet: Quiet = False,
) -> int:
    """Say how a model's mIoU hangs on class frequency and size, and on the words for the classes.

    Tries synonyms, plurals and templates, adds names of things that are nearly a class, and lists
    what is confused. Writes report.json, report.md and pictures.
    """
    import sys

    from pixelclip.backbones import load_backbone
    from pixelclip.config import SegmentConfig, make_config
    from pixelclip.evaluation.datasets import load_folder
    from pixelclip.evaluation.vocabularies import Vocabularies, count_vocabularies
    from pixelclip.evaluation.vocabulary_files import check_plots, markdown, write_pictures
    from pixelclip.evaluation.vocabulary_report import report as make_report
    from pixelclip.evaluation.wordings import load_thesaurus, make_wordings
    from pixelclip.images import check_writable, write_bytes, write_json
    from pixelclip.progress import hush, progress_bar

    hush(quiet)
    config = make_config(
        SegmentConfig,
        preset=preset,
        templates=templates,
        fix_article=fix_article,
        short_side=short_side,
        max_pixels=max_pixels,
    )
    if not no_plots:
        check_plots()
    words = load_thesaurus(thesaurus)
    dataset = load_folder(data)
    check_writable(output)
    backbone = load_backbone(model, checkpoint=checkpoint, device=device, attention=attention)
    vocabularies = Vocabularies(backbone, make_wordings(dataset.classes, words), config)
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task(dataset.name, total=len(dataset.pairs))
        counted = count_vocabularies(vocabularies, dataset, lambda: bar.advance(task))
    report = make_report(vocabularies, dataset, counted)
    write_json(output / "report.json", report)
    page = markdown(report)
    write_bytes(output / "report.md", page.encode())
    if not no_plots:
        write_pictures(report, output)
    if not quiet:
        print(page[: page.index("\n## ")] + f"\nreport.md, report.json -> {output}/")
    for line in report["failed"]:
        print(f"pixelclip: failed: {line}", file=sys.stderr)
    return 1 if report["failed"] else 0
