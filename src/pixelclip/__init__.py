"""Name things in words; every pixel of your photos gets one of those names.

The public names are loaded on first use, so that `import pixelclip` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pixelclip.errors import PixelClipError

if TYPE_CHECKING:
    from pixelclip.backbones import load_backbone
    from pixelclip.masks.make import make_masks
    from pixelclip.segmenter import Segmenter, segment
    from pixelclip.training.start import train

__version__ = "0.1.0"
__all__ = [
    "PixelClipError",
    "Segmenter",
    "__version__",
    "load_backbone",
    "make_masks",
    "segment",
    "train",
]

_HOMES = {
    "Segmenter": "pixelclip.segmenter",
    "segment": "pixelclip.segmenter",
    "load_backbone": "pixelclip.backbones",
    "make_masks": "pixelclip.masks.make",
    "train": "pixelclip.training.start",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pixelclip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
