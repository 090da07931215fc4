"""`pixelclip train`: adapt a model to photos without labels."""

from pathlib import Path
from typing import Annotated

import typer

from pixelclip.commands.options import Checkpoint, Device, Json, Model, Quiet

SHOWN = 10  # photos that could not be used


def train_command(
    images: Annotated[
        list[Path],
        typer.Option(
            help="Photo or folder of photos; may be given several times.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Run directory; an unfinished run there goes on.",
            show_default=False,
        ),
    ],
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Mask store, folder of SA-1B JSON or label maps, or a COCO JSON file; dino or"
            " mini: made of each view while it is trained on.",
            show_default="superpixels, made first",
        ),
    ] = None,
    model: Model = "mini",
    checkpoint: Checkpoint = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings: a recipe's name or a TOML file.", show_default="the model's"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting, as in --set steps=1000; may be given several"
            " times. docs/training.md lists them.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Teach a model where things are, from unlabeled photos; the same command resumes."""
    import json
    import os
    from dataclasses import asdict

    from pixelclip.config import parse_settings
    from pixelclip.device import keep_heap
    from pixelclip.progress import hush
    from pixelclip.training.loop import run_job
    from pixelclip.training.start import job_config, make_job

    hush(quiet)
    keep_heap()
    job = make_job(images, output, masks=masks, model=model, checkpoint=checkpoint, device=device)
    config = job_config(job, recipe, parse_settings(settings or []))
    summary = run_job(job, config, quiet=quiet)
    is_main = os.environ.get("RANK", "0") == "0"  # torchrun starts several of us
    if as_json and is_main:
        print(json.dumps({"output": str(output), **asdict(summary)}))
    elif not quiet and is_main:
        what = "done" if summary.finished else f"stopped after step {summary.steps}"
        print(f"{what}: {output}; try pixelclip segment PHOTO --model {output}")
        for path, message in list(summary.failed.items())[:SHOWN]:
            print(f"not used: {path}: {message}")
        if len(summary.failed) > SHOWN:
            print(f"and {len(summary.failed) - SHOWN} more photos: see {output}/problems.jsonl")
        if summary.broken_masks:
            print(f"{summary.broken_masks} damaged masks were left out")
    if not summary.finished:
        return 130
    return 1 if summary.failed and "RANK" not in os.environ else 0  # torchrun takes 1 for a crash
