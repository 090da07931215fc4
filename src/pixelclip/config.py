"""Settings as frozen models; every field has a line of its own on what it means."""

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pixelclip.errors import ConfigError


class SegmentConfig(BaseModel):
    """How a photo is segmented; the defaults suit most photos.

    Attributes:
        preset: `default` keeps the photo's shape; `authors` is the authors' protocol: short side
            640, then squashed to a square, features to 64 x 64 (behaviour.md 17 and 18a).
        templates: name of a template set, one template, or a file; empty: the model's own.
        fix_article: write "an" before a vowel; the authors do not.
        half_text: encode class names in float16, as the authors do with OpenAI's weights
            (behaviour.md 6c); None: with their preset and such a model.
        short_side: network input for the photo's shorter side, in pixels; None: the model's own.
        max_downscale: large photos keep at least one network pixel per so many photo pixels.
        window: network inputs larger than this, in pixels, are cut into overlapping windows.
        overlap: share of a window that the next one covers again.
        join: how windows make one map: on the `grid` of features, with weights that fall towards
            their border; or per network pixel (`pixels`), all alike, as mmsegmentation does.
        background: `none`; `threshold`: pixels less confident than `threshold` get no class;
            `names`: pixels won by one of `background_names` get no class.
        threshold: confidence in [0, 1] below which a pixel gets no class.
        background_names: contrast names.
        precision: auto, float32 or bfloat16.
        batch_size: photos, or windows of a large photo, per forward pass.
        max_pixels: photos with more pixels are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["default", "authors"] = "default"
    templates: str = ""
    fix_article: bool = False
    half_text: bool | None = None
    short_side: int | None = Field(None, ge=16, le=8192)
    max_downscale: float = Field(8.0, ge=1)
    window: int = Field(768, ge=64, le=8192)
    overlap: float = Field(0.25, ge=0, le=0.75)
    join: Literal["grid", "pixels"] = "grid"
    background: Literal["none", "threshold", "names"] = "none"
    threshold: float = Field(0.3, ge=0, le=1)
    background_names: tuple[str, ...] = ()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: int = Field(4, ge=1)
    max_pixels: int = Field(128_000_000, ge=1)


class TrainConfig(BaseModel):
    """How a model is trained; the defaults are the authors' settings for ViT-B/16.

    Attributes:
        steps: optimiser steps.
        batch_size: photos per step, over all processes and micro-batches.
        micro_batches: parts that each process cuts its share into, to save memory.
        seed: of everything that is drawn, but the first prompts, which are the same in all runs.
        precision: auto, float32 or bfloat16, of the two image towers and the decoder.

        num_clusters: k, class prompts that masks are assigned to.
        prompt_length: learnable tokens per prompt.
        prompt_start: `random` words of the vocabulary, as the authors, or common `words`.
        class_vectors: `prompts` (learnable), `words` (fixed) or `free` (vectors, no text tower).
        words: for `words`: a class list's name or file, or names with commas; "common" is ours.
        train_templates: set or template that holds the prompts; several are averaged.
        assigner: `sinkhorn`; `queue`: Sinkhorn over the masks of the last steps as well;
            `softmax`: no balancing; `none`: no clusters, every mask is a target of its own and
            is compared with its own teacher feature.
        queue_steps: steps whose masks `queue` remembers.
        temperature: eps, factor on similarities before the assignment.
        momentum: gamma, of the teacher; 0: no momentum encoder, the student is its own teacher.
        strong_view: the student sees a distorted view.
        drop_path: the student drops residual branches as its architecture says (ConvNeXt).
        authors_defects: compute as the authors' code does where it differs from what was meant:
            masks are not padded with their photo, all templates use the first one's words, the
            teacher drops residual branches too, masks made while training cover the padding and
            what is cut out of the view (behaviour.md 11d, 6h, 7d, 19c).

        short_side: photos are resized to this shorter side, in pixels,
        long_side: unless the longer one would pass this,
        crop_size: and cropped to a square of at most this.
        colour: random brightness, contrast, saturation and hue for both views.
        same_aspect: a batch holds only wide or only high photos.
        input_size: network input, in pixels; None: the model's own square.
        mask_size: targets and loss live on a square of so many pixels.
        max_pixels: photos with more pixels are passed over.

        mask_model: what makes masks while training: with `--masks dino` a timm name or folder, with
            `--masks mini` a backbone; None: DINO ViT-S/16, or mini.
        mask_checkpoint: weight file or folder that replaces its weights.
        mask_clusters: masks of a view, clusters of the model's features.
        mask_input: side of its network input, in pixels; None: the view's.

        finetune: `attention` (with position embedding), `full`, or patterns of weight names.
        learning_rate: of the decoder.
        clip_multiplier: of the image tower's rate.
        prompt_multiplier: of the prompts' rate.
        weight_decay: but not of norms.
        clip_norm: gradients of all weights together are scaled down to this norm.
        loss_mean: over the pixels of all processes (`global`) or of each (`rank`, the authors').

        num_workers: processes that read photos.
        checkpoint_every: steps.
        keep_checkpoints: how many of the newest are kept.
        picture_every: steps between pictures of the clusters; 0: none.
        tensorboard: write TensorBoard files as well (an extra).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(10_000, ge=1, le=10**9)
    batch_size: int = Field(48, ge=1, le=65_536)
    micro_batches: int = Field(1, ge=1, le=65_536)
    seed: int = Field(0, ge=0, lt=2**32)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    num_clusters: int = Field(64, ge=1, le=65_536)
    prompt_length: int = Field(4, ge=1, le=64)
    prompt_start: Literal["random", "words"] = "random"
    class_vectors: Literal["prompts", "words", "free"] = "prompts"
    words: str = "common"
    train_templates: str = "single"
    assigner: Literal["sinkhorn", "queue", "softmax", "none"] = "sinkhorn"
    queue_steps: int = Field(16, ge=1, le=65_536)
    temperature: float = Field(100.0, gt=0, le=1e6)
    momentum: float = Field(0.999, ge=0, le=1)
    strong_view: bool = True
    drop_path: bool = True
    authors_defects: bool = False

    short_side: int = Field(1024, ge=16, le=8192)
    long_side: int = Field(1333, ge=16, le=16_384)
    crop_size: int = Field(640, ge=16, le=8192)
    colour: bool = True
    same_aspect: bool = True
    input_size: int | None = Field(None, ge=16, le=8192)
    mask_size: int = Field(256, ge=4, le=4096)
    max_pixels: int = Field(128_000_000, ge=1)

    mask_model: str | None = None
    mask_checkpoint: str | None = None
    mask_clusters: int = Field(16, ge=1, le=256)
    mask_input: int | None = Field(None, ge=16, le=8192)

    finetune: Literal["attention", "full"] | tuple[str, ...] = "attention"
    learning_rate: float = Field(2e-4, gt=0, le=100)
    clip_multiplier: float = Field(0.01, gt=0, le=1e4)
    prompt_multiplier: float = Field(10.0, gt=0, le=1e4)
    weight_decay: float = Field(1e-4, ge=0, le=100)
    clip_norm: float = Field(0.01, gt=0, le=1e6)
    loss_mean: Literal["global", "rank"] = "global"

    num_workers: int = Field(2, ge=0, le=256)
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    picture_every: int = Field(500, ge=0)
    tensorboard: bool = False

    @field_validator("finetune", mode="before")
    @classmethod
    def _patterns(cls, value: object) -> object:
        """Patterns may come as one text with commas; their order means nothing."""
        if isinstance(value, str):
            if value in ("attention", "full"):
                return value
            value = value.split(",")
        if not isinstance(value, Sequence) or not all(isinstance(part, str) for part in value):
            return value
        found = tuple(sorted({part.strip() for part in value} - {""}))
        if not found:
            raise ValueError("names no weights; say attention, full or patterns")
        return found


# May change when a run is resumed: they do not touch the result.
FREE_TO_CHANGE = {
    "num_workers", "checkpoint_every", "keep_checkpoints", "picture_every", "tensorboard"
}  # fmt: skip


def train_config(
    family: str, recipe: str | None = None, settings: Mapping[str, object] | None = None
) -> TrainConfig:
    """Settings of a training run: defaults, the model family's recipe, another one, settings.

    Args:
        family: of the model: vit, convnext or mini.
        recipe: name of a recipe in the package, or a TOML file.
        settings: by name, over everything else; texts are read as TOML values where they are some.

    Raises:
        ConfigError: a recipe cannot be read, or a value is not allowed.
    """
    values: dict[str, object] = {}
    for name in (family, recipe):
        if name is not None:
            values |= read_recipe(name)
            validated(TrainConfig, values, f"recipe {name} ")
    values |= {name: parse_value(value) for name, value in (settings or {}).items()}
    return validated(TrainConfig, values, "--set ")


def recipe_names() -> list[str]:
    """The recipes in the package."""
    folder = files("pixelclip").joinpath("recipes")
    return sorted(
        p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")
    )


def read_recipe(name: str) -> dict[str, object]:
    """A recipe's settings.

    Raises:
        ConfigError: there is no such recipe, or it is no TOML.
    """
    if name in recipe_names():
        return tomllib.loads(files("pixelclip").joinpath(f"recipes/{name}.toml").read_text("utf-8"))
    try:
        return tomllib.loads(Path(name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        available = ", ".join(recipe_names())
        raise ConfigError(f"cannot read recipe {name}: {error}; available: {available}") from error


def parse_settings(settings: Sequence[str], option: str = "--set") -> dict[str, str]:
    """Names and values of `name=value` texts.

    Args:
        settings: the texts.
        option: that they were given to, for messages.

    Raises:
        ConfigError: one has no `=`.
    """
    pairs = [setting.partition("=") for setting in settings]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"{option} {name}: write name=value, with a setting's name")
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_value(value: object) -> object:
    """A text as the TOML value it spells, or as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed: object = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return value
    return value if isinstance(parsed, dict) else parsed  # a template is {} too


Model = TypeVar("Model", bound=BaseModel)


def make_config(cls: type[Model], /, **values: object) -> Model:
    """A settings model from the values of options of the same names; None means: not given.

    Raises:
        ConfigError: a value is not allowed; the message names the option.
    """
    return validated(cls, {key: value for key, value in values.items() if value is not None})


def validated(cls: type[Model], values: Mapping[str, object], origin: str | None = None) -> Model:
    """A settings model from values.

    Args:
        cls: the settings model.
        values: by field.
        origin: where they come from, for messages; None: options.

    Raises:
        ConfigError: a value is not allowed; the message names the field.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = f"--{name.replace('_', '-')}" if origin is None else f"{origin}{name}"
        if first["type"] == "extra_forbidden":
            near = get_close_matches(name, cls.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(cls.model_fields)}"
            raise ConfigError(f"{where}: no such setting; {hint}") from error
        got = repr(first["input"])
        got = got if len(got) <= 80 else f"{got[:77]}..."
        raise ConfigError(f"{where}: {first['msg'].lower()} (got {got})") from error
