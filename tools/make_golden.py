"""Extract from the reference values what the tests need on a machine without them.

    python tools/make_golden.py ../shared/reference tests/golden

Weights keep the half precision in which they are stored (their values are exact in float32); of
the token embedding only the rows of the words in use are kept, of large results a regular part.
"""

import argparse
import gzip
import io
import json
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save

MODELS = ("vit", "convnext")
PARTS = ("config", "state", "text", "dense", "infer", "infer_small")
TRAINING = ("b", "c", "sinkhorn", "prompt")  # of the ViT
DECODER = ("head/conv0.weight", "head/proj.bias")  # first and last to be drawn
# Step per axis at which a large result is kept; the tests apply the same step to what we compute.
STRIDES = {
    "dense/320": (1, 2, 2, 1),
    "dense/hidden_before_last_224": (1, 4, 1),
    "dense/last_block_dense_224": (1, 4, 1),
    "infer/single/logits64": (1, 5, 5),
    "infer/imagenet_select/logits64": (1, 5, 5),
    "infer/single/sem_seg_sub": (1, 2, 2),
    "infer/imagenet_select/sem_seg_sub": (1, 2, 2),
}
TOKENS = "state/token_embedding.weight"
TEXT_TOWER = ("positional_embedding", "text_projection", "transformer.", "ln_final.")


def load_reference(path: Path) -> dict[str, object]:
    """The stored values, by key."""
    with gzip.open(path) as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


def used_words(values: dict[str, object]) -> torch.Tensor:
    """Ids of all words in the stored texts and prompts."""
    names = [part.strip() for name in values["config/class_names"] for part in name.split(",")]
    texts = list(values.get("text/tokens/strings", []))
    for kind in ("single", "imagenet_select"):
        texts += [t.format(name) for t in values[f"text/templates/{kind}"] for name in names]
    words = [SimpleTokenizer()([*texts, "x"]).flatten()]
    if "prompt/word_ids" in values:
        words += [values["prompt/word_ids"].flatten(), values["prompt/template_tokens"].flatten()]
    return torch.cat(words).unique()


def select(values: dict[str, object], *, text_tower: bool) -> dict[str, object]:
    """The values the tests need, large ones thinned out."""
    kept = {key: value for key, value in values.items() if key.split("/")[0] in PARTS}
    if text_tower:
        kept |= {key: value for key, value in values.items() if key.split("/")[0] in TRAINING}
        kept |= {key: values[key] for key in DECODER}
    kept["dense/image"] = values[values["dense/image_key"]]
    kept["token_ids"] = used_words(values)
    kept[TOKENS] = values[TOKENS][kept["token_ids"]]
    if not text_tower:  # the other model's stands for both
        prefixes = tuple(f"state/{name}" for name in (*TEXT_TOWER, "token_embedding."))
        kept = {key: value for key, value in kept.items() if not key.startswith(prefixes)}
        del kept["token_ids"]
    for key, steps in STRIDES.items():
        if key in kept:
            kept[key] = kept[key][tuple(slice(None, None, step) for step in steps)]
    return kept


def write_gzip(path: Path, content: bytes) -> None:
    """Compress without a time stamp, so that the same values give the same file."""
    path.write_bytes(gzip.compress(content, 9, mtime=0))


def make_model(reference_dir: Path, golden_dir: Path, model: str) -> None:
    """Tensors to `<model>.safetensors.gz`, the rest to `<model>.json`."""
    kept = select(load_reference(reference_dir / f"{model}.pt.gz"), text_tower=model == "vit")
    tensors = {k: v.contiguous() for k, v in kept.items() if isinstance(v, torch.Tensor)}
    others = {key: value for key, value in kept.items() if key not in tensors}
    strides = {key: steps for key, steps in STRIDES.items() if key in kept}
    write_gzip(golden_dir / f"{model}.safetensors.gz", save(tensors))
    text = json.dumps({"strides": strides, "values": others}, indent=1, sort_keys=True)
    (golden_dir / f"{model}.json").write_text(text + "\n", encoding="utf-8")


def make_keys(reference_dir: Path, golden_dir: Path) -> None:
    """Names and shapes in the authors' checkpoints, by architecture."""
    text = (reference_dir / "official_checkpoint_keys.json").read_text(encoding="utf-8")
    content = json.loads(text)
    keys = {name: content[name]["tensors"] for name in ("vit_b_16", "convnext_base_w_320")}
    write_gzip(golden_dir / "official_keys.json.gz", json.dumps(keys).encode())


def main() -> None:
    """Write all golden files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference_dir", type=Path)
    parser.add_argument("golden_dir", type=Path)
    arguments = parser.parse_args()
    for model in MODELS:
        make_model(arguments.reference_dir, arguments.golden_dir, model)
    make_keys(arguments.reference_dir, arguments.golden_dir)


if __name__ == "__main__":
    main()
