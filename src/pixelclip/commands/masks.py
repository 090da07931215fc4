"""`pixelclip masks`: class-agnostic masks for any folder; looked at, scored, exported."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.commands.options import Checkpoint, Device, Engine, Json, MaxPixels, Quiet, Workers


def masks_command(
    photos: Annotated[
        list[str],
        typer.Argument(
            help="Photos, folders of photos, or places for fsspec (s3://bucket/photos).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the mask store; an unfinished one is finished.",
            show_default="pixelclip-masks; with --masks: none",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="superpixels, mini (k-means on its tower), dino (k-means) or sam.",
            show_default="the store's own, or superpixels",
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Use masks that are there: SA-1B's JSON, COCO's, label maps, a store; with -o,"
            " import them.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Of the source: a name of transformers or timm.",
            show_default="the source's own",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting of the source, as in --set clusters=8; may be given several times."
            " docs/masks.md lists them.",
            show_default=False,
        ),
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(
            help="Compare with the true regions in this folder or file (label maps, one or more"
            " people's; or masks).",
            show_default=False,
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Draw a contact sheet of the folder's masks.")
    ] = False,
    clusters: Annotated[
        str | None,
        typer.Option(
            help="Draw masks beside what they are when merged by the clusters of this model or"
            " run directory.",
            show_default=False,
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the masks to this folder (COCO: file).", show_default=False),
    ] = None,
    export_format: Annotated[
        str, typer.Option("--format", help="Of --export: sa1b, coco or labels.")
    ] = "sa1b",
    device: Device = "auto",
    workers: Workers = None,
    engine: Engine = "local",
    shard_size: Annotated[
        int | None,
        typer.Option(
            help="Photos per shard: what a killed process loses at most.",
            show_default="8 to 256, by their number",
        ),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try photos again that failed in an earlier run.")
    ] = False,
    max_pixels: MaxPixels = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> int:
    """Make class-agnostic masks of a folder; look at them, score them, export them.

    The same command again finishes what was not done, and makes the masks of new photos.
    """
    from pixelclip.config import parse_settings
    from pixelclip.images import MAX_PIXELS
    from pixelclip.maskjob import MaskJob, run_mask_job
    from pixelclip.progress import hush

    hush(quiet)
    values: dict[str, object] = dict(parse_settings(settings or []))
    values |= {"model": model} if model is not None else {}
    values |= {"checkpoint": str(checkpoint)} if checkpoint is not None else {}
    job = MaskJob(
        output=output or (None if masks is not None else Path("pixelclip-masks")),
        source=source,
        masks=masks,
        settings=values,
        device=device,
        workers=workers,
        engine=engine,
        shard_size=shard_size,
        retry=retry,
        max_pixels=max_pixels or MAX_PIXELS,
        score=score,
        show=show,
        clusters=clusters,
        export=export,
        export_format=export_format,
    )
    return run_mask_job(photos, job, as_json=json_output, quiet=quiet)
