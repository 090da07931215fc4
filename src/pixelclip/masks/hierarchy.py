"""A tree of regions: neighbours that look alike are merged, the most alike first."""

import heapq
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64, Integer, UInt8
from skimage.color import rgb2lab
from skimage.filters import gaussian

BINS = 16  # per channel of Lab, and for texture 4 directions times 4 strengths
LAB_RANGES = ((0.0, 100.0), (-60.0, 60.0), (-60.0, 60.0))
CRUMB_HEIGHT = 0.4  # below it, merges only mend what the first regions tore apart
CONTRAST = 10.0  # Lab units per pixel; a boundary this strong weighs as much as no common colour
SIZE_POWER = 0.1  # larger: small regions are merged earlier and all become more equal


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Regions of a photo and what they are merged to; the last one is the whole photo.

    Attributes:
        count: n regions that are not merged from others, numbered as in their label map.
        parents: number of the region that each becomes a part of; larger than its own.
        heights: how unlike the two parts of a region are, never more than that of its parent; 0
            without parts.
        sizes: share of the photo in each.
    """

    count: int
    parents: Int64[np.ndarray, " N"]
    heights: Float64[np.ndarray, " N"]
    sizes: Float64[np.ndarray, " N"]

    def cut(self, threshold: float) -> Int64[np.ndarray, " n"]:
        """The region that each of the n is in where no two parts are more unlike than that."""
        found = np.arange(len(self.parents))
        for region in reversed(range(len(found) - 1)):  # parents first
            parent = self.parents[region]
            if self.heights[parent] <= threshold:
                found[region] = found[parent]
        return found[: self.count]

    def survival(self) -> Float64[np.ndarray, " N"]:
        """How long each region lasts, in [0, 1]; the whole photo, which nothing ends, has 1.

        From the merge that makes it (heights below 0.4 count as 0.4) to the one that ends it,
        times the fourth root of its share of the photo: small regions last for want of any
        neighbour like them, and are rarely what a person would draw.
        """
        ends = np.append(self.heights[self.parents[:-1]], np.inf)
        lasting = ends - np.maximum(self.heights, CRUMB_HEIGHT)
        return np.clip(lasting * self.sizes**0.25, 0.0, 1.0)

    def ranges(self) -> Int64[np.ndarray, "N 2"]:
        """First and last + 1 of the n regions in each, if they are put in the tree's order.

        The n regions' own ranges are that order.
        """
        counts = np.zeros(len(self.parents), dtype=np.int64)
        counts[: self.count] = 1
        for region, parent in enumerate(self.parents[:-1].tolist()):
            counts[parent] += counts[region]
        firsts = np.zeros(len(counts), dtype=np.int64)
        free = np.zeros(len(counts), dtype=np.int64)  # where the next part of a region begins
        for region in reversed(range(len(counts) - 1)):
            parent = self.parents[region]
            firsts[region] = free[region] = free[parent]
            free[parent] += counts[region]
        return np.stack([firsts, firsts + counts], axis=1)


def merge_regions(
    image: UInt8[np.ndarray, "H W 3"], labels: Integer[np.ndarray, "H W"]
) -> Hierarchy:
    """The tree of a photo's regions, made greedily as in Selective Search (Uijlings, IJCV 2013).

    Two neighbours are as unlike as the sum of: the share of their pixels that differ in colour
    (histograms of L, a and b, their mean), the same for texture (histogram of the gradient of L),
    and the contrast along their boundary; times the smaller one's share of the photo to the power
    0.1. Chosen on BSDS photos and label maps (docs/results/masks.md).

    Args:
        image: the photo.
        labels: connected regions, all numbers from 0 on occur.
    """
    lab = rgb2lab(image.astype(np.float32) / 255)
    smooth = np.pad(gaussian(lab, 1.0, channel_axis=2), ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = (smooth[2:, 1:-1] - smooth[:-2, 1:-1]) / 2
    right = (smooth[1:-1, 2:] - smooth[1:-1, :-2]) / 2
    strength = np.hypot(down, right)
    pairs, lengths, contrasts = _boundaries(labels, np.sqrt((strength**2).sum(axis=2)))
    texture = _texture(np.arctan2(down[..., 0], right[..., 0]), strength[..., 0])
    histograms = _histograms(labels, lab, texture)
    return _merge(np.bincount(labels.ravel()) / labels.size, histograms, pairs, lengths, contrasts)


def _texture(
    angle: Float32[np.ndarray, "H W"], strength: Float32[np.ndarray, "H W"]
) -> Int64[np.ndarray, "H W"]:
    """Direction (4 of half a turn) and strength (4, each twice the last) of the gradient."""
    direction = (angle % np.pi * (4 / np.pi)).astype(np.int64).clip(0, 3)
    level = (np.log2(strength + 0.5) + 1).clip(0, 3).astype(np.int64)
    return direction * 4 + level


def _histograms(
    labels: Integer[np.ndarray, "H W"],
    lab: Float32[np.ndarray, "H W 3"],
    texture: Int64[np.ndarray, "H W"],
) -> Float64[np.ndarray, "n D"]:
    """Histograms of each region, so scaled that the sum of differences is that of the shares."""
    places = labels.ravel().astype(np.int64) * BINS
    count = (int(labels.max()) + 1) * BINS
    columns = [
        ((lab[..., channel] - low) * (BINS / (high - low))).clip(0, BINS - 1).astype(np.int64)
        for channel, (low, high) in enumerate(LAB_RANGES)
    ]
    parts = [
        np.bincount(places + column.ravel(), minlength=count).reshape(-1, BINS)
        for column in (*columns, texture)
    ]
    shares = np.stack(parts, axis=1) / parts[0].sum(axis=1)[:, None, None]  # [n, 4, bins]
    weights = np.array([1 / 3, 1 / 3, 1 / 3, 1]) / 2  # two that share nothing differ by 2
    return (shares * weights[:, None]).reshape(len(shares), -1)


def _boundaries(
    labels: Integer[np.ndarray, "H W"], strength: Float32[np.ndarray, "H W"]
) -> tuple[Int64[np.ndarray, "E 2"], Float64[np.ndarray, " E"], Float64[np.ndarray, " E"]]:
    """Neighbours, the pixel edges between them, and the sum of the gradient along these."""
    count = int(labels.max()) + 1
    keys, values = [], []
    for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        is_edge = labels[here] != labels[there]
        one = labels[here][is_edge].astype(np.int64)
        other = labels[there][is_edge].astype(np.int64)
        keys.append(np.minimum(one, other) * count + np.maximum(one, other))
        values.append(np.maximum(strength[here], strength[there])[is_edge])
    found, index = np.unique(np.concatenate(keys), return_inverse=True)
    pairs = np.stack([found // count, found % count], axis=1)
    sums = np.bincount(index, np.concatenate(values), minlength=len(found)).astype(np.float64)
    return pairs, np.bincount(index, minlength=len(found)).astype(np.float64), sums


def _merge(
    sizes: Float64[np.ndarray, " n"],
    histograms: Float64[np.ndarray, "n D"],
    pairs: Int64[np.ndarray, "E 2"],
    lengths: Float64[np.ndarray, " E"],
    contrasts: Float64[np.ndarray, " E"],
) -> Hierarchy:
    """Merge the two most alike until one is left; of equals, those with the smallest numbers."""
    count = len(sizes)
    sizes = np.append(sizes, np.zeros(count - 1))
    histograms = np.concatenate([histograms, np.zeros((count - 1, histograms.shape[1]))])

    def costs(
        one: Int64[np.ndarray, " E"] | int,
        others: Int64[np.ndarray, " E"],
        lengths: Float64[np.ndarray, " E"],
        contrasts: Float64[np.ndarray, " E"],
    ) -> list[float]:
        unlike = np.abs(histograms[one] - histograms[others]).sum(axis=1)
        unlike += contrasts / (lengths * CONTRAST)
        values: list[float] = (unlike * sizes[others].clip(max=sizes[one]) ** SIZE_POWER).tolist()
        return values

    edges = pairs.tolist()
    neighbours: list[dict[int, tuple[float, float]]] = [{} for _ in range(2 * count - 1)]
    for (one, other), *edge in zip(edges, lengths.tolist(), contrasts.tolist(), strict=True):
        neighbours[one][other] = neighbours[other][one] = (edge[0], edge[1])
    first_costs = costs(pairs[:, 0], pairs[:, 1], lengths, contrasts)
    heap = [(cost, one, other) for cost, (one, other) in zip(first_costs, edges, strict=True)]
    heapq.heapify(heap)
    parents = list(range(2 * count - 1))
    heights = np.zeros(2 * count - 1)
    for new in range(count, 2 * count - 1):
        height, one, other = heapq.heappop(heap)
        while parents[one] != one or parents[other] != other:  # merged before
            height, one, other = heapq.heappop(heap)
        parents[one] = parents[other] = new
        heights[new] = max(height, heights[one], heights[other])
        sizes[new] = sizes[one] + sizes[other]
        share = sizes[one] / sizes[new]
        histograms[new] = share * histograms[one] + (1 - share) * histograms[other]
        around = neighbours[new] = _joined(neighbours, one, other, new)
        if around:
            others = np.array(list(around))
            both = np.array(list(around.values()))
            found = costs(new, others, both[:, 0], both[:, 1])
            for cost, other in zip(found, around, strict=True):
                heapq.heappush(heap, (cost, other, new))
    return Hierarchy(count, np.array(parents), heights, sizes)


def _joined(
    neighbours: list[dict[int, tuple[float, float]]], one: int, other: int, new: int
) -> dict[int, tuple[float, float]]:
    """The neighbours of two regions become those of a new one, which they now have."""
    around = neighbours[one]
    for region, (length, contrast) in neighbours[other].items():
        before = around.get(region, (0.0, 0.0))
        around[region] = (before[0] + length, before[1] + contrast)
    del around[one], around[other]
    for region, edge in around.items():
        neighbours[region].pop(one, None)
        neighbours[region].pop(other, None)
        neighbours[region][new] = edge
    neighbours[one] = neighbours[other] = {}
    return around
