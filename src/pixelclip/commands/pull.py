"""`pixelclip pull`: a model that `push` uploaded, from the model hub into a folder."""

from pathlib import Path
from typing import Annotated

import typer


def pull_command(
    repo: Annotated[str, typer.Argument(help="Repository: OWNER/NAME.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.", show_default=False)],
) -> int:
    """Fetch a model from the model hub; then --model DIR works without a network."""
    from pixelclip.hub import pull

    card = pull(repo, output)
    needs = f" (its words are read by {card.base}, fetched at the first use)" if card.base else ""
    print(f"{output}{needs}; try pixelclip segment PHOTO --model {output}")
    return 0
