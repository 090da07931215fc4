"""The result of segmenting one photo, and what can be made of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image

from pixelclip.images import MAX_PIXELS, as_photo
from pixelclip.overlay import overlay
from pixelclip.rings import simplified, trace_rings


class ClassArea(TypedDict):
    """How much of a photo a class covers."""

    name: str
    index: int
    pixels: int
    share: float
    confidence: float


def none_label(num_classes: int) -> int:
    """Label of pixels without a class: 255, or 65535 above 255 classes."""
    return 255 if num_classes <= 255 else 65535


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Labels of one photo in its original pixels.

    Attributes:
        labels: class index per pixel; uint8 up to 255 classes, else uint16; the highest value
            of the type means no class.
        classes: the names, in the order given.
        mean_confidence: per class, mean over its pixels of the softmax over all classes, in
            [0, 1]; 0 for a class without pixels.
        confidence: the same per pixel, if asked for.
        scores: cosine per class and pixel, if asked for.
    """

    labels: Integer[np.ndarray, "H W"]
    classes: tuple[str, ...]
    mean_confidence: Float[np.ndarray, " K"]
    confidence: Float[np.ndarray, "H W"] | None = None
    scores: Float[np.ndarray, "K H W"] | None = None

    @property
    def none(self) -> int:
        """Label of pixels without a class."""
        return none_label(len(self.classes))

    def areas(self) -> list[ClassArea]:
        """The classes that occur, largest first; pixels without a class are not in it."""
        counts = np.zeros(self.none + 1, dtype=np.int64)
        for rows in np.array_split(self.labels, -(-self.labels.size // 4_000_000)):
            counts += np.bincount(rows.ravel(), minlength=len(counts))  # 8 bytes per pixel
        counts = counts[: len(self.classes)]
        order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
        return [
            ClassArea(
                name=self.classes[k],
                index=k,
                pixels=int(counts[k]),
                share=float(counts[k] / self.labels.size),
                confidence=round(float(self.mean_confidence[k]), 4),
            )
            for k in order
        ]

    def masks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Index and boolean mask (H, W) of every class that occurs, largest first."""
        for area in self.areas():
            yield area["index"], self.labels == area["index"]

    def rles(self) -> dict[str, dict[str, object]]:
        """COCO run-length encoding per class that occurs: `size` and text `counts`."""
        from hotcoco import mask as codec

        encoded = {}
        for index, pixels in self.masks():
            rle = codec.encode(np.asfortranarray(pixels, dtype=np.uint8))
            counts = rle["counts"]
            text = counts.decode("ascii") if isinstance(counts, bytes) else counts
            encoded[self.classes[index]] = {"size": list(rle["size"]), "counts": text}
        return encoded

    def polygons(self, tolerance: float = 0.0) -> dict[str, list[list[tuple[float, float]]]]:
        """Closed rings (x, y) per class that occurs, along pixel edges, corners of the photo at 0.

        Holes are rings of their own; the even-odd rule gives the mask back, exactly if
        `tolerance` is 0.

        Args:
            tolerance: how far, in pixels, a ring may be simplified.
        """
        return {
            self.classes[index]: [simplified(ring, tolerance) for ring in trace_rings(pixels)]
            for index, pixels in self.masks()
        }

    def overlay(
        self, photo: str | Path | Image.Image | np.ndarray, opacity: float = 0.55
    ) -> Image.Image:
        """The photo under the colours of its classes, with a legend.

        Raises:
            DataError: the photo cannot be read, or is not the one these labels are of.
        """
        source = as_photo(photo, max_pixels=max(MAX_PIXELS, self.labels.size))
        return overlay(source, self.labels, self.classes, opacity=opacity)
