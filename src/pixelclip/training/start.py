"""`pixelclip.train`: the public door to training."""

from collections.abc import Sequence
from pathlib import Path

from pixelclip.backbones.sources import resolve
from pixelclip.config import train_config
from pixelclip.training.loop import TrainJob, run_job
from pixelclip.training.report import TrainSummary


def train(
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    masks: str | Path | None = None,
    model: str = "mini",
    checkpoint: str | Path | None = None,
    recipe: str | None = None,
    device: str = "auto",
    quiet: bool = True,
    **settings: object,
) -> TrainSummary:
    """Teach a model where things are, from unlabeled photos; an unfinished run goes on.

    Args:
        images: photos or folders of photos.
        output: run directory; `load_backbone(output)` gives the result.
        masks: mask store, folder of SA-1B JSON or label maps, or COCO JSON file; None: superpixels
            are made first, in `output`/masks.
        model: name, weight file or run directory to start from.
        checkpoint: weights that replace the model's.
        recipe: name of a recipe in the package, or a TOML file.
        device: auto, cpu, cuda, cuda:N or mps.
        quiet: show no progress.
        **settings: fields of `TrainConfig`, over those of the recipe.

    Raises:
        PixelClipError: photos, masks, model, settings or the run directory cannot be used.
    """
    paths = [images] if isinstance(images, str | Path) else images
    replaced = None if checkpoint is None else Path(checkpoint)
    card = resolve(model, weights_wanted=checkpoint is None).card
    config = train_config(card.family, recipe, settings)
    job = TrainJob(
        images=tuple(Path(path) for path in paths),
        masks=None if masks is None else Path(masks),
        output=Path(output),
        model=model,
        checkpoint=replaced,
        device=device,
    )
    return run_job(job, config, quiet=quiet)
