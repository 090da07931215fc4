"""Protocols by name, the suites made of them, and what others have published."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from pixelclip.config import SegmentConfig, make_config
from pixelclip.errors import ConfigError
from pixelclip.evaluation.datasets import SegmentationDataset
from pixelclip.evaluation.evaluate import background_of

# Do not touch the figures.
_FREE = {"batch_size", "max_pixels"}


@dataclass(frozen=True)
class EvaluationProtocol:
    """How photos are segmented to be comparable with published figures.

    Attributes:
        description: one line.
        settings: of the segmenter, by name.
        of_set: settings that differ for a data set, by its name.
        with_background: settings for sets that have the class `background`.
        departures: what the protocol says and we cannot do.
        background_departures: more of them, for sets with background.
    """

    description: str
    settings: Mapping[str, object] = field(default_factory=dict)
    of_set: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    with_background: Mapping[str, object] = field(default_factory=dict)
    departures: tuple[str, ...] = ()
    background_departures: tuple[str, ...] = ()

    def settings_for(self, dataset: SegmentationDataset) -> dict[str, object]:
        """The settings for a data set."""
        with_background = {} if background_of(dataset) is None else self.with_background
        return {**self.settings, **with_background, **self.of_set.get(dataset.name, {})}


# Short side, windows and threshold are those of the configurations of SCLIP (wangf3014/SCLIP,
# configs/, 57fa9aa) and NACLIP (sinahmr/NACLIP, configs/, cbb720d); how windows are joined and
# what the threshold is compared with: SCLIP's clip_segmentor.py, d84d4ab. A test does the same
# pixel by pixel.
_SLIDING = EvaluationProtocol(
    "the training-free field's: short side 336 (Cityscapes 560), windows of 224 every 112,"
    " 80 templates, background below a threshold",
    settings={
        "short_side": 336,
        "window": 224,
        "overlap": 0.5,
        "join": "pixels",
        "templates": "imagenet",
    },
    of_set={"cityscapes": {"short_side": 560}},
    with_background={"background": "threshold", "threshold": 0.1},
    departures=(
        "photos are made smaller with antialiasing; theirs without",
        "class names are those of the class list, as in the report; theirs have words of their own,"
        " for background too",
        "synonyms of a class are averaged as text features; theirs compete, the best one counts",
    ),
    background_departures=(
        "the threshold 0.1 is on the softmax at the model's own temperature; theirs is at 40 to"
        " 65, different for sets and methods",
        "areas of any size are kept; SCLIP on VOC21 gives up classes under 10 % of the photo",
    ),
)
PROTOCOLS: dict[str, EvaluationProtocol] = {
    "default": EvaluationProtocol("ours: the photo's shape, the model's own size and templates"),
    "authors": EvaluationProtocol(
        "the authors': short side 640, squashed to a square, features to 64 x 64, 8 templates",
        settings={"preset": "authors", "templates": "imagenet-select"},
    ),
    "sliding": _SLIDING,
}


def protocol(name: str) -> EvaluationProtocol:
    """A protocol by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown --preset {name!r}; available: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def settings_and_departures(
    name: str, given: Mapping[str, object], dataset: SegmentationDataset, notes: Sequence[str] = ()
) -> tuple[SegmentConfig, list[str]]:
    """Settings of the segmenter for a data set, and what in it is not as the protocol says.

    Args:
        name: of the protocol.
        given: settings by the user, over the protocol's; None: not given.
        dataset: to be evaluated.
        notes: what else is to be said of the data set.

    Raises:
        ConfigError: there is no such protocol, or a value is not allowed.
    """
    chosen = protocol(name)
    own = chosen.settings_for(dataset)
    plain = make_config(SegmentConfig, **own)
    changed = {key: value for key, value in given.items() if value is not None}
    config = make_config(SegmentConfig, **{**own, **changed})
    said = [*chosen.departures]
    if background_of(dataset) is not None:
        said += chosen.background_departures
    before, after = plain.model_dump(), config.model_dump()
    said += [
        f"{key} is {_said(after[key])}; the protocol says {_said(before[key])}"
        for key in before
        if key not in _FREE and after[key] != before[key]
    ]
    return config, [*said, *dataset.lacking, *notes]


def _said(value: object) -> object:
    """A setting in words: without a value of its own it is the model's."""
    return "the model's own" if value in ("", None) else value


class Suite(NamedTuple):
    """A protocol over data sets.

    Attributes:
        protocol: its name.
        sets: names of data sets, in the order of the columns.
    """

    protocol: str
    sets: tuple[str, ...]


SUITES: dict[str, Suite] = {
    "paper": Suite("authors", ("coco-stuff", "ade150", "context59", "cityscapes", "voc20")),
    "eight": Suite(
        "sliding",
        (
            "voc21", "context60", "coco-object", "voc20", "context59", "coco-stuff", "cityscapes",
            "ade150",
        ),
    ),
}  # fmt: skip


def suite(name: str) -> Suite:
    """A suite by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown --suite {name!r}; available: {', '.join(SUITES)}")
    return SUITES[name]


class Published(NamedTuple):
    """A line of figures that others have published.

    Attributes:
        method: with its backbone.
        source: where the figures stand, and by which protocol they were made.
        mious: in percent, by data set; sets without a published figure are missing.
    """

    method: str
    source: str
    mious: dict[str, float]


# The names of our data sets for the columns of data/published.json.
_PUBLISHED_SETS = {
    "coco-stuff": "coco-stuff", "ade20k-150": "ade150", "pascal-context-59": "context59",
    "cityscapes": "cityscapes", "voc-20": "voc20",
}  # fmt: skip


def _protocol_of(method: str) -> str:
    """As the notes of data/published.json have it."""
    return "squashed photos" if method.startswith("PixelCLIP") else "sliding windows"


@cache
def published() -> tuple[Published, ...]:
    """All published figures we know of; protocols differ among them, and each says which."""
    text = files("pixelclip").joinpath("data/published.json").read_text("utf-8")
    document = json.loads(text)
    columns = [_PUBLISHED_SETS[column] for column in document["columns"]]
    return tuple(
        Published(
            row[0],
            f"{row[-1]}; {_protocol_of(row[0])}",
            {
                column: float(value)
                for column, value in zip(columns, row[1:-1], strict=True)
                if value is not None
            },
        )
        for row in document["rows"]
    )
