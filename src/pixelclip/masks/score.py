"""How well class-agnostic masks find the regions that people drew."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Integer
from skimage.measure import label

from pixelclip.errors import DataError
from pixelclip.heads import png_head
from pixelclip.images import MAX_PIXELS, read_indices, read_size
from pixelclip.masks import rle
from pixelclip.masks.annotations import MaskReader, PhotoFiles, open_masks
from pixelclip.masks.names import SharedNames, shared_names
from pixelclip.masks.records import Size, check_size
from pixelclip.masks.runs import PhotoMasks, from_labels
from pixelclip.photos import Photo
from pixelclip.progress import progress_bar

MIN_REGION = 0.001  # of a photo; smaller pieces of a class map are crumbs of its drawing
KINDS = (
    "a folder with labels/NAME_0.png, labels/NAME_1.png, ... (one person's regions each) or with"
    " labels/NAME.png (a class map, whose connected pieces are the regions), or any masks that"
    " train takes"
)


class PhotoScore(NamedTuple):
    """How well the masks of one photo find its regions; all shares in [0, 1].

    Attributes:
        best_iou: per region, that of the mask with the largest intersection over union; 0 without
            masks. The regions of all people, one person after the other.
        covering: segmentation covering, the mean over people.
        masks: how many there are.
        coverage: share of the photo's pixels that lie under a mask.
    """

    best_iou: Float64[np.ndarray, " R"]
    covering: float
    masks: int
    coverage: float


@dataclass(frozen=True)
class MaskScore:
    """How well the masks of many photos find their regions; all shares in [0, 1].

    The first three count every region of every person once, whatever its size and its photo, as
    is done for object proposals (Hosang et al., TPAMI 2016; Pont-Tuset and Van Gool, ICCV 2015:
    `mean_best_iou` is their Jaccard index at instance level). The others are means over photos.

    Attributes:
        recall_50: share of the regions with a mask of IoU >= 0.5.
        recall_70: likewise 0.7.
        mean_best_iou: of the best mask of each region.
        covering: segmentation covering, the mean over the people of a photo, then over photos.
        masks_per_photo: more of them make all the above easier.
        coverage: share of a photo's pixels under a mask.
        photos: how many were scored: those with regions and masks.
        regions: how many, of all people.
        failed: photos that could not be scored, a line on each; they are left out of all figures.
    """

    recall_50: float
    recall_70: float
    mean_best_iou: float
    covering: float
    masks_per_photo: float
    coverage: float
    photos: int
    regions: int
    failed: tuple[str, ...] = ()


@runtime_checkable
class RegionTruth(Protocol):
    """Where the true regions of photos come from."""

    def __call__(self, photo: Photo, size: Size) -> list[PhotoMasks]:
        """The regions of a photo of this height and width, once per person; none if unknown.

        Raises:
            DataError: they are damaged, or those of another photo.
        """
        ...


def score_photo(masks: PhotoMasks, truths: Sequence[PhotoMasks]) -> PhotoScore:
    """Compare masks with the regions of each person.

    Pixels outside all regions count as any other: a mask that reaches there loses IoU. Covering
    (Arbelaez et al., TPAMI 2011) of a person's regions is the mean of their best IoU, weighted
    by their pixels. It was made for masks that are a partition; masks that overlap are not
    punished, so read it beside their number.

    Args:
        masks: of the photo, in any order; they may overlap.
        truths: regions of the same photo; empty ones, and people without any, do not count.

    Raises:
        DataError: there is no region, or regions of a photo of another size.
    """
    texts = masks.to_rle()
    best, coverings = [], []
    for truth in truths:
        if (truth.height, truth.width) != (masks.height, masks.width):
            raise DataError(
                f"masks of {masks.width} x {masks.height} pixels cannot be compared with regions"
                f" of {truth.width} x {truth.height}"
            )
        regions = truth.select(truth.areas() > 0)
        if not regions.count:
            continue
        overlaps = rle.overlaps(texts, regions.to_rle(), masks.height, masks.width)
        best.append(overlaps.max(axis=0, initial=0.0))
        coverings.append(float(np.average(best[-1], weights=regions.areas())))
    if not best:
        raise DataError("there is no region to find")
    pixels = masks.height * masks.width
    return PhotoScore(
        best_iou=np.concatenate(best),
        covering=float(np.mean(coverings)),
        masks=masks.count,
        coverage=_union(masks) / pixels,
    )


def _union(masks: PhotoMasks) -> int:
    """Pixels under any mask."""
    order = np.argsort(masks.starts)
    starts, ends = masks.starts[order], masks.ends[order]
    reached = np.maximum.accumulate(np.append(0, ends[:-1]))[: len(ends)]
    return int((ends - np.maximum(starts, reached)).clip(min=0).sum())


def score(
    reader: MaskReader,
    photos: Sequence[Photo],
    truth: RegionTruth,
    *,
    quiet: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> MaskScore:
    """Score the masks of those photos whose true regions are known.

    Args:
        reader: of the masks.
        photos: those without regions are passed over; those without masks are listed as failed.
        truth: of the regions (`open_truth`).
        quiet: show no progress.
        max_pixels: photos with more pixels are listed as failed.

    Raises:
        DataError: no photo could be scored.
    """
    scores: list[PhotoScore] = []
    failed: list[str] = []
    with progress_bar(quiet=quiet) as bar:
        for photo in bar.track(photos, description="scoring"):
            try:
                one = _score_one(reader, photo, truth, max_pixels)
            except DataError as error:
                failed.append(str(error))
            else:
                scores += [] if one is None else [one]
    if failed and not scores:
        raise DataError(f"none of the photos could be scored; first: {failed[0]}")
    if not scores:
        raise DataError(
            f"no regions are known of any of the {len(photos)} photos; accepted: {KINDS}."
            " Names must match"
        )
    return _mean(scores, failed)


def _score_one(
    reader: MaskReader, photo: Photo, truth: RegionTruth, max_pixels: int
) -> PhotoScore | None:
    """The score of a photo; None if no region of it is known.

    Raises:
        DataError: it cannot be scored.
    """
    width, height = read_size(photo.path, max_pixels)
    regions = truth(photo, (height, width))
    if not any(person.areas().any() for person in regions):
        return None
    masks = reader(photo, (height, width))
    if masks is None:
        raise DataError(f"{photo.path} has no masks")
    return score_photo(masks, regions)


def _mean(scores: Sequence[PhotoScore], failed: Sequence[str]) -> MaskScore:
    best = np.concatenate([one.best_iou for one in scores])
    return MaskScore(
        recall_50=float(np.mean(best >= 0.5)),
        recall_70=float(np.mean(best >= 0.7)),
        mean_best_iou=float(best.mean()),
        covering=float(np.mean([one.covering for one in scores])),
        masks_per_photo=float(np.mean([one.masks for one in scores])),
        coverage=float(np.mean([one.coverage for one in scores])),
        photos=len(scores),
        regions=len(best),
        failed=tuple(failed),
    )


def open_truth(path: Path, photos: Sequence[Photo]) -> RegionTruth:
    """The reader of true regions; what kind they are is told by looking.

    Args:
        path: folder with `labels/` of PNGs with one channel, or that folder of PNGs itself:
            `NAME_0.png`, `NAME_1.png`, ... hold the regions of one person each, every value a
            region (BSDS500); `NAME.png` has a class index per pixel, 255 = not labelled (65535
            in a map with values above 255), and each connected piece of a class is a region. Or
            whatever `open_masks` reads: the masks are the regions.
        photos: all that regions will be asked for.

    Raises:
        DataError: there is nothing known at that path.
    """
    folder = path / "labels" if (path / "labels").is_dir() else path
    if folder.is_dir():
        shared = shared_names(photos)
        for maps in (PeopleMaps(folder, shared), ClassMaps(folder, shared)):
            if any(maps.knows(photo) for photo in photos):
                return maps
    try:
        return OnePerson(open_masks(path, photos))
    except DataError as error:
        raise DataError(f"no regions of these photos: {error}; also {KINDS}") from error


@dataclass(frozen=True)
class OnePerson:
    """Masks taken for true regions.

    Attributes:
        reader: of the masks.
    """

    reader: MaskReader

    def __call__(self, photo: Photo, size: Size) -> list[PhotoMasks]:
        """The regions of a photo of this height and width; none without masks."""
        masks = self.reader(photo, size)
        return [] if masks is None else [masks]


@dataclass(frozen=True)
class PeopleMaps:
    """Regions in a PNG per person and photo; every value is a region.

    Attributes:
        folder: see `PhotoFiles`; the numbers of people follow each other from 0.
        shared: likewise.
    """

    folder: Path
    shared: SharedNames

    def knows(self, photo: Photo) -> bool:
        """Whether the photo has the file of a first person."""
        return self._find(photo, 0) is not None

    def __call__(self, photo: Photo, size: Size) -> list[PhotoMasks]:
        """The regions of a photo of this height and width; none without a file."""
        people: list[PhotoMasks] = []
        while path := self._find(photo, len(people)):
            people.append(from_labels(_read_map(path, size)))
        return people

    def _find(self, photo: Photo, person: int) -> Path | None:
        return PhotoFiles(self.folder, self.shared, f"_{person}.png").find(photo)


@dataclass(frozen=True)
class ClassMaps:
    """Regions in a PNG of class indices per photo: connected pieces of at least 0.1 % of it.

    Pixels that touch at a corner are connected. 255, or 65535 in a map with values above 255, is
    no class.

    Attributes:
        folder: see `PhotoFiles`.
        shared: likewise.
    """

    folder: Path
    shared: SharedNames

    def knows(self, photo: Photo) -> bool:
        """Whether the photo has a file."""
        return self._find(photo) is not None

    def __call__(self, photo: Photo, size: Size) -> list[PhotoMasks]:
        """The regions of a photo of this height and width; none without a file."""
        path = self._find(photo)
        if path is None:
            return []
        labels = _read_map(path, size)
        ignore = 255 if labels.max() <= 255 else 65535
        pieces = label(labels.astype(np.int32), background=ignore, connectivity=2)
        counts = np.bincount(pieces.ravel())
        counts[0] = 0  # what is ignored
        kept = np.flatnonzero(counts >= MIN_REGION * labels.size)
        numbers = np.zeros(len(counts), dtype=np.int64)
        numbers[kept] = np.arange(1, len(kept) + 1)
        return [from_labels(numbers[pieces], ignore=(0,))]

    def _find(self, photo: Photo) -> Path | None:
        return PhotoFiles(self.folder, self.shared, ".png").find(photo)


def _read_map(path: Path, size: Size) -> Integer[np.ndarray, "H W"]:
    """The label map of a photo of this height and width.

    Raises:
        DataError: it is damaged or of another size.
    """
    head = png_head(path)
    check_size((head.height, head.width), size, path)  # before a huge one is decoded
    return read_indices(path)
