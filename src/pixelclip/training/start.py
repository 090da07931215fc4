"""`pixelclip.train`: the public door to training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pixelclip.backbones.sources import resolve
from pixelclip.config import TrainConfig, train_config
from pixelclip.errors import ConfigError
from pixelclip.training.live import live_source
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
        masks: mask store, folder of SA-1B JSON or label maps, or COCO JSON file; `dino` or `mini`,
            unless there is such a path: made of each view while it is trained on; None:
            superpixels are made first, in `output`/masks.
        model: name, weight file or run directory to start from.
        checkpoint: weights that replace the model's.
        recipe: name of a recipe in the package, or a TOML file.
        device: auto, cpu, cuda, cuda:N or mps.
        quiet: show no progress.
        **settings: fields of `TrainConfig`, over those of the recipe.

    Raises:
        PixelClipError: photos, masks, model, settings or the run directory cannot be used.
    """
    job = make_job(images, output, masks=masks, model=model, checkpoint=checkpoint, device=device)
    return run_job(job, job_config(job, recipe, settings), quiet=quiet)


def make_job(
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    masks: str | Path | None,
    model: str,
    checkpoint: str | Path | None,
    device: str,
) -> TrainJob:
    """What `train` is asked to do.

    Raises:
        ConfigError: the model is the run itself.
    """
    paths = [images] if isinstance(images, str | Path) else images
    if Path(model).resolve() == Path(output).resolve():
        raise ConfigError(f"-o {output} is the model to start from; give another run directory")
    live = live_source(masks)
    return TrainJob(
        images=tuple(Path(path) for path in paths),
        masks=None if masks is None or live else Path(masks),
        output=Path(output),
        model=str(Path(model).resolve()) if Path(model).exists() else model,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        device=device,
        live=live,
    )


def job_config(job: TrainJob, recipe: str | None, settings: Mapping[str, object]) -> TrainConfig:
    """The settings of a job: its model family's recipe, another one, single settings.

    Raises:
        ConfigError: a recipe cannot be read, or a value is not allowed.
        ModelError: there is no such model.
    """
    card = resolve(job.model, weights_wanted=job.checkpoint is None).card
    return train_config(card.family, recipe, settings)
