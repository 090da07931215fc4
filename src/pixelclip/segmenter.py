"""Photos and words in, a class per pixel out.

One column: plan the network input, read windows, dense features, best class per pixel by bands.
Working memory is bounded by the window and the class block, whatever the photo's size.
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
from pixelclip.plan import AUTHORS_GRID, Plan, authors_size, make_axes, make_plan, taper
from pixelclip.segmentation import Segmentation, none_label
from pixelclip.upsample import CLASS_BLOCK, Axis, upsample_grid, upsampled_confidence
from pixelclip.vocabulary import (
    check_classes,
    check_distinct,
    class_features,
    parse_classes,
    parse_templates,
    template_sets,
)

PhotoSource = str | Path | Image.Image | np.ndarray

PIXELS_PER_BLOCK = 4_000_000
VALUES_PER_BLOCK = 16_000_000
MAX_SCORE_BYTES = 4 * 2**30


class Prepared(NamedTuple):
    """A photo at the size of its network input, so that the photo itself need not be kept.

    Attributes:
        image: RGB at the network's size (authors' preset: short side 640).
        plan: how it goes through the network.
        height: of the photo, hence of its labels.
        width: of the photo.
    """

    image: Image.Image
    plan: Plan
    height: int
    width: int


class Segmenter:
    """Segments photos with one model and one vocabulary; text is encoded once.

    Args:
        model: a backbone, or a name for `load_backbone`.
        classes: names, a comma inside one separating synonyms; or a text for `parse_classes`.
        config: see `SegmentConfig`.
        device: used when `model` is a name.
        cache: keep text features on disk.

    Raises:
        ConfigError: class names or settings are not usable.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: Backbone | str,
        classes: Sequence[str] | str,
        *,
        config: SegmentConfig | None = None,
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
        self.text = class_features(
            self.backbone,
            names,
            self.templates,
            fix_article=self.config.fix_article,
            half=self._half_text(),
            cache=cache,
        )
        check_distinct(self.text, names)

    def _half_text(self) -> bool:
        """As set, else as the authors do: with OpenAI's weights or those trained from them."""
        card = self.backbone.card
        openai = card.family == "vit" and card.activation == "quickgelu"
        as_authors = self.config.preset == "authors" and openai
        return as_authors if self.config.half_text is None else self.config.half_text

    def _templates(self) -> tuple[str, ...]:
        """Those of the settings, else the model's own, which a file may only name."""
        if self.config.templates:
            return parse_templates(self.config.templates)
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

    def prepare(self, source: PhotoSource) -> Prepared:
        """Read a photo and resize it for the network.

        Raises:
            DataError: it cannot be read.
        """
        photo = as_photo(source, self.config.max_pixels)
        width, height = photo_size(photo)
        plan = self.plan(width, height)
        size = (plan.width, plan.height)
        if self.config.preset == "authors":
            size = authors_size(width, height)
        return Prepared(resized(photo, size), plan, height, width)

    def description(self) -> dict[str, object]:
        """Everything that the labels depend on beside photo and names."""
        card, config = self.backbone.card, self.config
        own = card.square if config.preset == "authors" else card.short_side
        return {
            **config.model_dump(),
            "short_side": config.short_side or own,
            "templates": list(self.templates),
            "weights": self.backbone.origin,
            "attention": getattr(self.backbone.visual, "attention", None),
            "device": str(self.backbone.device),
            "version": __version__,
        }

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
        results: dict[int, Segmentation] = {}
        for plan in dict.fromkeys(photo.plan for photo in photos):
            members = [index for index, photo in enumerate(photos) if photo.plan == plan]
            if len(plan.rows) * len(plan.columns) > 1:
                bands = [self._bands(photos[index]) for index in members]
            else:
                whole = self.features([self._pixels(photos[index]) for index in members])
                bands = [iter([features]) for features in whole]
            for index, rows in zip(members, bands, strict=True):
                results[index] = self._label(
                    rows, photos[index], confidence=confidence, scores=scores
                )
        return [results[index] for index in range(len(photos))]

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
            parts.append(F.normalize(features.permute(0, 2, 3, 1), dim=3))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _bands(self, photo: Prepared) -> Iterator[Float[Tensor, "r w D"]]:
        """Grid rows of a photo in windows, top to bottom, as soon as they are final.

        Where windows overlap, their unit-norm features are averaged with weights that fall
        towards the window's border; so the cosines are averaged too.
        """
        plan = photo.plan
        grid_width = -(-plan.width // self.backbone.stride)
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
                weights = torch.outer(taper(height), taper(width))[..., None].to(device)
                where = (slice(0, height), slice(column, column + width))
                total[where] += features * weights
                weight[where] += weights
        yield total / weight

    def _window_row(
        self, photo: Prepared, row: int
    ) -> Iterator[tuple[int, Float[Tensor, "h w D"]]]:
        """First grid column and features of the windows that begin at one grid row."""
        plan, stride = photo.plan, self.backbone.stride
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

    @torch.inference_mode()
    def _label(
        self,
        bands: Iterator[Float[Tensor, "r w D"]],
        photo: Prepared,
        *,
        confidence: bool,
        scores: bool,
    ) -> Segmentation:
        """Labels of a photo from its grid rows."""
        size = (photo.height, photo.width)
        if scores:
            self.check_score_size(*size)
        stride = self.backbone.stride
        rows, columns = make_axes(photo.plan, self.config, stride, photo.width, photo.height)
        count = len(self.classes)
        labels = np.empty(size, dtype=np.uint8 if count <= 255 else np.uint16)
        sure = np.empty(size, dtype=np.float16) if confidence else None
        maps = np.empty((count, *size), dtype=np.float32) if scores else None
        totals = np.zeros((2, none_label(count) + 1))
        start = 0
        for block, row_axis in self._blocks(bands, rows, size[1]):
            stop = start + len(row_axis.lower)
            part, certain = self._label_block(block, row_axis, columns)
            labels[start:stop] = part
            index = part.ravel().astype(np.intp)
            totals[0] += np.bincount(index, minlength=totals.shape[1])
            totals[1] += np.bincount(index, certain.ravel(), minlength=totals.shape[1])
            if sure is not None:
                sure[start:stop] = certain
            if maps is not None:
                for k in range(count):
                    grid = block @ self.text[k]
                    maps[k, start:stop] = upsample_grid(grid, row_axis, columns)
            start = stop
        mean = (totals[1] / np.maximum(totals[0], 1))[:count]
        return Segmentation(labels, self.classes, mean, sure, maps)

    def _blocks(
        self, bands: Iterator[Float[Tensor, "_ w D"]], rows: Axis, photo_width: int
    ) -> Iterator[tuple[Float[Tensor, "r w D"], Axis]]:
        """Cut bands so that a block's pixels and scores stay small; rows continue seamlessly.

        The rows between the last grid row of one block and the first of the next need both, so
        that last row begins the next block again.
        """
        held: Tensor | None = None
        first = pixel = 0  # grid row of held[0]; next photo row
        for band in bands:
            held = band if held is None else torch.cat([held, band])
            step = self._rows_per_block(rows, photo_width, held.shape[1])
            while len(held) > step + 1:
                stop = int(np.searchsorted(rows.lower, first + step))
                if stop > pixel:
                    yield held[: step + 1], _shifted(rows, pixel, stop, first)
                held, first, pixel = held[step:], first + step, stop
        if held is not None and pixel < len(rows.lower):
            yield held, _shifted(rows, pixel, len(rows.lower), first)

    def _rows_per_block(self, rows: Axis, photo_width: int, grid_width: int) -> int:
        pixels_per_row = len(rows.lower) / (int(rows.lower[-1]) + 1)
        by_pixels = PIXELS_PER_BLOCK / (pixels_per_row * photo_width)
        by_values = VALUES_PER_BLOCK / (grid_width * min(len(self.text), CLASS_BLOCK))
        return max(1, int(min(by_pixels, by_values)))

    def _label_block(
        self, block: Float[Tensor, "r w D"], rows: Axis, columns: Axis
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels and confidences of the photo rows over one block of grid rows."""
        count = len(self.classes)
        best, certain = upsampled_confidence(
            block, self.text, rows, columns, temperature=self.backbone.temperature
        )
        none = none_label(count)
        labels = best.astype(np.uint8 if count <= 255 else np.uint16, copy=False)
        if len(self.text) > count:
            labels = np.where(best >= count, none, labels).astype(labels.dtype)
        if self.config.background == "threshold":
            labels = np.where(certain < self.config.threshold, none, labels).astype(labels.dtype)
        return labels, certain


def _shifted(rows: Axis, start: int, stop: int, first: int) -> Axis:
    return Axis(rows.lower[start:stop] - first, rows.weight[start:stop])


def segment(
    photo: PhotoSource, classes: Sequence[str] | str, model: Backbone | str = "mini"
) -> Segmentation:
    """Segment one photo with words: the two-line API.

    Raises:
        PixelClipError: the photo, a name or the model cannot be used; the message says why.
    """
    return Segmenter(model, classes)(photo)
