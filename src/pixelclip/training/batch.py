"""What the model is trained on: the views and masks of some photos, in frames of one size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Views of B photos, each in the upper left corner of a frame of H x W pixels.

    Attributes:
        weak: the teacher's view, 0-255; what lies outside `sizes` is padding and holds anything.
        strong: the student's view; None: the student sees the weak one.
        sizes: height and width of each view inside the frame.
        masks: per photo its masks, at m x m nearest samples of the whole frame, padding included:
            row i of the grid is row floor(i H / m) of the frame, and columns likewise.
    """

    weak: UInt8[Tensor, "B 3 H W"]
    strong: UInt8[Tensor, "B 3 H W"] | None
    sizes: Int64[Tensor, "B 2"]
    masks: tuple[Bool[Tensor, "_ m m"], ...]

    def __len__(self) -> int:
        """Number of photos B."""
        return len(self.weak)

    def __reduce__(self) -> tuple[object, ...]:
        """What goes to another process: one tensor for all masks, as each costs an open file."""
        counts = [len(masks) for masks in self.masks]
        return _from_parts, (self.weak, self.strong, self.sizes, torch.cat(self.masks), counts)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; from pinned memory, the copy goes on in the background."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in memory from which a GPU copies while the program goes on."""
        return self._map(Tensor.pin_memory)

    def split(self, parts: int) -> list["Batch"]:
        """That many batches of neighbouring photos, the same number in each or one more.

        Fewer where there are not as many photos.
        """
        count = len(self)
        parts = min(parts, count)
        bounds = [count * part // parts for part in range(parts + 1)]
        return [
            Batch(
                weak=self.weak[first:last],
                strong=None if self.strong is None else self.strong[first:last],
                sizes=self.sizes[first:last],
                masks=self.masks[first:last],
            )
            for first, last in pairwise(bounds)
        ]

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            weak=function(self.weak),
            strong=None if self.strong is None else function(self.strong),
            sizes=function(self.sizes),
            masks=tuple(function(masks) for masks in self.masks),
        )


def _from_parts(
    weak: Tensor, strong: Tensor | None, sizes: Tensor, masks: Tensor, counts: list[int]
) -> Batch:
    return Batch(weak=weak, strong=strong, sizes=sizes, masks=tuple(masks.split(counts)))


def nearest(size: int, grid: int) -> Int64[Tensor, " grid"]:
    """The pixel, of `size`, that each of `grid` nearest samples shows: floor(i size / grid)."""
    return torch.arange(grid) * size // grid


def make_batch(
    weak: Sequence[UInt8[Tensor, "3 _ _"]],
    strong: Sequence[UInt8[Tensor, "3 _ _"]] | None,
    masks: Sequence[Bool[Tensor, "_ _ _"]],
    *,
    mask_size: int,
    frame: tuple[int, int] | None = None,
    pad_masks: bool = True,
) -> Batch:
    """The batch of views that have masks at full resolution.

    Args:
        weak: view of each photo.
        strong: the same for the student.
        masks: of each photo, as high and wide as its view.
        mask_size: rows and columns m of the grid the masks are brought to.
        frame: height and width; None: the largest among the views.
        pad_masks: a mask keeps its place in the frame. False: it is stretched over the frame, as
            the authors do (behaviour.md 11d); the two differ only where a view is padded.
    """
    sizes = torch.tensor([view.shape[1:] for view in weak])
    height, width = sizes.amax(dim=0).tolist() if frame is None else frame
    grids = []
    for photo in masks:
        rows, columns = photo.shape[1:]
        if pad_masks:
            photo = torch.nn.functional.pad(photo, (0, width - columns, 0, height - rows))
            rows, columns = height, width
        grids.append(photo[:, nearest(rows, mask_size)][:, :, nearest(columns, mask_size)])
    return Batch(
        weak=_framed(weak, height, width),
        strong=None if strong is None else _framed(strong, height, width),
        sizes=sizes,
        masks=tuple(grids),
    )


def framed(
    views: UInt8[Tensor, "B 3 H W"], sizes: Int64[Tensor, "B 2"], colour: Float[Tensor, "3 1 1"]
) -> Float[Tensor, "B 3 H W"]:
    """Views in [0, 1], the padding outside `sizes` in a colour."""
    pixels = views.float().div_(255)
    for view, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        if (height, width) != view.shape[1:]:
            view[:, height:] = colour
            view[:, :, width:] = colour
    return pixels


def _framed(views: Sequence[Tensor], height: int, width: int) -> Tensor:
    """The views on black frames: [B, 3, height, width]."""
    frames = torch.zeros(len(views), 3, height, width, dtype=torch.uint8)
    for frame, view in zip(frames, views, strict=True):
        frame[:, : view.shape[1], : view.shape[2]] = view
    return frames
