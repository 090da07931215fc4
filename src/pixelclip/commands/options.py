"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Name (pixelclip models), weight file or run directory."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Weight file or run directory that replaces the model's weights.",
                 show_default=False),
]  # fmt: skip
Templates = Annotated[
    str | None,
    typer.Option(help='single, imagenet-select, imagenet, name, "a photo of a {}" or a file; one'
                 " of pixelclip templates has experts for the classes, whose surest wins.",
                 show_default="the model's own"),
]  # fmt: skip
Refine = Annotated[
    str | None,
    typer.Option(help="Give each mask one class, that of its mean score: superpixels, mini, dino,"
                 " sam, or a file or folder of masks made before.",
                 show_default=False),
]  # fmt: skip
FixArticle = Annotated[
    bool, typer.Option("--fix-article", help='Write "an" before a vowel (the authors do not).')
]
ShortSide = Annotated[
    int | None,
    typer.Option(help="Network input for the photo's shorter side, in pixels.",
                 show_default="the model's own"),
]  # fmt: skip
Attention = Annotated[
    str,
    typer.Option(help="Last block of a ViT: pixelclip, plain, maskclip, sclip, naclip, clearclip."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(help="Refuse photos with more pixels.", show_default="128000000"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes, on this machine or in the cluster.",
        show_default="1; where models are small and photos many, one per core",
    ),
]
Engine = Annotated[
    str,
    typer.Option(help="local, or ray: the cluster at RAY_ADDRESS, else one on this machine."),
]
