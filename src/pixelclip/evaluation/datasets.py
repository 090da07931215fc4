"""Labelled photos: official downloads, each as its spec says, and plain folders."""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int64
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pixelclip.config import validated
from pixelclip.errors import ConfigError, DataError
from pixelclip.evaluation.label_values import LabelValues, read_classes, read_png_labels
from pixelclip.masks.records import first_file
from pixelclip.photos import is_photo
from pixelclip.vocabulary import check_classes, class_lists

IGNORE = 255
IGNORE_WIDE = 65535
MAX_LIST_BYTES = 2**24  # of a list of photos; the official ones have some kilobytes
MAX_PHOTOS = 2**20
_PLACE = re.compile(r"([\w .{}-]+(/[\w .{}-]+)*)?")
_NAME = re.compile(r"\w[\w.-]{0,250}", re.ASCII)


def _inside(place: str) -> str:
    """A path below a folder."""
    if not _PLACE.fullmatch(place) or ".." in PurePosixPath(place).parts:
        raise ValueError("a place is a path inside the data set's folder, with / between its parts")
    return place


def _pattern(place: str) -> str:
    if place.count("{}") != 1 or not PurePosixPath(place).name.startswith("{}"):
        raise ValueError("the file name begins with {}, which stands for the photo's name")
    return _inside(place)


Place = Annotated[str, AfterValidator(_inside)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class Part(BaseModel):
    """Files of a data set that come in one download.

    Attributes:
        at: where they may lie, relative to the data set's folder or a `top` in it; the `{}` at the
            beginning of the file name stands for the photo's name, with folders if it lies in some.
        get: where to get them, for messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: tuple[Pattern, ...] = Field(min_length=1)
    get: str = Field(min_length=1)


class SplitList(BaseModel):
    """A text file with the name of a photo on each line.

    Attributes:
        at: where it may lie; the first that is there counts.
        get: where to get it, for messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: tuple[Place, ...] = Field(min_length=1)
    get: str = Field(min_length=1)


class DatasetSpec(BaseModel):
    """A data set as it is downloaded.

    Attributes:
        title: what it is called in papers, with its split.
        classes: name of a built-in class list, or the names.
        expected: photos of the whole set.
        tops: folders that the archives, or other people's instructions, put in between.
        photos: the photos.
        labels: their label maps.
        split: the list of the photos that count; without, all photos found do.
        values: how label maps become classes.
        empty: whether photos without any labelled pixel are `kept` or `left out`.
        notes: what to know before comparing figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    classes: str | tuple[str, ...]
    expected: int = Field(ge=1, le=MAX_PHOTOS)
    tops: tuple[Place, ...] = ("",)
    photos: Part
    labels: Part
    split: SplitList | None = None
    values: LabelValues
    empty: Literal["kept", "left out"] = "kept"
    notes: tuple[str, ...] = ()

    def places(self, part: Part | SplitList) -> list[str]:
        """All places where a part may lie, relative to the data set's folder."""
        return [f"{top}/{place}" if top else place for place in part.at for top in self.tops]


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
    """

    name: str
    classes: tuple[str, ...]
    pairs: tuple[tuple[Path, Path], ...]
    expected: int | None = None
    values: LabelValues | None = None

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
            text = _small_text(Path(name))
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
        return check_classes(spec.classes)
    if spec.classes not in class_lists():
        raise ConfigError(
            f"unknown class list {spec.classes!r}; available: {', '.join(class_lists())}"
        )
    return class_lists()[spec.classes]


def load_dataset(name: str, root: Path) -> SegmentationDataset:
    """A data set in the folder that its official archives were unpacked to.

    Photos that are not there, or have no label map, are left out: `pairs` may be fewer than
    `expected`.

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
    where = f"{shown} in {root}"
    try:
        listed = None if spec.split is None else _split(spec, spec.split, root, where)
        photos, names = _largest(root, spec.places(spec.photos), listed)
        if not names:
            raise _missing("photos", spec, spec.photos, where)
        labels, names = _largest(root, spec.places(spec.labels), names)
        if not names:
            raise _missing("label maps of its photos", spec, spec.labels, where)
    except OSError as error:
        raise DataError(f"{shown}: cannot read {root}: {error.strerror or error}") from error
    pairs = tuple((_file(root, photos, n), _file(root, labels, n)) for n in names)
    dataset = SegmentationDataset(shown, spec_classes(spec), pairs, spec.expected, spec.values)
    return dataset if spec.empty == "kept" else _without_empty(dataset)


def _file(root: Path, pattern: str, name: str) -> Path:
    return root / pattern.replace("{}", name)


def _missing(what: str, spec: DatasetSpec, part: Part | SplitList, where: str) -> DataError:
    looked = ", ".join(place.replace("{}", "*") for place in part.at)
    below = ", ".join(top for top in spec.tops if top)
    also = f"; also in {below}" if below else ""
    return DataError(f"{where}: no {what} (looked for {looked}{also}); get {part.get}")


def _largest(
    root: Path, patterns: Sequence[str], wanted: Sequence[str] | None
) -> tuple[str, list[str]]:
    """The pattern that most photos fit (the first of equals), and their names.

    Args:
        root: the data set's folder.
        patterns: relative to it.
        wanted: names to look for; None: all there are, sorted.
    """
    found = [(pattern, _names(root, pattern, wanted)) for pattern in patterns]
    return max(found, key=lambda pattern_names: len(pattern_names[1]))


def _names(root: Path, pattern: str, wanted: Sequence[str] | None) -> list[str]:
    folder, suffix = (root / pattern).parent, pattern.rpartition("{}")[2]
    if not folder.is_dir():
        return []
    if wanted is not None:
        return [name for name in wanted if _file(root, pattern, name).is_file()]
    names = []
    for path in folder.rglob(f"*{suffix}"):
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts) and path.is_file():
            names.append(relative.as_posix().removesuffix(suffix))
        if len(names) > MAX_PHOTOS:
            raise DataError(f"{folder} has more than {MAX_PHOTOS} photos")
    return sorted(names)


def _split(spec: DatasetSpec, split: SplitList, root: Path, where: str) -> list[str]:
    """The names of the photos that count, in the order of their list."""
    path = first_file(root / place for place in spec.places(split))
    if path is None:
        raise _missing("list of photos", spec, split, where)
    names = [line.strip() for line in _small_text(path).splitlines() if line.strip()]
    for name in names:
        if not _NAME.fullmatch(name):
            raise DataError(f"{path} lists {name[:80]!r}, which is no name of a photo")
    if not names:
        raise DataError(f"{path} lists no photos")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path} lists {name} {times} times")
    return names


def _small_text(path: Path) -> str:
    """A text file that cannot be large.

    Raises:
        DataError: it is, is missing, or is no text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_LIST_BYTES + 1)
        if len(content) > MAX_LIST_BYTES:
            raise DataError(f"{path} is too large: the limit is {MAX_LIST_BYTES / 1e6:.0f} MB")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error


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
