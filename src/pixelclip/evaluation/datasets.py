"""Labelled photos in a plain folder: `images/`, `labels/`, `classes.txt`."""

from dataclasses import dataclass
from pathlib import Path

from pixelclip.errors import ConfigError, DataError
from pixelclip.photos import is_photo
from pixelclip.vocabulary import check_classes

IGNORE = 255
IGNORE_WIDE = 65535


@dataclass(frozen=True)
class SegmentationDataset:
    """Photos, their label maps and the classes.

    Attributes:
        name: for the report.
        classes: label value k is `classes[k]`.
        pairs: photo and label map; labels are PNGs with one channel, 255 (or 65535 above 255
            classes) = not labelled.
    """

    name: str
    classes: tuple[str, ...]
    pairs: tuple[tuple[Path, Path], ...]

    @property
    def ignore(self) -> int:
        """Label value of pixels that do not count."""
        return IGNORE if len(self.classes) <= 255 else IGNORE_WIDE


def load_folder(folder: Path) -> SegmentationDataset:
    """The data set in a folder with `images/NAME.jpg`, `labels/NAME.png` and `classes.txt`.

    Raises:
        DataError: a part is missing or not usable; it is named. A single photo without a label
            map is not: evaluation lists it among the failed.
    """
    for part in ("images", "labels", "classes.txt"):
        if not (folder / part).exists():
            raise DataError(f"{folder} has no {part}; a data set has images/, labels/, classes.txt")
    try:
        # A line's number is its label, so an empty one between others would shift the rest.
        text = (folder / "classes.txt").read_text(encoding="utf-8-sig").rstrip()
        classes = check_classes(text.splitlines())
        photos = sorted(p for p in (folder / "images").iterdir() if is_photo(p, folder))
        labels = {
            path.stem: path
            for path in (folder / "labels").iterdir()
            if path.suffix.lower() == ".png"
        }
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise DataError(f"{folder} is not a usable data set: {error}") from error
    if not photos:
        raise DataError(f"no photos in {folder / 'images'}")
    if not any(photo.stem in labels for photo in photos):
        raise DataError(f"no photo in {folder / 'images'} has a label map in {folder / 'labels'}")
    pairs = tuple(
        (photo, labels.get(photo.stem, folder / "labels" / f"{photo.stem}.png")) for photo in photos
    )
    return SegmentationDataset(folder.resolve().name, classes, pairs)
