"""What is known of a data set before it is there: a TOML file of `specs/`, as a model."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pixelclip.errors import DataError
from pixelclip.evaluation.label_values import LabelValues

MAX_PHOTOS = 2**20
MAX_LIST_BYTES = 2**24  # of a list of photos; the official ones have some kilobytes
_PLACE = re.compile(r"([\w .{}-]+(/[\w .{}-]+)*)?")


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
        other_lists: photos of other lists of the set that are in use; they are whole too.
        tops: folders that the archives, or other people's instructions, put in between.
        alike: data sets of the same files, whose folders beside are looked into as well.
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
    other_lists: tuple[int, ...] = ()
    tops: tuple[Place, ...] = ("",)
    alike: tuple[Place, ...] = ()
    photos: Part
    labels: Part
    split: SplitList | None = None
    values: LabelValues
    empty: Literal["kept", "left out"] = "kept"
    notes: tuple[str, ...] = ()

    def places(self, part: Part | SplitList) -> list[str]:
        """All places where a part may lie, relative to the data set's folder."""
        beside = (f"{name}/{top}" if top else name for name in self.alike for top in self.tops)
        tops = [*self.tops, *beside]
        return [f"{top}/{place}" if top else place for place in part.at for top in tops]


def small_text(path: Path) -> str:
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
