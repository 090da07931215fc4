"""Settings as frozen models; every field has a line of its own on what it means."""

from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    background: Literal["none", "threshold", "names"] = "none"
    threshold: float = Field(0.3, ge=0, le=1)
    background_names: tuple[str, ...] = ()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: int = Field(4, ge=1)
    max_pixels: int = Field(128_000_000, ge=1)


Model = TypeVar("Model", bound=BaseModel)


def make_config(cls: type[Model], **values: object) -> Model:
    """A settings model from values; None means: not given.

    Raises:
        ConfigError: a value is not allowed; the message names the field.
    """
    try:
        return cls.model_validate(
            {key: value for key, value in values.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"--{where.replace('_', '-')}: {first['msg'].lower()} (got {first['input']!r})"
        ) from error
