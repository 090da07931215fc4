"""`pixelclip push`: a trained model to the model hub."""

from pathlib import Path
from typing import Annotated

import typer


def push_command(
    run: Annotated[Path, typer.Argument(help="Run directory.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Repository: OWNER/NAME.", show_default=False)],
    private: Annotated[
        bool, typer.Option("--private", help="Only the owner may see the repository.")
    ] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            help="Write what would be uploaded into this folder, and upload nothing.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Upload a trained model, with a page about it, to the model hub."""
    from pixelclip.hub import push

    print(push(run, repo, private=private, dry_run=dry_run))
    return 0
