"""From the features of a photo's grid to a class per pixel.

Scores are made, up-sampled and compared in blocks of grid rows, whatever the photo's size. Two
options change whose score counts: templates for each class (FLOSS, arXiv 2504.10487), and masks of
which each gets one class.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from pixelclip.backbones import Backbone
from pixelclip.errors import ConfigError
from pixelclip.masks.refine import mask_means, paint
from pixelclip.masks.runs import PhotoMasks
from pixelclip.segmentation import Segmentation, none_label
from pixelclip.upsample import (
    CLASS_BLOCK,
    Axis,
    ScoreBlocks,
    candidates,
    upsample_grid,
    upsampled_confidence,
)
from pixelclip.vocabulary import OWN, class_features, template_features

PIXELS_PER_BLOCK = 4_000_000
VALUES_PER_BLOCK = 16_000_000
MAX_EXPERT_VALUES = 2**28  # of all names in all templates: 1 GiB

Named = tuple[slice | tuple[slice, slice], Integer[np.ndarray, "*N"], Float[np.ndarray, "*N"]]
Judge = Callable[[Tensor, Bool[np.ndarray, " K"] | None], Named | None]


class TemplateGroups(NamedTuple):
    """Which templates are whose.

    Attributes:
        templates: every one once.
        common: indices of those for all classes; of all where every one is of some class.
        sets: indices of the templates that some of the names have as theirs; a name that has none
            of its own has the common ones.
        owners: per name the index of its set.
    """

    templates: tuple[str, ...]
    common: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]


def group_templates(names: Sequence[str], templates: Sequence[str]) -> TemplateGroups | None:
    """Which templates are whose; None where no name has any of its own.

    Args:
        names: of the classes.
        templates: each with one `{}`; "sofa", a tab and a template: for the class "sofa" alone.

    Raises:
        ConfigError: all templates belong to other classes.
    """
    named: dict[str, dict[str, None]] = {}  # as sets that keep their order
    for template in templates:
        name, _, rest = template.rpartition(OWN)
        named.setdefault(name.strip(), {})[rest] = None
    common = named.pop("", {})
    every = tuple(dict.fromkeys([*common, *(text for own in named.values() for text in own)]))
    places = {text: index for index, text in enumerate(every)}
    sets: dict[tuple[int, ...], int] = {}
    owners = []
    for name in names:
        own = tuple(places[text] for text in named.get(name.strip(), common))
        if not own:
            raise ConfigError(f"the class {name!r} has no templates; all belong to other classes")
        owners.append(sets.setdefault(own, len(sets)))
    if not any(name.strip() in named for name in names):
        return None
    return TemplateGroups(
        every, tuple(places[text] for text in common or every), tuple(sets), tuple(owners)
    )


@dataclass(frozen=True, eq=False)
class Experts:
    """One classifier for each set of templates that some of the names have as their own.

    Attributes:
        texts: unit-norm feature per name and template, synonyms averaged.
        groups: which templates are whose.
    """

    texts: Float[Tensor, "K T D"]
    groups: TemplateGroups

    def __post_init__(self) -> None:
        """Check the size.

        Raises:
            ConfigError: names and templates are too many.
        """
        if self.texts.numel() > MAX_EXPERT_VALUES:
            names, templates, _ = self.texts.shape
            raise ConfigError(
                f"{names} names in {templates} templates are too many for templates of each class"
            )

    def average(self) -> Float[Tensor, "K D"]:
        """All names in the templates that are for all of them."""
        return self._in_templates(self.groups.common)

    def __iter__(self) -> Iterator[tuple[Bool[np.ndarray, " K"], Float[Tensor, "K D"]]]:
        """Each expert: the names whose templates it uses, and all names in these templates."""
        owners = np.array(self.groups.owners)
        for index, templates in enumerate(self.groups.sets):
            yield owners == index, self._in_templates(templates)

    def _in_templates(self, templates: tuple[int, ...]) -> Float[Tensor, "K D"]:
        return F.normalize(self.texts[:, list(templates)].mean(dim=1), dim=1)


def encode_names(
    backbone: Backbone,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    fix_article: bool,
    half: bool,
    cache: bool,
) -> tuple[Float[Tensor, "K D"], Experts | None]:
    """The features of all names; with experts where some have templates of their own.

    Args:
        backbone: whose text tower it is.
        names: of the classes.
        templates: as for `group_templates`.
        fix_article: see `vocabulary.fill`.
        half: compute in float16.
        cache: keep features on disk.

    Raises:
        ConfigError: a name has no templates, or there are too many of both.
    """
    groups = group_templates(names, templates)
    if groups is None:
        common = [template for template in templates if OWN not in template]
        return class_features(
            backbone, names, common, fix_article=fix_article, half=half, cache=cache
        ), None
    each = template_features(
        backbone, names, groups.templates, fix_article=fix_article, half=half, cache=cache
    )
    experts = Experts(each, groups)
    return experts.average(), experts


def fused(
    judge: Judge, text: Float[Tensor, "K D"], experts: Experts | None
) -> tuple[Integer[np.ndarray, "*N"], Float[np.ndarray, "*N"]]:
    """The best name and its confidence, by one classifier or by the fusion of experts (FLOSS).

    Where experts say a name whose templates they use, the surest of them wins, the first of equally
    sure ones; elsewhere the average classifier decides.

    Args:
        judge: a classifier's decisions from its features of all names: where they are, the best
            name there and its confidence. Given the names that matter, it may leave out places
            where none of them is the best, or answer None where that is so everywhere.
        text: the average classifier's.
        experts: None: there are none.
    """
    everywhere = judge(text, None)
    assert everywhere is not None
    _, best, sure = everywhere
    if experts is None:
        return best, sure
    best, sure = best.copy(), sure.copy()
    surest = np.zeros_like(sure)
    for is_own, features in experts:
        judged = judge(features, is_own)
        if judged is not None:
            where, names, certain = judged
            wins = is_own[names] & (certain > surest[where])
            best[where][wins] = names[wins]
            sure[where][wins] = surest[where][wins] = certain[wins]
    return best, sure


@dataclass(frozen=True, eq=False)
class Labeller:
    """All that makes labels of features.

    Attributes:
        classes: the names; further texts are names of background, which get no class.
        text: unit-norm feature of each name.
        experts: for templates of each class; `text` is then their average.
        temperature: factor on cosines before the softmax that confidence is made of.
        threshold: pixels or masks less confident than that get no class.
    """

    classes: tuple[str, ...]
    text: Float[Tensor, "K D"]
    experts: Experts | None
    temperature: float
    threshold: float = 0.0

    @torch.inference_mode()
    def label(
        self,
        bands: Iterator[Float[Tensor, "_ w D"]],
        axes: tuple[Axis, Axis],
        masks: PhotoMasks | None = None,
        *,
        confidence: bool = False,
        scores: bool = False,
    ) -> Segmentation:
        """The labels of a photo from its grid rows.

        Args:
            bands: unit-norm features of grid rows, top to bottom. With masks they are held at once.
            axes: where the photo's rows and columns lie on the grid.
            masks: each gets one class, that of its mean score, smaller ones on top; its confidence
                is the softmax of its mean scores.
            confidence: keep the confidence of every pixel too.
            scores: keep the cosine of every class and pixel too.
        """
        rows, columns = axes
        if masks is not None:
            grid = torch.cat(list(bands))
            bands = iter([grid])
        size, count = (len(rows.lower), len(columns.lower)), len(self.classes)
        labels = np.empty(size, dtype=np.uint8 if count <= 255 else np.uint16)
        kept = masks is not None or confidence
        sure = np.empty(size, dtype=np.float32 if masks else np.float16) if kept else None
        maps = np.empty((count, *size), dtype=np.float32) if scores else None
        totals = np.zeros((2, none_label(count) + 1))
        start = 0
        for block, row_axis in self._blocks(bands, rows, size[1]):
            stop = start + len(row_axis.lower)
            labels[start:stop], certain = self._pixels(block, row_axis, columns)
            if masks is None:
                totals += _totals(labels[start:stop], certain, totals.shape[1])
            if sure is not None:
                sure[start:stop] = certain
            if maps is not None:
                for k in range(count):
                    maps[k, start:stop] = upsample_grid(block @ self.text[k], row_axis, columns)
            start = stop
        if masks is not None:
            assert sure is not None
            best, certain = self._masks(mask_means(grid, masks, rows, columns))
            labels, sure = paint(labels, masks, best), paint(sure, masks, certain)
            totals = _totals(labels, sure, totals.shape[1])
        mean = (totals[1] / np.maximum(totals[0], 1))[:count]
        kept_map = sure.astype(np.float16) if sure is not None and confidence else None
        return Segmentation(labels, self.classes, mean, kept_map, maps)

    def _pixels(
        self, block: Float[Tensor, "r w D"], rows: Axis, columns: Axis
    ) -> tuple[Integer[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
        """Labels and confidences of the photo's rows over one block of grid rows."""

        def judge(text: Tensor, names: Bool[np.ndarray, " K"] | None) -> Named | None:
            if names is None:
                box = _Box(slice(None), slice(None), block, rows, columns)
            elif (found := _box_of(block, text, rows, columns, names)) is None:
                return None
            else:
                box = found
            best, certain = upsampled_confidence(
                box.block, text, box.on_rows, box.on_columns, temperature=self.temperature
            )
            return (box.rows, box.columns), best, certain

        return self._labels(*fused(judge, self.text, self.experts))

    def _masks(
        self, means: Float[Tensor, "M D"]
    ) -> tuple[Integer[np.ndarray, " M"], Float[np.ndarray, " M"]]:
        """Labels and confidences of masks."""

        def judge(text: Tensor, names: Bool[np.ndarray, " K"] | None) -> Named:
            best, certain = [], []
            for part in means.split(max(1, VALUES_PER_BLOCK // len(text))):
                shares, indices = (self.temperature * part @ text.T).softmax(dim=1).max(dim=1)
                best.append(indices.cpu().numpy())
                certain.append(shares.cpu().numpy())
            return slice(None), np.concatenate(best), np.concatenate(certain)

        return self._labels(*fused(judge, self.text, self.experts))

    def _labels(
        self, best: Integer[np.ndarray, "*N"], certain: Float[np.ndarray, "*N"]
    ) -> tuple[Integer[np.ndarray, "*N"], Float[np.ndarray, "*N"]]:
        """Labels of the best names, with no class where it is background or not sure."""
        count = len(self.classes)
        none = none_label(count)
        labels = best
        if len(self.text) > count:
            labels = np.where(best >= count, none, labels)
        if self.threshold > 0:
            labels = np.where(certain < self.threshold, none, labels)
        return labels.astype(np.uint8 if count <= 255 else np.uint16, copy=False), certain

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


@dataclass(frozen=True, eq=False)
class _Box:
    """A part of a block: which photo rows and columns, and what they are interpolated from."""

    rows: slice
    columns: slice
    block: Tensor
    on_rows: Axis
    on_columns: Axis


def _box_of(
    block: Float[Tensor, "r w D"],
    text: Float[Tensor, "K D"],
    rows: Axis,
    columns: Axis,
    names: Bool[np.ndarray, " K"],
) -> _Box | None:
    """The smallest part of a block outside which none of these names can be the best."""
    cells, classes, _ = candidates(ScoreBlocks(block, text))
    y, x = np.divmod(cells[names[classes]], block.shape[1])
    if not len(y):
        return None
    parts = []
    for axis, places in ((rows, y), (columns, x)):
        first, last = int(places.min()), int(places.max())
        start, stop = np.searchsorted(axis.lower, (first, last + 1)).tolist()
        if start == stop:
            return None
        parts.append(
            (slice(start, stop), slice(first, last + 2), _shifted(axis, start, stop, first))
        )
    (own_rows, grid_rows, on_rows), (own_columns, grid_columns, on_columns) = parts
    return _Box(own_rows, own_columns, block[grid_rows, grid_columns], on_rows, on_columns)


def _shifted(axis: Axis, start: int, stop: int, first: int) -> Axis:
    return Axis(axis.lower[start:stop] - first, axis.weight[start:stop])


def _totals(
    labels: Integer[np.ndarray, "H W"], certain: Float[np.ndarray, "H W"], size: int
) -> Float[np.ndarray, "2 _"]:
    """Pixels and sum of confidences per label."""
    totals = np.zeros((2, size))
    step = max(1, PIXELS_PER_BLOCK // labels.shape[1])  # 8 bytes per pixel
    for start in range(0, len(labels), step):
        index = labels[start : start + step].ravel().astype(np.intp)
        totals[0] += np.bincount(index, minlength=size)
        totals[1] += np.bincount(index, certain[start : start + step].ravel(), minlength=size)
    return totals
