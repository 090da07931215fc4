"""Labelled photos: official downloads, each as its spec says, and plain folders."""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pixelclip.config import validated
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.dataset_specs import (
    MAX_PHOTOS,
    DatasetSpec,
    Part,
    SplitList,
    small_text,
)
from pixelclip.evaluation.label_values import LabelValues, read_classes, read_png_labels
from pixelclip.masks.records import first_file
from pixelclip.photos import is_photo
from pixelclip.vocabulary import check_classes, class_lists

IGNORE = 255
IGNORE_WIDE = 65535
MAX_CLASSES = 8192  # a confusion matrix has the square of that
NEARBY = 1000  # folders that are looked into for what is missing, for the message
_ARCHIVE = re.compile(r"[\w.-]+\.(?:zip|tar\.gz|tgz|tar)\b")
_NAME = re.compile(r"\w[\w.-]{0,250}", re.ASCII)


@dataclass(frozen=True)
class SegmentationDataset:
    """Photos, their label maps and the classes.

    Attributes:
        name: for the report.
        classes: label value k is `classes[k]`.
        pairs: photo and label map.
        expected: photos of the whole set; None: as many as there are.
        values: how label maps become classes; None: they are PNGs with one channel of class
            indices, 255 (or 65535 above 255 classes) = not labelled.
        lacking: what is missing of the set, and where to get it, a line each; empty: it is whole.
    """

    name: str
    classes: tuple[str, ...]
    pairs: tuple[tuple[Path, Path], ...]
    expected: int | None = None
    values: LabelValues | None = None
    lacking: tuple[str, ...] = ()

    @property
    def ignore(self) -> int:
        """Label value of pixels that do not count."""
        return IGNORE if len(self.classes) <= 255 else IGNORE_WIDE

    @property
    def classes_sha256(self) -> str:
        """Hash of the class names and their order: names alone move a result by points."""
        names = json.dumps(list(self.classes), ensure_ascii=False)
        return hashlib.sha256(names.encode()).hexdigest()

    def truth(self, path: Path) -> Int64[np.ndarray, "H W"]:
        """The label map in one of the pairs: class indices, `ignore` where nothing counts.

        Raises:
            DataError: it cannot be read, or holds a value that is no class.
        """
        if self.values is not None:
            return read_classes(path, self.values, self.ignore)
        truth = read_png_labels(path).astype(np.int64)
        wrong = truth[(truth != self.ignore) & ((truth >= len(self.classes)) | (truth < 0))]
        if wrong.size:
            raise DataError(
                f"{path} holds the value {wrong[0]}, but there are {len(self.classes)} classes"
                f" (0 to {len(self.classes) - 1}; {self.ignore} = not labelled)"
            )
        return truth


def dataset_names() -> list[str]:
    """The data sets that are read from their official downloads."""
    folder = files("pixelclip").joinpath("evaluation/specs")
    return sorted(
        p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")
    )


def read_spec(name: str) -> DatasetSpec:
    """What is known of a data set: one of `dataset_names`, or a TOML file like theirs.

    Raises:
        ConfigError: there is none of that name, or the file is no spec.
    """
    if name in dataset_names():
        text = files("pixelclip").joinpath(f"evaluation/specs/{name}.toml").read_text("utf-8")
    elif name.endswith(".toml"):
        try:
            text = small_text(Path(name))
        except DataError as error:
            raise ConfigError(str(error)) from error
    else:
        raise ConfigError(
            f"unknown data set {name!r}; available: {', '.join(dataset_names())},"
            " or a file NAME.toml like theirs"
        )
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data set {name} is not TOML: {error}") from error
    spec = validated(DatasetSpec, values, f"data set {name}: ")
    if (count := len(spec_classes(spec))) != spec.values.num_classes:
        raise ConfigError(
            f"data set {name} has {count} class names, but values for {spec.values.num_classes}"
        )
    return spec


def spec_classes(spec: DatasetSpec) -> tuple[str, ...]:
    """The class names of a data set.

    Raises:
        ConfigError: the class list is unknown, or a name is not usable.
    """
    if not isinstance(spec.classes, str):
        return check_number(check_classes(spec.classes), spec.title)
    if spec.classes not in class_lists():
        raise ConfigError(
            f"unknown class list {spec.classes!r}; available: {', '.join(class_lists())}"
        )
    return class_lists()[spec.classes]


def check_number(classes: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The classes, if they are not too many to be counted pair by pair.

    Raises:
        ConfigError: they are.
    """
    if len(classes) > MAX_CLASSES:
        raise ConfigError(f"{where} has {len(classes)} classes; the limit is {MAX_CLASSES}")
    return classes


def load_dataset(name: str, root: Path) -> SegmentationDataset:
    """A data set in the folder that its official archives were unpacked to.

    Photos that are not there, or have no label map, are left out: `pairs` may be fewer than
    `expected`, and `lacking` says what is missing.

    Args:
        name: one of `dataset_names`, or a TOML file like theirs.
        root: the folder.

    Raises:
        ConfigError: there is no such data set.
        DataError: a whole part is missing; it is named, with where to get it.
    """
    spec = read_spec(name)
    shown = Path(name).stem if name.endswith(".toml") else name
    if not root.is_dir():
        raise DataError(f"{shown}: no folder {root}; unpack there {spec.photos.get}")
    where = _Root(spec, root, f"{shown} in {root}")
    try:
        listed = None if spec.split is None else _split(spec.split, where)
        photos = _largest(root, spec.places(spec.photos), listed)
        if not photos.names:
            of_list = "" if listed is None else f" of its list of {len(listed)}"
            raise _missing(f"photos{of_list}", spec.photos, where)
        labels = _largest(root, spec.places(spec.labels), photos.names)
        if not labels.names:
            raise _missing("label maps of its photos", spec.labels, where)
        lacking = _lacking(where, listed, photos, labels)
    except OSError as error:
        raise DataError(f"{shown}: cannot read {root}: {error.strerror or error}") from error
    pairs = tuple((_file(root, photos.at, n), _file(root, labels.at, n)) for n in labels.names)
    dataset = SegmentationDataset(
        shown, spec_classes(spec), pairs, spec.expected, spec.values, lacking
    )
    return dataset if spec.empty == "kept" else _without_empty(dataset)


class _Root(NamedTuple):
    """Where a data set is read from; `name` is for messages."""

    spec: DatasetSpec
    root: Path
    name: str


class _Found(NamedTuple):
    """Where files of a part lie, and the names of the photos they belong to."""

    at: str
    names: list[str]


def _file(root: Path, pattern: str, name: str) -> Path:
    return root / pattern.replace("{}", name)


def _missing(what: str, part: Part | SplitList, where: _Root) -> DataError:
    looked = ", ".join(place.replace("{}", "*") for place in part.at)
    below = ", ".join(top for top in where.spec.tops if top)
    also = f"; also in {below}" if below else ""
    hint = ""
    if archive := _archive(part, where):
        hint = f"{archive} is there but not unpacked; "
    elif other := _elsewhere(part, where):
        hint = f"there is some with --root {other}; "
    return DataError(f"{where.name}: no {what} (looked for {looked}{also}); {hint}get {part.get}")


def _archive(part: Part | SplitList, where: _Root) -> Path | None:
    """The download itself, if it lies where it should have been unpacked."""
    inside = (where.root / name for name in (*where.spec.tops, *where.spec.alike))
    folders = (*inside, where.root, where.root.parent)
    names = _ARCHIVE.findall(part.get)
    found = (folder / name for name in names for folder in folders)
    return next((path for path in found if path.is_file()), None)


def _elsewhere(part: Part | SplitList, where: _Root) -> Path | None:
    """A folder around, from which the part would have been found."""
    root = where.root.absolute()
    places = where.spec.places(part)
    looked = {root / place for place in places}
    inside = sorted(path for path in islice(root.iterdir(), NEARBY) if path.is_dir())
    for other in (*inside, root.parent, root.parent.parent):
        if any(other / place not in looked and _is_there(other / place) for place in places):
            return other
    return None


def _is_there(place: Path) -> bool:
    """Whether there is that list, or any file of that pattern."""
    if not place.name.startswith("{}"):
        return place.is_file()
    suffix = place.name.removeprefix("{}")
    return place.parent.is_dir() and any(_files_below(place.parent, suffix))


def _lacking(
    where: _Root, listed: Sequence[str] | None, photos: _Found, labels: _Found
) -> tuple[str, ...]:
    """What is missing of the set, and where to get it; nothing if it is whole."""
    spec, root = where.spec, where.root
    lines = []
    if len(labels.names) not in {spec.expected, *spec.other_lists}:
        lines.append(f"{len(labels.names)} photos were found; the set has {spec.expected}")
    total = spec.expected if listed is None else len(listed)
    if len(photos.names) < total:
        there = set(photos.names)
        gone = next((name for name in listed or () if name not in there), None)
        first = "" if gone is None else f", the first {_file(root, photos.at, gone)}"
        missing = total - len(photos.names)
        verb = "is" if missing == 1 else "are"
        lines.append(f"{missing} of {total} photos {verb} missing{first}; get {spec.photos.get}")
    if missing := len(photos.names) - len(labels.names):
        there = set(labels.names)
        gone = next(name for name in photos.names if name not in there)
        lines.append(
            f"{missing} of {len(photos.names)} photos have no label map, the first"
            f" {_file(root, labels.at, gone)}; get {spec.labels.get}"
        )
    return tuple(lines)


def _largest(root: Path, patterns: Sequence[str], wanted: Sequence[str] | None) -> _Found:
    """The pattern that most photos fit (the first of equals), and their names.

    Args:
        root: the data set's folder.
        patterns: relative to it.
        wanted: names to look for; None: all there are, sorted.
    """
    found = [_Found(pattern, _names(root, pattern, wanted)) for pattern in patterns]
    return max(found, key=lambda it: len(it.names))


def _names(root: Path, pattern: str, wanted: Sequence[str] | None) -> list[str]:
    folder, suffix = (root / pattern).parent, pattern.rpartition("{}")[2]
    if not folder.is_dir():
        return []
    if wanted is not None:
        return [name for name in wanted if _file(root, pattern, name).is_file()]
    names = list(islice(_files_below(folder, suffix), MAX_PHOTOS + 1))
    if len(names) > MAX_PHOTOS:
        raise DataError(f"{folder} has more than {MAX_PHOTOS} photos")
    return sorted(names)


def _files_below(folder: Path, suffix: str) -> Iterator[str]:
    """Paths below a folder of the files with that ending, without it; hidden ones left out."""
    for path in folder.rglob(f"*{suffix}"):
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts) and path.is_file():
            yield relative.as_posix().removesuffix(suffix)


def _split(split: SplitList, where: _Root) -> list[str]:
    """The names of the photos that count, in the order of their list."""
    path = first_file(where.root / place for place in where.spec.places(split))
    if path is None:
        raise _missing("list of photos", split, where)
    names = [line.strip() for line in small_text(path).splitlines() if line.strip()]
    for name in names:
        if not _NAME.fullmatch(name):
            raise DataError(f"{path} lists {name[:80]!r}, which is no name of a photo")
    if not names:
        raise DataError(f"{path} lists no photos")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path} lists {name} {times} times")
    return names


def _without_empty(dataset: SegmentationDataset) -> SegmentationDataset:
    """The data set without photos that have no labelled pixel; unreadable ones stay, to be told."""

    def counts(path: Path) -> bool:
        try:
            return bool((dataset.truth(path) != dataset.ignore).any())
        except DataError:
            return True

    pairs = tuple(pair for pair in dataset.pairs if counts(pair[1]))
    if not pairs:
        raise DataError(f"{dataset.name}: no pixel of {len(dataset.pairs)} photos is labelled")
    return replace(dataset, pairs=pairs)


def load_folder(folder: Path) -> SegmentationDataset:
    """The data set in a folder with `images/NAME.jpg`, `labels/NAME.png` and `classes.txt`.

    Label maps without a photo are passed over, and `lacking` says so.

    Raises:
        DataError: a part is missing or not usable, or two photos would have the same label map;
            it is named. A single photo without a label map is not: evaluation lists it among the
            failed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for part in ("images", "labels", "classes.txt"):
        if not (folder / part).exists():
            raise DataError(f"{folder} has no {part}; a data set has images/, labels/, classes.txt")
    try:
        classes = _class_file(folder / "classes.txt")
        photos = sorted(p for p in (folder / "images").iterdir() if is_photo(p, folder))
        maps = (p for p in (folder / "labels").iterdir() if p.suffix.lower() == ".png")
        labels = _by_stem(sorted(p for p in maps if p.is_file() and not p.name.startswith(".")))
        by_stem = _by_stem(photos)
    except (OSError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{folder} is not a usable data set: {reason}") from error
    if not photos:
        raise DataError(f"no photos in {folder / 'images'}")
    if not labels.keys() & by_stem.keys():
        raise DataError(f"no photo in {folder / 'images'} has a label map in {folder / 'labels'}")
    pairs = tuple(
        (photo, labels.get(photo.stem, folder / "labels" / f"{photo.stem}.png")) for photo in photos
    )
    alone = [path for stem, path in labels.items() if stem not in by_stem]
    lacking = (f"{len(alone)} label maps have no photo, the first {alone[0]}",) if alone else ()
    return SegmentationDataset(folder.resolve().name, classes, pairs, lacking=lacking)


def _class_file(path: Path) -> tuple[str, ...]:
    """Class names, one a line: its number is the label, so an empty one would shift the rest."""
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    # Not splitlines: it takes a form feed inside a name for the end of a line.
    text = small_text(path).replace("\r\n", "\n").replace("\r", "\n")
    return check_number(check_classes(text.rstrip("\n \t").split("\n")), str(path))


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by their names without suffix.

    Raises:
        DataError: two have the same.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if (other := found.setdefault(path.stem, path)) is not path:
            raise DataError(f"{other} and {path.name} have the same name; remove one of them")
    return found
