"""Data sets that were asked for: where they lie, which masks and how many photos of them count."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from pixelclip.errors import DataError
from pixelclip.evaluation.datasets import SegmentationDataset, load_dataset
from pixelclip.masks.refiner import MadeBefore, find_masks
from pixelclip.masks.sources import MASK_SOURCES
from pixelclip.photos import Photo, evenly_spaced


@dataclass(frozen=True)
class Chosen:
    """A data set, the masks of its photos, and what is to be said of it in the results."""

    dataset: SegmentationDataset
    notes: tuple[str, ...] = ()
    masks: str | MadeBefore | None = None


def dataset_below(name: str, root: Path) -> SegmentationDataset:
    """A data set by name, in the folder of its own name below that one, or in that one.

    Raises:
        ConfigError: there is no such data set.
        DataError: a whole part of it is missing.
    """
    own = root / Path(name).stem
    return load_dataset(name, own if own.is_dir() else root)


def photos_of(dataset: SegmentationDataset) -> list[Photo]:
    """The photos of the pairs, named by their paths below the folder that all of them lie in."""
    paths = [path for path, _ in dataset.pairs]
    folder = os.path.commonpath([path.parent for path in paths])
    return [Photo(path, path.relative_to(folder).with_suffix("")) for path in paths]


def masks_of(dataset: SegmentationDataset, masks: str) -> str | MadeBefore:
    """The name of a source as it is, or what lies at a path, or in the set's own folder there.

    Raises:
        ConfigError: there is neither such a source nor such a path.
        DataError: what lies there holds no masks, or none of these photos.
    """
    own = Path(masks) / dataset.name
    where = own if masks not in MASK_SOURCES and own.exists() else masks
    try:
        return find_masks(where, photos_of(dataset))
    except DataError as error:
        raise DataError(f"{dataset.name}: {error}") from error


def with_masks(chosen: Chosen, refine: str | None) -> Chosen:
    """A data set with the masks of its photos; a note says so.

    Raises:
        ConfigError: there is neither such a source nor such a path.
        DataError: what lies there holds no masks, or none of these photos.
    """
    if refine is None:
        return chosen
    note = f"each mask of {refine} gets one class; the protocol says each pixel"
    masks = masks_of(chosen.dataset, refine)
    return replace(chosen, masks=masks, notes=(*chosen.notes, note))


def thinned(chosen: Chosen, photos: int | None) -> Chosen:
    """A data set with at most so many of its photos, evenly spaced; None: with all of them."""
    pairs = chosen.dataset.pairs
    if photos is None or photos >= len(pairs):
        return chosen
    said = f"{photos} of {chosen.dataset.expected or len(pairs)} photos, evenly spaced"
    kept = replace(chosen.dataset, pairs=tuple(evenly_spaced(pairs, photos)), expected=None)
    return replace(chosen, dataset=kept, notes=(*chosen.notes, said))
