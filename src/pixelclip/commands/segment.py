"""`pixelclip segment`: photos and words in, label maps and overlays out."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.commands.options import (
    Attention,
    Checkpoint,
    Device,
    Engine,
    FixArticle,
    Json,
    MaxPixels,
    Model,
    Quiet,
    Refine,
    ShortSide,
    Templates,
    Workers,
)


def segment_command(
    photos: Annotated[
        list[str] | None,
        typer.Argument(
            help="Photos, folders of photos, or places for fsspec (s3://bucket/photos); none: the"
            " sample photos.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            "-c",
            show_default=False,
            help=(
                'Names: "cat, sofa, window"; with synonyms "cat; sofa, couch"; a file with one per'
                " line; or a built-in list such as coco-stuff-171."
            ),
        ),
    ] = None,
    model: Model = "mini",
    checkpoint: Checkpoint = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "pixelclip-out"
    ),
    templates: Templates = None,
    fix_article: FixArticle = False,
    preset: Annotated[
        str, typer.Option(help="default (keeps the photo's shape) or authors (their protocol).")
    ] = "default",
    short_side: ShortSide = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Larger network inputs are cut into windows of so many pixels.", show_default="768"
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            help="none; threshold (unsure pixels get no class); names (pixels of"
            " --background-names get no class).",
            show_default="as the next two say",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Confidence below which a pixel gets no class.", show_default="0.3"),
    ] = None,
    background_names: Annotated[
        str | None, typer.Option(help="Contrast names, written as --classes.", show_default=False)
    ] = None,
    attention: Attention = "pixelclip",
    refine: Refine = None,
    masks: Annotated[
        bool, typer.Option("--masks", help="Put each class's mask (RLE, polygons) in the JSON.")
    ] = False,
    scores: Annotated[
        bool, typer.Option("--scores", help="Write the score of every class (STEM.scores.npz).")
    ] = False,
    no_overlay: Annotated[
        bool, typer.Option("--no-overlay", help="Write no overlay pictures.")
    ] = False,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    max_pixels: MaxPixels = None,
    workers: Workers = None,
    engine: Engine = "local",
    json_output: Json = False,
    quiet: Quiet = False,
) -> int:
    """Segment photos with words.

    Writes STEM.labels.png (class index per pixel, 255 = no class; 16 bit and 65535 above 255
    classes), STEM.overlay.png and STEM.json for every photo. The same command again finishes
    what was not done: results that are there, of the same photo, model, words and settings, are
    kept.
    """
    from pixelclip.backbones.means import Means
    from pixelclip.config import SegmentConfig, make_config
    from pixelclip.job import segment_photos
    from pixelclip.output import Output
    from pixelclip.progress import hush
    from pixelclip.vocabulary import parse_classes

    hush(quiet)
    config = make_config(
        SegmentConfig,
        preset=preset,
        templates=templates,
        fix_article=fix_article,
        short_side=short_side,
        window=window,
        background=_background(background, threshold, background_names),
        threshold=threshold,
        background_names=parse_classes(background_names) if background_names else None,
        precision=precision,
        max_pixels=max_pixels,
    )
    return segment_photos(
        photos or [],
        classes=classes,
        means=Means(model, checkpoint, device, attention),
        config=config,
        refine=refine,
        workers=workers,
        engine=engine,
        output=Output(output, masks, scores, not no_overlay, json_output, quiet),
    )


def _background(kind: str | None, threshold: float | None, names: str | None) -> str:
    """The background mode, which its own options imply; contradictions are an error."""
    from pixelclip.errors import ConfigError

    implied = [
        mode
        for mode, given in (("threshold", threshold is not None), ("names", names is not None))
        if given
    ]
    if any(mode != (kind or implied[0]) for mode in implied):
        raise ConfigError(
            "--threshold goes with --background threshold, --background-names with --background"
            " names; give one of them"
        )
    return kind or (implied[0] if implied else "none")
