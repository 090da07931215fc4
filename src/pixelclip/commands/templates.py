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
    fix_article: FixArticle = False,
    short_side: ShortSide = None,
    attention: Attention = "pixelclip",
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    quiet: Quiet = False,
) -> int:
    """Choose templates for each class on your photos, without labels, as FLOSS does.

    A class gets the templates with which the model is surest where it sees the class. Use them with
    `--templates templates.json` of segment and eval, which then classify once for each set of
    templates, and the surest wins.
    """
    import sys

    from pixelclip.backbones import load_backbone
    from pixelclip.config import SegmentConfig, make_config, validated
    from pixelclip.evaluation.template_choice import (
        ChoiceSettings,
        choose,
        photo_entropies,
        write_choice,
    )
    from pixelclip.images import check_writable
    from pixelclip.photos import find_photos
    from pixelclip.progress import hush, progress_bar
    from pixelclip.segmenter import Segmenter
    from pixelclip.vocabulary import parse_templates, template_features

    hush(quiet)
    config = make_config(
        SegmentConfig,
        fix_article=fix_article,
        short_side=short_side,
        max_pixels=max_pixels,
    )
    settings = validated(ChoiceSettings, {"experts": experts})
    wanted = parse_templates(candidates)
    found = find_photos(photos)
    check_writable(output.parent)
    backbone = load_backbone(model, checkpoint=checkpoint, device=device, attention=attention)
    segmenter = Segmenter(backbone, classes, config=config)
    texts = template_features(backbone, segmenter.classes, wanted, fix_article=fix_article)
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("choosing", total=len(found))
        entropies = photo_entropies(segmenter, found, texts, lambda: bar.advance(task))
    chosen = choose(entropies, settings)
    used = len(found) - len(entropies.failed)
    write_choice(output, segmenter, wanted, chosen, photos=used, settings=settings)
    if not quiet:
        print(f"{len(chosen)} classes, {used} photo(s) -> {output}")
    for line in entropies.failed:
        print(f"pixelclip: failed: {line}", file=sys.stderr)
    return 1 if entropies.failed else 0
