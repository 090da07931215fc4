"""Label maps as their makers store them -> class indices."""

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int64, Shaped, UInt8
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pixelclip.errors import DataError
from pixelclip.heads import png_head
from pixelclip.images import MAX_PIXELS, read_indices, read_png

MAX_VALUE = 65_535
MAX_MAT_BYTES = 2**20  # compressed; the official files have some kilobytes
MAX_MAT_PIXELS = 2**24
_REFUSED = -1
_SPAN = re.compile(r"(\d{1,5})-(\d{1,5})")
_NUMBERS = {
    "double", "single", "logical",
    "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
}  # fmt: skip


def spelled_out(values: object) -> object:
    """Numbers and spans, as in `[0, "5-7"]`, as numbers: `(0, 5, 6, 7)`.

    Raises:
        ValueError: a span is no span of label values.
    """
    if not isinstance(values, list | tuple):
        return values
    numbers: list[object] = []
    for value in values:
        if not isinstance(value, str):
            numbers.append(value)
            continue
        span = _SPAN.fullmatch(value)
        if span is None or not int(span[1]) < int(span[2]) <= MAX_VALUE:
            raise ValueError(f'{value!r} is no span of label values; write it as in "1-20"')
        numbers += range(int(span[1]), int(span[2]) + 1)
    return tuple(numbers)


Values = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=0, le=MAX_VALUE)], ...],
    BeforeValidator(spelled_out),
]


class LabelValues(BaseModel):
    """How the values of a label map become classes; `"1-20"` in a list stands for all of them.

    Attributes:
        kind: `png`: one channel of 8 or 16 bits, palettes keep their indices; `ade20k`: a PNG in
            colour whose value is R // 10 * 256 + G; `mat`: the matrix LabelMap of a MATLAB file.
        values: values of the classes `first`, `first` + 1, ...
        first: class of the first of them: 1 where class 0 is what remains, the background.
        background: values that become class 0.
        ignored: values of pixels that do not count.
        rest: what becomes of any other value: an error, ignored, or class 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["png", "ade20k", "mat"] = "png"
    values: Values = Field(min_length=1)
    first: Literal[0, 1] = 0
    background: Values = ()
    ignored: Values = ()
    rest: Literal["refused", "ignored", "background"] = "refused"

    @model_validator(mode="after")
    def _each_once(self) -> "LabelValues":
        named = Counter([*self.values, *self.background, *self.ignored])
        value, times = named.most_common(1)[0]
        if times > 1:
            raise ValueError(f"the label value {value} stands there {times} times")
        has_background = bool(self.background) or self.rest == "background"
        if has_background != (self.first == 1):
            raise ValueError("first is 1 if, and only if, there is a background")
        return self

    @property
    def num_classes(self) -> int:
        """How many classes the values make."""
        return self.first + len(self.values)


@lru_cache(maxsize=8)
def class_of_value(labels: LabelValues, ignore: int) -> Int64[np.ndarray, " V"]:
    """The class of each label value from 0 to 65,535; `ignore`, or -1 where it is refused."""
    others = {"refused": _REFUSED, "ignored": ignore, "background": 0}[labels.rest]
    table = np.full(MAX_VALUE + 1, others, dtype=np.int64)
    table[list(labels.values)] = np.arange(labels.first, labels.num_classes)
    table[list(labels.background)] = 0
    table[list(labels.ignored)] = ignore
    table.setflags(write=False)
    return table


def read_classes(path: Path, labels: LabelValues, ignore: int) -> Int64[np.ndarray, "H W"]:
    """The class indices of a label map, `ignore` where nothing counts.

    Raises:
        DataError: it cannot be read, is too large, or holds a value that is refused.
    """
    stored = READERS[labels.kind](path)
    table = class_of_value(labels, ignore)
    outside = stored[(stored < 0) | (stored > MAX_VALUE)]
    classes = table[stored] if not outside.size else np.full(1, _REFUSED)
    if (classes == _REFUSED).any():
        value = outside[0] if outside.size else stored[classes == _REFUSED][0]
        raise DataError(
            f"{path} holds the value {value}, which is none of this data set's;"
            " is it the file of the official download?"
        )
    return classes


def read_png_labels(path: Path) -> Shaped[np.ndarray, "H W"]:
    """The values of a PNG with one channel of 1 to 16 bits, or a palette.

    Raises:
        DataError: the file is missing, damaged, too large, or has several channels.
    """
    _check_head(path)
    return read_indices(path)


def read_ade20k_labels(path: Path) -> Int64[np.ndarray, "H W"]:
    """The object indices in a `_seg.png` of the full ADE20K: R // 10 * 256 + G (its loader).

    Raises:
        DataError: the file is missing, damaged, too large, or not in colour.
    """
    _check_head(path)
    colours: UInt8[np.ndarray, "H W 3"] = read_png(path, {"RGB"}, "is not a PNG in RGB")
    return colours[..., 0].astype(np.int64) // 10 * 256 + colours[..., 1]


def read_mat_labels(path: Path) -> Int64[np.ndarray, "H W"]:
    """The values of the matrix `LabelMap` of a MATLAB file; no other is decoded.

    Raises:
        DataError: the file is missing, damaged, too large, or has no such matrix of integers.
    """
    from scipy.io import loadmat, whosmat  # type: ignore[import-untyped]  # scipy has no types

    try:
        if path.stat().st_size > MAX_MAT_BYTES:
            raise DataError(f"{path} is too large: the limit is {MAX_MAT_BYTES / 1e6:.0f} MB")
        found = {name: (shape, kind) for name, shape, kind in whosmat(str(path), appendmat=False)}
        shape, kind = found.get("LabelMap", ((), "missing"))
        if len(shape) != 2 or kind not in _NUMBERS or not 0 < shape[0] * shape[1] <= MAX_MAT_PIXELS:
            raise DataError(f"{path} has no matrix LabelMap of numbers that can be read")
        values = loadmat(str(path), appendmat=False, variable_names=["LabelMap"])["LabelMap"]
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # scipy's parser raises anything on damaged files
        raise DataError(f"cannot read label map {path}: {error}") from error
    return _whole(values, path)


def _whole(values: Shaped[np.ndarray, "H W"], path: Path) -> Int64[np.ndarray, "H W"]:
    """The values as integers, if that changes none of them."""
    if values.dtype.kind == "f":
        numbers: Float[np.ndarray, "H W"] = values
        if not np.isfinite(numbers).all() or (abs(numbers) > 2**31).any():
            raise DataError(f"{path} holds values that are no labels")
        if (numbers != np.floor(numbers)).any():
            raise DataError(f"{path} holds a value that is no integer")
    return values.astype(np.int64)


def _check_head(path: Path) -> None:
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is not a file" if path.exists() else f"no label map {path}")
    head = png_head(path)
    if head.width * head.height > MAX_PIXELS:
        raise DataError(
            f"{path} is too large: {head.width} x {head.height} pixels,"
            f" the limit is {MAX_PIXELS / 1e6:.0f} megapixels"
        )


READERS: dict[str, Callable[[Path], Shaped[np.ndarray, "H W"]]] = {
    "png": read_png_labels,
    "ade20k": read_ade20k_labels,
    "mat": read_mat_labels,
}
