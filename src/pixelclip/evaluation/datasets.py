"""Labelled photos in a plain folder: `images/`, `labels/`, `classes.txt`."""

from dataclasses import dataclass
from pathlib import Path

from pixelclip.errors import ConfigError, DataError
from pixelclip.images import PHOTO_SUFFIXES
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
        DataError: a part is missing, or a photo has no label map; it is named.
    """
    for part in ("images", "labels", "classes.txt"):
        if not (folder / part).exists():
            raise DataError(f"{folder} has no {part}; a data set has images/, labels/, classes.txt")
    try:
        lines = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
        classes = check_classes([line for line in lines if line.strip()])
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise DataError(f"{folder / 'classes.txt'}: {error}") from error
    photos = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
    if not photos:
        raise DataError(f"no photos in {folder / 'images'}")
    pairs = tuple((photo, folder / "labels" / f"{photo.stem}.png") for photo in photos)
    missing = [labels.name for _, labels in pairs if not labels.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"no label map {folder / 'labels' / missing[0]}{more}")
    return SegmentationDataset(folder.resolve().name, classes, pairs)
