"""Outlines of masks along pixel edges."""

from collections import defaultdict

import numpy as np
from jaxtyping import Bool

Corner = tuple[int, int]


def trace_rings(mask: Bool[np.ndarray, "H W"]) -> list[list[tuple[float, float]]]:
    """Closed rings (x, y) around the true pixels, first corner repeated at the end.

    Every edge between a true and a false pixel (or the border) belongs to one ring, with the true
    pixel on its right; where two true pixels touch at a corner only, their rings stay apart.
    """
    after = _edges(mask)
    rings = []
    while after:
        start = next(iter(after))
        ring, corner, direction = [start], start, (0, 0)
        while True:
            following = _turn(after, corner, direction)
            step = (following[0] - corner[0], following[1] - corner[1])
            if step == direction:
                ring[-1] = following
            else:
                ring.append(following)
            corner, direction = following, step
            if corner == start:
                break
        rings.append([(float(x), float(y)) for x, y in ring])
    return rings


def _edges(mask: Bool[np.ndarray, "H W"]) -> dict[Corner, list[Corner]]:
    """Unit edges by their first corner, the true pixel on the right of each."""
    inside = np.pad(mask, 1)
    core = inside[1:-1, 1:-1]
    sides = (
        (core & ~inside[:-2, 1:-1], (0, 0), (1, 0)),  # above: to the right
        (core & ~inside[1:-1, 2:], (1, 0), (1, 1)),  # right: down
        (core & ~inside[2:, 1:-1], (1, 1), (0, 1)),  # below: to the left
        (core & ~inside[1:-1, :-2], (0, 1), (0, 0)),  # left: up
    )
    after: dict[Corner, list[Corner]] = defaultdict(list)
    for edge, first, second in sides:
        for y, x in np.argwhere(edge).tolist():
            after[x + first[0], y + first[1]].append((x + second[0], y + second[1]))
    return dict(after)


def _turn(after: dict[Corner, list[Corner]], corner: Corner, direction: Corner) -> Corner:
    """Take the next edge from a corner; of two, the one that turns right."""
    choices = after[corner]
    right = (corner[0] - direction[1], corner[1] + direction[0])
    following = right if right in choices else choices[0]
    choices.remove(following)
    if not choices:
        del after[corner]
    return following


def simplified(ring: list[tuple[float, float]], tolerance: float) -> list[tuple[float, float]]:
    """The ring with fewer corners, none farther than `tolerance` pixels from it."""
    if tolerance <= 0:
        return ring
    from skimage.measure import approximate_polygon

    fewer = approximate_polygon(np.array(ring), tolerance)
    return [(float(x), float(y)) for x, y in fewer] if len(fewer) > 3 else ring
