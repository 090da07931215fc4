"""The masks of one photo as runs of pixels: made, chosen from, sampled, encoded."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer

from pixelclip.errors import DataError
from pixelclip.masks import rle

MAX_FRAME_PIXELS = 2**32 - 1  # COCO's counts have 32 bits
MAX_MASKS = 4096  # of one photo; SA-1B has about 100, and 1 byte per mask and pixel is sampled
MAX_CHARACTERS = 2**23  # of the codes of a photo; SA-1B has about 300 thousand
MAX_RUNS = 2**24  # of a label map; each takes 24 bytes
MAX_OUTLINE = 1024  # length of all polygons of a photo, in (height + width)


@dataclass(frozen=True, eq=False)
class PhotoMasks:
    """The masks of one photo; they may overlap and may be empty.

    Attributes:
        height: of the upright photo.
        width: of the upright photo.
        starts: first position of each run of foreground pixels; pixel (row, column) has position
            `column * height + row`, as in COCO.
        ends: first position after each run. Runs of a mask are sorted and do not touch.
        owners: index of the mask of each run, never decreasing.
        count: number of masks M.
        scores: quality per mask, in [0, 1]; 1 where it is unknown.
        broken: annotations left out because they are damaged or beyond the limits.
        details: what else is known of each mask, in SA-1B's fields (`stability_score`,
            `point_coords`, `crop_box`, ...) as JSON has it; None: nothing. A mask read from such
            a file has its whole record, in which `counts` is null if it is what `to_rle` gives.
        document: what else the photo's file in SA-1B's layout has, `annotations` being null in
            its place; None: there was no such file.
    """

    height: int
    width: int
    starts: Int64[np.ndarray, " R"]
    ends: Int64[np.ndarray, " R"]
    owners: Int64[np.ndarray, " R"]
    count: int
    scores: Float32[np.ndarray, " M"]
    broken: int = 0
    details: tuple[dict[str, object], ...] | None = None
    document: dict[str, object] | None = None

    def areas(self) -> Int64[np.ndarray, " M"]:
        """Pixels of each mask."""
        lengths = self.ends - self.starts
        return np.bincount(self.owners, lengths, self.count).astype(np.int64)  # exact below 2^53

    def boxes(self) -> Int64[np.ndarray, "M 4"]:
        """Left, top, width and height of each mask, as COCO counts them; zeros if it is empty."""
        left, top = self.starts // self.height, self.starts % self.height
        right, bottom = (self.ends - 1) // self.height, (self.ends - 1) % self.height
        is_long = right > left  # reaches the last row and begins anew in the first
        edges = np.zeros((self.count, 4), dtype=np.int64)
        edges[:, :2] = MAX_FRAME_PIXELS
        np.minimum.at(edges[:, 0], self.owners, left)
        np.minimum.at(edges[:, 1], self.owners, np.where(is_long, 0, top))
        np.maximum.at(edges[:, 2], self.owners, right + 1)
        np.maximum.at(edges[:, 3], self.owners, np.where(is_long, self.height, bottom + 1))
        edges[edges[:, 2] == 0] = 0
        edges[:, 2:] -= edges[:, :2]
        return edges

    def select(self, keep: Bool[np.ndarray, " M"] | Int64[np.ndarray, " m"]) -> "PhotoMasks":
        """The masks that are true in `keep`, or those of these indices, in their order."""
        indices = np.arange(self.count)[keep]
        lengths = np.bincount(self.owners, minlength=self.count)
        firsts = np.cumsum(lengths) - lengths
        lengths, firsts = lengths[indices], firsts[indices]
        owners = np.repeat(np.arange(len(indices)), lengths)
        runs = np.arange(len(owners)) + (firsts - np.cumsum(lengths) + lengths)[owners]
        return replace(
            self,
            starts=self.starts[runs],
            ends=self.ends[runs],
            owners=owners,
            count=len(indices),
            scores=self.scores[indices],
            details=None if self.details is None else tuple(self.details[i] for i in indices),
        )

    def largest(self, limit: int) -> "PhotoMasks":
        """At most that many masks, the largest by area, in their order; the rest is broken."""
        if self.count <= limit:
            return self
        kept = np.sort(np.argsort(-self.areas(), kind="stable")[:limit])
        return replace(self.select(kept), broken=self.broken + self.count - limit)

    def sample(
        self, rows: Int64[np.ndarray, " h"], columns: Int64[np.ndarray, " w"]
    ) -> Bool[np.ndarray, "M h w"]:
        """The masks at these rows and columns of the photo, without decoding them.

        Rows and columns may come in any order and more than once; outside the photo there is no
        mask. The pixels asked for, sorted by position, are numbered; a run covers the numbers
        from that of its start to that of its end. So a run costs two look-ups however long it is.
        """
        inside_rows = rows.clip(0, self.height - 1)
        inside_columns = columns.clip(0, self.width - 1)
        some_rows, row_places = np.unique(inside_rows, return_inverse=True)
        some_columns, column_places = np.unique(inside_columns, return_inverse=True)
        masks = self._sample_sorted(some_rows, some_columns)
        if not np.array_equal(some_columns, columns):
            masks = masks[:, column_places]
        masks = masks.transpose(0, 2, 1)  # [M, h, w]
        if not np.array_equal(some_rows, rows):
            masks = masks[:, row_places]
        masks[:, inside_rows != rows] = False
        masks[:, :, inside_columns != columns] = False
        return masks

    def _sample_sorted(
        self, rows: Int64[np.ndarray, " h"], columns: Int64[np.ndarray, " w"]
    ) -> Bool[np.ndarray, "M w h"]:
        """The masks at increasing rows and columns of the photo, column by column."""
        pixels = len(rows) * len(columns)
        row_rank = np.searchsorted(rows, np.arange(self.height))
        every_column = np.arange(self.width + 1)  # a run may end where column `width` would begin
        column_rank = np.searchsorted(columns, every_column) * len(rows)
        is_sampled = np.isin(every_column, columns)

        def numbers(positions: Int64[np.ndarray, " R"]) -> Int64[np.ndarray, " R"]:
            column = positions // self.height
            within = row_rank[positions - column * self.height]
            return column_rank[column] + within * is_sampled[column]

        firsts, lasts = numbers(self.starts), numbers(self.ends)
        hits = firsts < lasts
        owners = self.owners[hits]
        is_hit = np.zeros(self.count, dtype=bool)
        is_hit[owners] = True
        offsets = ((np.cumsum(is_hit) - 1) * pixels)[owners]
        # Runs that are not empty start at different numbers, and end so: no place is hit twice.
        hit_count = int(is_hit.sum())
        steps = np.zeros(hit_count * pixels + 1, dtype=np.int8)
        steps[firsts[hits] + offsets] += 1
        steps[lasts[hits] + offsets] -= 1
        np.cumsum(steps, dtype=np.int8, out=steps)
        masks = np.zeros((self.count, len(columns), len(rows)), dtype=bool)
        masks[is_hit] = steps[:-1].view(bool).reshape(hit_count, len(columns), len(rows))
        return masks

    def to_rle(self) -> list[bytes]:
        """COCO's compressed counts of each mask."""
        bounds = np.searchsorted(self.owners, np.arange(self.count + 1))
        texts = []
        for first, last in pairwise(bounds):
            edges = np.stack([self.starts[first:last], self.ends[first:last]], axis=1)
            texts.append(rle.encode(edges.ravel(), self.height, self.width))
        return texts


def from_rle(
    height: int,
    width: int,
    segmentations: Sequence[object],
    scores: Sequence[float] | None = None,
    details: Sequence[dict[str, object]] | None = None,
) -> PhotoMasks:
    """The masks of COCO's run-length codes; what is no such code is left out and counted.

    Args:
        height: of the photo.
        width: of the photo.
        segmentations: `{"size": [height, width], "counts": ...}` with compressed counts (text or
            bytes) or a list of them, or bare compressed counts.
        scores: quality of each, brought to [0, 1].
        details: what else is known of each.

    Raises:
        DataError: a photo cannot have that height and width.
    """
    _check_frame(height, width)
    texts: list[bytes] = []
    indices: list[int] = []
    characters = 0
    for index, segmentation in enumerate(segmentations[:MAX_MASKS]):
        text = rle.compressed(segmentation, height, width)
        if text and characters + len(text) <= MAX_CHARACTERS:
            characters += len(text)
            texts.append(text)
            indices.append(index)
    runs = rle.decode(texts, height * width)
    kept = np.array(indices, dtype=np.int64)[runs.is_good]
    quality = np.ones(len(segmentations)) if scores is None else np.array(scores, dtype=np.float64)
    return PhotoMasks(
        height=height,
        width=width,
        starts=runs.starts,
        ends=runs.ends,
        owners=runs.owners,
        count=len(kept),
        scores=np.nan_to_num(quality[kept], nan=1.0).clip(0, 1).astype(np.float32),
        broken=len(segmentations) - len(kept),
        details=None if details is None else tuple(details[i] for i in kept),
    )


def _check_frame(height: int, width: int) -> None:
    """Make sure that masks can have this frame.

    Raises:
        DataError: they cannot.
    """
    if height < 1 or width < 1 or height * width > MAX_FRAME_PIXELS:
        raise DataError(f"masks cannot have a frame of {width} x {height} pixels")


def from_coco(
    height: int,
    width: int,
    segmentations: Sequence[object],
    scores: Sequence[float] | None = None,
    details: Sequence[dict[str, object]] | None = None,
) -> PhotoMasks:
    """The masks of COCO's segmentations: polygons, drawn as COCO draws them, or run-length codes.

    Args:
        height: of the photo.
        width: of the photo.
        segmentations: those of `from_rle`, or a list of rings `[x0, y0, x1, y1, ...]` whose union
            is the mask. What is damaged is left out and counted.
        scores: quality of each, brought to [0, 1].
        details: what else is known of each.

    Raises:
        DataError: a photo cannot have that height and width.
    """
    _check_frame(height, width)
    codes = list(segmentations)
    drawn = 0.0
    for index, polygon in enumerate(segmentations[:MAX_MASKS]):
        if not isinstance(polygon, list):
            continue
        rings = rle.rings_of(polygon, max(height, width))
        cost = sum(map(rle.drawing_cost, rings))
        codes[index] = None
        if rings and drawn + cost <= MAX_OUTLINE * (height + width):
            drawn += cost
            codes[index] = rle.draw(rings, height, width)
    return from_rle(height, width, codes, scores, details)


def from_labels(labels: Integer[np.ndarray, "H W"], *, ignore: Collection[int] = ()) -> PhotoMasks:
    """One mask per value of a label map, by increasing value.

    Raises:
        DataError: a photo cannot have that height and width, or the map is noise.
    """
    height, width = labels.shape
    _check_frame(height, width)
    flat = labels.ravel(order="F")
    is_change = flat[1:] != flat[:-1]
    if np.count_nonzero(is_change) >= MAX_RUNS:
        raise DataError(f"a label map of {width} x {height} pixels has over {MAX_RUNS} runs")
    changes = np.flatnonzero(is_change) + 1
    starts = np.concatenate([[0], changes])
    ends = np.append(changes, flat.size)
    is_wanted = ~np.isin(flat[starts], list(ignore))
    starts, ends = starts[is_wanted], ends[is_wanted]
    values, owners = np.unique(flat[starts], return_inverse=True)
    order = np.argsort(owners, kind="stable")
    order = order[: np.searchsorted(owners[order], MAX_MASKS)]
    count = min(len(values), MAX_MASKS)
    return PhotoMasks(
        height=height,
        width=width,
        starts=starts[order],
        ends=ends[order],
        owners=owners[order],
        count=count,
        scores=np.ones(count, dtype=np.float32),
        broken=len(values) - count,
    )


def from_masks(masks: Bool[np.ndarray, "M H W"]) -> PhotoMasks:
    """The runs of masks.

    Raises:
        DataError: a photo cannot have that height and width.
    """
    count, height, width = masks.shape
    _check_frame(height, width)
    flat = np.zeros((count, height * width + 2), dtype=bool)  # background before and after
    flat[:, 1:-1] = masks.transpose(0, 2, 1).reshape(count, height * width)
    owners, edges = np.nonzero(flat[:, 1:] != flat[:, :-1])
    return PhotoMasks(
        height=height,
        width=width,
        starts=edges[::2],
        ends=edges[1::2],
        owners=owners[::2],
        count=count,
        scores=np.ones(count, dtype=np.float32),
    )
