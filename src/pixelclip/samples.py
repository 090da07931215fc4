"""Real photos for a first run, shipped by packages that are installed anyway."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pixelclip.errors import DataError


class Sample(NamedTuple):
    """A photo inside an installed package and words for what is in it."""

    package: str
    path: str
    classes: str


SAMPLES = (
    Sample("sklearn", "datasets/images/china.jpg", "temple, sky, bushes, lake"),
    Sample("skimage", "data/coffee.png", "cup, wooden table"),
    Sample("skimage", "data/rocket.jpg", "rocket, evening sky, lamps"),
    Sample("skimage", "data/camera.png", "man, tripod, sky, grass, city"),
    Sample("skimage", "data/motorcycle_left.png", "motorcycle, ground, shelf"),
    Sample("sklearn", "datasets/images/flower.jpg", "flower, green leaf"),
)


def sample_photos() -> list[tuple[Path, str]]:
    """The sample photos that are there, each with its words.

    Raises:
        DataError: none is installed.
    """
    found = []
    for sample in SAMPLES:
        spec = find_spec(sample.package)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin).parent / sample.path
        if path.is_file():
            found.append((path, sample.classes))
    if not found:
        raise DataError("no sample photos: install scikit-image or scikit-learn, or give a photo")
    return found
