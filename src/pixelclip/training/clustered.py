"""The paper's figure of masks: raw ones beside the same ones merged by cluster."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from pixelclip.backbones import PROMPTS, Backbone, Text, load_backbone
from pixelclip.backbones.pixels import to_pixels
from pixelclip.backbones.sources import resolve
from pixelclip.config import TrainConfig, validated
from pixelclip.errors import ConfigError, DataError, ModelError
from pixelclip.images import MAX_PIXELS, resized
from pixelclip.masks.annotations import MaskReader
from pixelclip.masks.layout import Key, captioned, grid, heading, legend
from pixelclip.masks.pictures import (
    FINE,
    Sheet,
    draw_masks,
    enlarged,
    large_to_small,
    load_small,
    number,
    painted,
    shown_name,
    shown_photos,
    stack,
)
from pixelclip.masks.runs import PhotoMasks
from pixelclip.overlay import palette
from pixelclip.photos import Photo
from pixelclip.training.clustering import mask_pool
from pixelclip.training.prompts import ClassPrompts, common_words
from pixelclip.vocabulary import encode_classes, parse_templates, template_sets

WORD_TEMPLATE = "a photo of a {}."
WANTED = ("assigner", "class_vectors", "train_templates", "authors_defects", "input_size")
MASK_SIZE = 256  # rows and columns of the grid that masks are pooled on
POOLED_AT_ONCE = 256  # masks
LOADED_SIDE = 1024
MAX_ASPECT = 2  # of the network's input; a longer photo is seen smaller
KEYS, LEGEND_WIDTH = 12, 150  # of a photo's legend


class Clusters(NamedTuple):
    """What masks are assigned to.

    Attributes:
        vectors: text features of prompts or words, of unit norm.
        names: of each: the nearest common word, or the word itself; all are different.
        origin: what they are, for the title.
        short_side: of the network's input, in pixels: a run's own, as its prompts are used to it.
    """

    vectors: Float[Tensor, "K D"]
    names: tuple[str, ...]
    origin: str
    short_side: int


class Clustered(NamedTuple):
    """A photo, its masks and the cluster of each.

    Attributes:
        photo: which one.
        image: upright RGB, small.
        masks: the largest first.
        clusters: of each mask; -1 for one too small to be seen by the network.
    """

    photo: Photo
    image: Image.Image
    masks: PhotoMasks
    clusters: Int64[np.ndarray, " M"]


def clustered_sheet(
    photos: Sequence[Photo],
    reader: MaskReader,
    model: str | Path,
    *,
    device: str = "auto",
    count: int = 6,
    tile: int = 256,
    max_pixels: int = MAX_PIXELS,
) -> Sheet:
    """Rows of: photo, its masks, the same masks merged by cluster, names of the clusters.

    A mask belongs to the cluster whose prompt has the highest cosine with the model's mean feature
    under the mask (behaviour.md 11), as in the pictures of a training run. Training balances the
    clusters over the masks of thousands of crops (behaviour.md 12); over a few photos that would
    tear equal things apart. Where masks of several clusters overlap, the smallest is seen.

    The prompts are those that a run of ours has learned, each named by the nearest common word.
    A model without any (`mini`, a CLIP, a run without clusters) gets fixed common words instead,
    which the title says.

    Args:
        photos: to choose from.
        reader: of their masks.
        model: run directory, weight file or name, as for `load_backbone`.
        device: auto, cpu, cuda, cuda:N or mps.
        count: photos shown, evenly spaced among all; fewer if there are no more.
        tile: longer side of each picture, in pixels.
        max_pixels: photos with more pixels are not shown.

    Raises:
        ConfigError: the device is not there.
        DataError: none of the photos can be shown.
        ModelError: the model cannot be loaded, or its prompts are damaged.
    """
    backbone = load_backbone(str(model), device=device)
    clusters = load_clusters(str(model), backbone)
    shown, failures = [], []
    for photo in shown_photos(photos, count, tile):
        try:
            image, masks = load_small(photo, reader, LOADED_SIDE, max_pixels)
            if masks is None:
                raise DataError(f"no masks for {photo.shown}")
            masks = masks.select(large_to_small(masks))
            found = nearest_clusters(image, masks, backbone, clusters)
            shown.append(Clustered(photo, image, masks, found))
        except DataError as error:
            failures.append((photo, str(error)))
    if not shown:
        raise DataError(f"none of {len(failures)} photos can be shown: {failures[0][1]}")
    name = Path(model).resolve().name if Path(model).exists() else model
    return Sheet(_figure(shown, clusters, f"{name}: {clusters.origin}", tile), failures)


@torch.no_grad()
def load_clusters(model: str, backbone: Backbone) -> Clusters:
    """The prompts that a model was trained with, or common words.

    Args:
        model: run directory, weight file or name.
        backbone: of that model.

    Raises:
        ModelError: its prompts cannot be used.
    """
    words = common_words()
    features = encode_classes(cast(Text, backbone.text), words, (WORD_TEMPLATE,))
    config = _training(model, backbone)
    learned = None if config is None else _learned(model, backbone, config)
    if config is None or learned is None:
        origin = f"no learned prompts, {len(words)} common words instead"
        return Clusters(features, words, origin, backbone.card.short_side)
    vectors = F.normalize(learned.float(), dim=1)
    nearest = [words[index] for index in (vectors @ features.T).argmax(dim=1).tolist()]
    origin = f"{len(nearest)} learned prompts, named by the nearest common words"
    short_side = config.input_size or backbone.card.square
    return Clusters(vectors, _numbered(nearest), origin, short_side)


def _training(model: str, backbone: Backbone) -> TrainConfig | None:
    """The settings that a run of ours learned its prompts with; None: it is none, or has none.

    Raises:
        ModelError: the model's card is broken.
    """
    settings = backbone.card.training.get("settings")
    if not isinstance(settings, dict):
        return None
    known = {name: settings[name] for name in WANTED if name in settings}
    try:
        config = validated(TrainConfig, known, "training: settings: ")
    except ConfigError as error:
        raise ModelError(f"{model} has a broken card: {error}") from error
    return None if config.assigner == "none" else config


def _learned(model: str, backbone: Backbone, config: TrainConfig) -> Float[Tensor, "K D"] | None:
    """Features of the prompts beside a run's image tower, not normalised; None: there are none.

    Raises:
        ModelError: they are damaged, or do not fit the settings.
    """
    state = resolve(model).read() or {}
    tokens, vectors = (state.get(PROMPTS + name) for name in ("tokens", "vectors"))
    if config.class_vectors == "prompts" and tokens is not None:
        try:
            vectors = _encoded(tokens, config, backbone)
        except ConfigError as error:
            raise ModelError(f"the prompts of {model} cannot be used: {error}") from error
    if vectors is None:
        return None
    if vectors.ndim != 2 or vectors.shape[1] != backbone.dim or not vectors.isfinite().all():
        raise ModelError(f"the prompts of {model} are damaged")
    return vectors.to(backbone.device)


def _encoded(tokens: Tensor, config: TrainConfig, backbone: Backbone) -> Float[Tensor, "K D"]:
    """Text features of learned tokens.

    Raises:
        ConfigError: they do not fit the text tower or their templates, or these are in a file: a
            file that somebody else's card names is not opened.
    """
    text, templates = cast(Text, backbone.text), config.train_templates
    width = text.embed(text.tokenize([""])).shape[2]
    if tokens.ndim != 3 or 0 in tokens.shape or tokens.shape[2] != width:
        raise ConfigError(f"they have the shape {tuple(tokens.shape)}, not [K, L, {width}]")
    if templates not in template_sets() and "{}" not in templates:
        raise ConfigError(f"their templates are in a file, {templates!r}")
    prompts = ClassPrompts(
        text,
        tokens.float(),
        parse_templates(templates),
        authors_defects=config.authors_defects,
    )
    return prompts.to(backbone.device)(text)


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """The names; those that occur again get a number: tree, tree 2."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return tuple(result)


@torch.no_grad()
def nearest_clusters(
    image: Image.Image, masks: PhotoMasks, backbone: Backbone, clusters: Clusters
) -> Int64[np.ndarray, " M"]:
    """The cluster of each mask; -1 for one that no pixel of the pooling grid hits.

    Args:
        image: upright RGB: the photo, or a smaller form of it.
        masks: of the photo.
        backbone: whose features are pooled.
        clusters: of the same model.
    """
    size = _input_size(image.size, clusters.short_side, backbone.stride)
    pixels = to_pixels(resized(image, size))[None].to(backbone.device, backbone.dtype)
    dense = backbone.dense(pixels).float()
    rows, columns = (
        (2 * np.arange(MASK_SIZE) + 1) * side // (2 * MASK_SIZE)
        for side in (masks.height, masks.width)
    )
    found = np.full(masks.count, -1)
    for first in range(0, masks.count, POOLED_AT_ONCE):
        part = np.arange(first, min(first + POOLED_AT_ONCE, masks.count))
        sampled = masks.select(part).sample(rows, columns)
        is_seen = sampled.any(axis=(1, 2))
        seen = torch.from_numpy(np.ascontiguousarray(sampled[is_seen])).to(dense.device)
        photos = torch.zeros(len(seen), dtype=torch.int64, device=dense.device)
        pooled = F.normalize(mask_pool(dense, seen, photos), dim=1)
        found[part[is_seen]] = (pooled @ clusters.vectors.T).argmax(dim=1).cpu().numpy()
    return found


def _input_size(size: tuple[int, int], short_side: int, stride: int) -> tuple[int, int]:
    """Width and height of the network's input, in whole cells: its feature grid fits the photo."""
    scale = min(short_side / min(size), MAX_ASPECT * short_side / max(size)) / stride
    width, height = (max(1, round(side * scale)) * stride for side in size)
    return width, height


def _figure(shown: Sequence[Clustered], clusters: Clusters, title: str, tile: int) -> Image.Image:
    """A row per photo; the clusters that cover most have the colours that differ most."""
    fine = [enlarged(one.image, tile) for one in shown]
    labels = [_labels(one, image.size) for one, image in zip(shown, fine, strict=True)]
    seen = np.concatenate([part.ravel() for part in labels])
    counts = np.bincount(seen[seen >= 0], minlength=len(clusters.names))
    colours = np.empty((len(counts), 3), dtype=np.uint8)
    colours[np.argsort(-counts, kind="stable")] = palette(len(counts))
    rows = [[heading(text) for text in ("photo", "raw masks", "merged by cluster")]]
    for one, image, part in zip(shown, fine, labels, strict=True):
        rows.append(_row(one, image, part, colours, clusters.names))
    return grid(rows, title=title)


def _labels(one: Clustered, size: tuple[int, int]) -> Int64[np.ndarray, "h w"]:
    """The cluster seen at each pixel of the photo at this width and height; -1: none."""
    has_cluster = one.clusters >= 0
    top = stack(one.masks.select(has_cluster), size).top
    return np.append(one.clusters[has_cluster], -1)[top]


def _row(
    one: Clustered,
    image: Image.Image,
    labels: Int64[np.ndarray, "h w"],
    colours: UInt8[np.ndarray, "K 3"],
    names: Sequence[str],
) -> list[Image.Image]:
    """Photo, masks, clusters, legend."""
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    used = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    merged = Image.fromarray(painted(image, labels, colours))
    cells = [
        captioned(picture.reduce(FINE), [line], least_width=LEGEND_WIDTH)
        for picture, line in (
            (image, shown_name(one.photo)),
            (draw_masks(image, one.masks), number(one.masks.count, "mask")),
            (merged, number(len(used), "cluster")),
        )
    ]
    keys = [Key(names[k], colours[k], counts[k] / labels.size) for k in used]
    height = cells[0].height
    return [*cells, legend(keys, width=LEGEND_WIDTH, height=height, limit=KEYS)]
