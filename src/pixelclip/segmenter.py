"""Photos and words in, a class per pixel out.

One column: plan the network input, read windows, dense features, best class per pixel by bands
(`labelling`). Working memory is bounded by the window and the class block, whatever the photo's
size; masks of `refine` need the whole photo when they are made, and its features at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pixelclip import __version__
from pixelclip.backbones import Backbone, load_backbone
from pixelclip.backbones.pixels import squash, to_pixels
from pixelclip.config import SegmentConfig
from pixelclip.device import autocast
from pixelclip.errors import ConfigError, DataError, ModelError
from pixelclip.images import as_photo, photo_size, resized
from pixelclip.labelling import Labeller, encode_names
from pixelclip.masks.refiner import Refine, Refiner
from pixelclip.masks.runs import PhotoMasks
from pixelclip.photos import Photo
from pixelclip.plan import (
    AUTHORS_GRID,
    Plan,
    authors_size,
    cell_size,
    is_in_windows,
    make_axes,
    make_plan,
    window_weights,
)
from pixelclip.segmentation import Segmentation
from pixelclip.upsample import Axis
from pixelclip.vocabulary import (
    check_classes,
    check_distinct,
    parse_classes,
    parse_templates,
    template_sets,
)

PhotoSource = str | Path | Image.Image | np.ndarray

MAX_SCORE_BYTES = 4 * 2**30


class Prepared(NamedTuple):
    """A photo at the size of its network input, so that the photo itself need not be kept.

    Attributes:
        image: RGB at the network's size (authors' preset: short side 640).
        plan: how it goes through the network.
        height: of the photo, hence of its labels.
        width: of the photo.
        masks: of the photo, each of which gets one class; None: every pixel has its own.
    """

    image: Image.Image
    plan: Plan
    height: int
    width: int
    masks: PhotoMasks | None = None


class Segmenter:
    """Segments photos with one model and one vocabulary; text is encoded once.

    Args:
        model: a backbone, or a name for `load_backbone`.
        classes: names, a comma inside one separating synonyms; or a text for `parse_classes`.
        config: see `SegmentConfig`.
        refine: give each mask one class, that of its mean score: the name of a mask source, a file
            or folder of masks made before, or a source or reader of yours (docs/evaluation.md).
        device: used when `model` is a name.
        cache: keep text features on disk.

    Raises:
        ConfigError: class names or settings are not usable, or there are no such masks.
        DataError: the masks cannot be read.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: Backbone | str,
        classes: Sequence[str] | str,
        *,
        config: SegmentConfig | None = None,
        refine: Refine | Refiner | None = None,
        device: str = "auto",
        cache: bool = True,
    ):
        self.config = config or SegmentConfig()
        self.classes = (
            parse_classes(classes) if isinstance(classes, str) else check_classes(classes)
        )
        contrast: tuple[str, ...] = ()
        if self.config.background == "names":
            contrast = self.config.background_names
            if not contrast:
                raise ConfigError('background by names needs names: --background-names "wall, sky"')
        names = check_classes([*self.classes, *contrast])
        if len(names) >= 65535:
            raise ConfigError(f"{len(names)} names; a 16-bit label map holds 65534")
        self.backbone = load_backbone(model, device=device) if isinstance(model, str) else model
        self.templates = self._templates()
        self.text, self.experts = encode_names(
            self.backbone,
            names,
            self.templates,
            fix_article=self.config.fix_article,
            half=self._half_text(),
            cache=cache,
        )
        check_distinct(self.text, names)
        if refine is not None and not isinstance(refine, Refiner):
            refine = Refiner(refine, str(self.backbone.device))
        self.refiner = refine

    def _half_text(self) -> bool:
        """As set, else as the authors do: with OpenAI's weights or those trained from them."""
        card = self.backbone.card
        openai = card.family == "vit" and card.activation == "quickgelu"
        as_authors = self.config.preset == "authors" and openai
        return as_authors if self.config.half_text is None else self.config.half_text

    def _templates(self) -> tuple[str, ...]:
        """Those of the settings, else the model's own, which a file may only name."""
        if self.config.templates:
            return parse_templates(self.config.templates, of_classes=True)
        own = self.backbone.card.templates
        if own not in template_sets():
            raise ModelError(
                f"{self.backbone.card.name} asks for unknown templates {own!r}; give --templates"
            )
        return template_sets()[own]

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence of str, but one path here
        self, photo: PhotoSource, *, confidence: bool = ..., scores: bool = ...
    ) -> Segmentation: ...

    @overload
    def __call__(
        self, photo: Iterable[PhotoSource], *, confidence: bool = ..., scores: bool = ...
    ) -> list[Segmentation]: ...

    def __call__(
        self,
        photo: PhotoSource | Iterable[PhotoSource],
        *,
        confidence: bool = False,
        scores: bool = False,
    ) -> Segmentation | list[Segmentation]:
        """Segment one photo, or a list of them; photos of one shape share forward passes.

        Args:
            photo: path, PIL image, array (H, W, 3) or (H, W) of uint8, or a list of these.
            confidence: keep the confidence of every pixel too.
            scores: keep the cosine of every class and pixel too.

        Raises:
            ConfigError: scores are asked for, and labels do not follow from them.
            DataError: a photo cannot be read, or score maps would not fit in 4 GiB.
        """
        single = isinstance(photo, str | bytes | Path | Image.Image | np.ndarray)
        if single or not isinstance(photo, Iterable):
            return self.run(
                [self.prepare(cast(PhotoSource, photo))], confidence=confidence, scores=scores
            )[0]
        sources = iter(photo)
        results: list[Segmentation] = []
        while batch := list(islice(sources, self.config.batch_size)):
            prepared = [self.prepare(source) for source in batch]
            results += self.run(prepared, confidence=confidence, scores=scores)
        return results

    def prepare(self, source: PhotoSource, photo: Photo | None = None) -> Prepared:
        """Read a photo and resize it for the network; get its masks, if labels are refined.

        Args:
            source: what it is read from.
            photo: by which its masks are found; None: by the path it is read from.

        Raises:
            DataError: it cannot be read, or has no masks.
        """
        image = as_photo(source, self.config.max_pixels)
        width, height = photo_size(image)
        plan = self.plan(width, height)
        size = (plan.width, plan.height)
        if self.config.preset == "authors":
            size = authors_size(width, height)
        masks = None
        if self.refiner is not None:
            if photo is None and isinstance(source, str | Path):
                photo = self.refiner.photo(Path(source))
            masks = self.refiner(image, photo)
        return Prepared(resized(image, size), plan, height, width, masks)

    def description(self) -> dict[str, object]:
        """Everything that the labels depend on beside photo and names."""
        card, config = self.backbone.card, self.config
        own = card.square if config.preset == "authors" else card.short_side
        return {
            **config.model_dump(),
            "short_side": config.short_side or own,
            "templates": list(self.templates),
            "fused": self.experts is not None,
            "refine": None if self.refiner is None else self.refiner.description,
            "weights": self.backbone.origin,
            "attention": getattr(self.backbone.visual, "attention", None),
            "device": str(self.backbone.device),
            "version": __version__,
        }

    def check_scores(self) -> None:
        """Make sure that labels are those of the highest score, so that scores mean something.

        Raises:
            ConfigError: they are not.
        """
        if self.experts is not None or self.refiner is not None:
            reason = "templates of single classes" if self.experts else "masks"
            raise ConfigError(f"scores cannot be kept with {reason}: they do not make the labels")

    def check_score_size(self, height: int, width: int) -> None:
        """Make sure that the score maps of a photo of that size fit in 4 GiB.

        Raises:
            DataError: they do not.
        """
        if len(self.classes) * height * width * 4 > MAX_SCORE_BYTES:
            raise DataError(
                f"score maps of {len(self.classes)} classes at {width} x {height} pixels exceed"
                " 4 GiB"
            )

    def run(
        self, photos: Sequence[Prepared], *, confidence: bool = False, scores: bool = False
    ) -> list[Segmentation]:
        """Segment prepared photos; those with equal network input share forward passes."""
        if scores:
            self.check_scores()
        results: dict[int, Segmentation] = {}
        for plan in dict.fromkeys(photo.plan for photo in photos):
            members = [index for index, photo in enumerate(photos) if photo.plan == plan]
            if is_in_windows(plan, self.config):
                bands = [self._bands(photos[index]) for index in members]
            else:
                whole = self.features([self._pixels(photos[index]) for index in members])
                bands = [iter([features]) for features in whole]
            for index, rows in zip(members, bands, strict=True):
                photo = photos[index]
                if scores:
                    self.check_score_size(photo.height, photo.width)
                results[index] = self.labeller.label(
                    rows, self.axes(photo), photo.masks, confidence=confidence, scores=scores
                )
        return [results[index] for index in range(len(photos))]

    @property
    def labeller(self) -> Labeller:
        """What makes labels of features."""
        threshold = self.config.threshold if self.config.background == "threshold" else 0.0
        return Labeller(self.classes, self.text, self.experts, self.backbone.temperature, threshold)

    @torch.inference_mode()
    def grid_features(self, photo: Prepared) -> Float[Tensor, "h w D"]:
        """The whole grid of unit-norm features of which a photo's labels are made."""
        if is_in_windows(photo.plan, self.config):
            return torch.cat(list(self._bands(photo)))
        return self.features([self._pixels(photo)])[0]

    def axes(self, photo: Prepared) -> tuple[Axis, Axis]:
        """Where the photo's rows and columns lie on that grid."""
        stride = self.backbone.stride
        return make_axes(photo.plan, self.config, stride, photo.width, photo.height)

    def plan(self, width: int, height: int) -> Plan:
        """Network input and windows for a photo of that size."""
        return make_plan(self.config, self.backbone.card, self.backbone.stride, width, height)

    def _pixels(self, photo: Prepared) -> Float[Tensor, "3 H W"]:
        """The whole photo as network input, RGB in [0, 1]."""
        pixels = to_pixels(photo.image)
        return squash(pixels, photo.plan.height) if self.config.preset == "authors" else pixels

    @torch.inference_mode()
    def features(self, images: Sequence[Float[Tensor, "3 H W"]]) -> Float[Tensor, "B h w D"]:
        """Unit-norm dense features of equally large network inputs.

        With the authors' preset the grid is 64 x 64, resized before normalising (behaviour.md
        17a).
        """
        parts = []
        for start in range(0, len(images), self.config.batch_size):
            batch = torch.stack(list(images[start : start + self.config.batch_size]))
            batch = batch.to(self.backbone.device, self.backbone.dtype)
            with autocast(batch.device, self.config.precision):
                features = self.backbone.dense(batch).float()  # [B, D, h, w]
            if self.config.preset == "authors":
                size = (AUTHORS_GRID, AUTHORS_GRID)
                # A batch of one looks channels-last but has the wrong first stride, and is then
                # resized on the slow path; clone gives it the right one.
                features = features.clone(memory_format=torch.channels_last)
                features = F.interpolate(features, size, mode="bilinear", align_corners=False)
            features = F.normalize(features.permute(0, 2, 3, 1), dim=3)
            if self._cell < self.backbone.stride:
                features = self._at_pixels(features, batch.shape[2], batch.shape[3])
            parts.append(features)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _at_pixels(
        self, features: Float[Tensor, "B h w D"], height: int, width: int
    ) -> Float[Tensor, "B H W D"]:
        """Features of cells interpolated at the pixels of the network input: so are the cosines."""
        stride = self.backbone.stride
        size = (features.shape[1] * stride, features.shape[2] * stride)  # whole cells
        grid = features.permute(0, 3, 1, 2)
        whole = F.interpolate(grid, size, mode="bilinear", align_corners=False)
        return whole[..., :height, :width].permute(0, 2, 3, 1)

    @property
    def _cell(self) -> int:
        """Network pixels per cell of the grid of which labels are made."""
        return cell_size(self.config, self.backbone.stride)

    def _bands(self, photo: Prepared) -> Iterator[Float[Tensor, "r w D"]]:
        """Grid rows of a photo in windows, top to bottom, as soon as they are final.

        Where windows overlap, their unit-norm features are averaged with weights that fall
        towards the window's border (`join` by pixels: all alike); so the cosines are averaged too.
        """
        plan = photo.plan
        grid_width = -(-plan.width // self._cell)
        window_height = plan.window[0]
        device = self.backbone.device
        total = torch.zeros(window_height, grid_width, self.backbone.dim, device=device)
        weight = torch.zeros(window_height, grid_width, 1, device=device)
        top = 0
        for row in plan.rows:
            if row > top:
                done = row - top
                yield total[:done] / weight[:done]
                total = torch.cat([total[done:], torch.zeros_like(total[:done])])
                weight = torch.cat([weight[done:], torch.zeros_like(weight[:done])])
                top = row
            for column, features in self._window_row(photo, row):
                height, width = features.shape[:2]
                weights = window_weights(height, width, self.config).to(device)
                where = (slice(0, height), slice(column, column + width))
                total[where] += features * weights
                weight[where] += weights
        yield total / weight

    def _window_row(
        self, photo: Prepared, row: int
    ) -> Iterator[tuple[int, Float[Tensor, "h w D"]]]:
        """First grid column and features of the windows that begin at one grid row."""
        plan, stride = photo.plan, self._cell
        bottom = min((row + plan.window[0]) * stride, plan.height)
        waiting: list[tuple[int, Tensor]] = []
        for column in plan.columns:
            right = min((column + plan.window[1]) * stride, plan.width)
            box = (column * stride, row * stride, right, bottom)
            pixels = to_pixels(photo.image.crop(box))
            full = len(waiting) == self.config.batch_size
            if waiting and (full or waiting[0][1].shape != pixels.shape):
                yield from self._run_windows(waiting)
                waiting = []
            waiting.append((column, pixels))
        yield from self._run_windows(waiting)

    def _run_windows(self, waiting: list[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        columns = [column for column, _ in waiting]
        yield from zip(columns, self.features([pixels for _, pixels in waiting]), strict=True)


def segment(
    photo: PhotoSource, classes: Sequence[str] | str, model: Backbone | str = "mini"
) -> Segmentation:
    """Segment one photo with words: the two-line API.

    Raises:
        PixelClipError: the photo, a name or the model cannot be used; the message says why.
    """
    return Segmenter(model, classes)(photo)
