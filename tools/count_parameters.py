"""Write src/pixelclip/data/parameters.json: parameters of every architecture that can be loaded.

Run after a new open_clip brings new architectures: python tools/count_parameters.py
"""

import json
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP

from pixelclip.backbones import load_backbone
from pixelclip.backbones.catalog import open_clip_names, refusal

TARGET = Path(__file__).parent.parent / "src/pixelclip/data/parameters.json"


def main() -> None:
    """Build each architecture on the meta device and count."""
    mini = load_backbone("mini-base", device="cpu")
    counts = {"mini": sum(p.numel() for p in mini.parameters())}
    for architecture in sorted({name.partition("/")[0] for name in open_clip_names()}):
        config = open_clip.get_model_config(architecture)
        assert refusal(config) is None
        with torch.device("meta"):
            model = CLIP(**config)
        counts[architecture] = sum(p.numel() for p in model.parameters())
    TARGET.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    print(f"{len(counts)} architectures -> {TARGET}")


if __name__ == "__main__":
    main()
