"""`pixelclip templates`: templates for each class, chosen on photos without labels."""

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
)


def templates_command(
    photos: Annotated[
        list[str],
        typer.Argument(help="Photos, folders of photos, or places for fsspec.", show_default=False),
    ],
    classes: Annotated[
        str,
        typer.Option("--classes", "-c", help="Names, written as for segment.", show_default=False),
    ],
    model: Model = "mini",
    checkpoint: Checkpoint = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "templates.json"
    ),
    candidates: Annotated[
        str, typer.Option(help="Templates to choose from: a set, or a file with one per line.")
    ] = "imagenet",
    experts: Annotated[int, typer.Option(help="Templates per class.")] = 4,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Labelled photos (images/, labels/, classes.txt) to measure the effect on.",
            show_default=False,
        ),
    ] = None,
    fix_article: FixArticle = False,
    short_side: ShortSide = None,
    attention: Attention = "pixelclip",
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    quiet: Quiet = False,
) -> int:
    """Choose templates for each class on your photos, without labels, as FLOSS does.

    A class gets the templates with which the model is surest where it sees the class. Use them with
    `--templates templates.json` of segment and eval. Often that is not better: see --check.
    """
    import sys

    from pixelclip.backbones import load_backbone
    from pixelclip.config import SegmentConfig, make_config, validated
    from pixelclip.errors import ConfigError
    from pixelclip.evaluation.datasets import load_folder
    from pixelclip.evaluation.template_choice import (
        ChoiceSettings,
        choose,
        photo_entropies,
        template_features,
        write_choice,
    )
    from pixelclip.evaluation.template_effect import measure_effect
    from pixelclip.images import check_writable
    from pixelclip.photos import find_photos
    from pixelclip.progress import hush, progress_bar
    from pixelclip.segmenter import Segmenter
    from pixelclip.vocabulary import parse_templates

    hush(quiet)
    config = make_config(
        SegmentConfig,
        fix_article=fix_article,
        short_side=short_side,
        max_downscale=1e6,  # in one piece: windows are not used
        max_pixels=max_pixels,
    )
    settings = validated(ChoiceSettings, {"experts": experts})
    wanted = parse_templates(candidates)
    found = find_photos(photos)
    dataset = load_folder(check) if check else None
    check_writable(output.parent)
    backbone = load_backbone(model, checkpoint=checkpoint, device=device, attention=attention)
    segmenter = Segmenter(backbone, classes, config=config)
    if dataset and dataset.classes != segmenter.classes:
        raise ConfigError(f"--check {check} has other classes; give its classes.txt as --classes")
    texts = template_features(segmenter, wanted)
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("choosing", total=len(found))
        entropies = photo_entropies(segmenter, found, texts, lambda: bar.advance(task))
    chosen = choose(entropies, settings)
    used = len(found) - len(entropies.failed)
    write_choice(output, segmenter, wanted, chosen, photos=used, settings=settings)
    if dataset:
        with progress_bar(quiet=quiet) as bar:
            task = bar.add_task("measuring", total=len(dataset.pairs))
            effects = measure_effect(segmenter, dataset, texts, chosen, lambda: bar.advance(task))
        for effect in effects:
            print(f"{effect['name']}: mIoU {effect['miou']:.2f}")
    if not quiet:
        print(f"{len(chosen)} classes, {used} photo(s) -> {output}")
    for line in entropies.failed:
        print(f"pixelclip: failed: {line}", file=sys.stderr)
    return 1 if entropies.failed else 0
