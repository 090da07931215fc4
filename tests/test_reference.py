"""The numbers of the authors' code, on tiny random models (see golden/README.md).

Tolerances are those of ../shared/reference/README.md: about ten times what float32 in another
order of operations costs.
"""

import gzip
import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixelclip.backbones import Backbone, _fill, build_backbone
from pixelclip.backbones.catalog import CLIP_MEAN, CLIP_STD, make_card
from pixelclip.backbones.pixels import squash
from pixelclip.backbones.text import half_precision
from pixelclip.backbones.vit import LAST_BLOCKS
from pixelclip.config import SegmentConfig
from pixelclip.segmenter import Segmenter
from pixelclip.upsample import axis, upsample_grid, upsampled_argmax
from pixelclip.vocabulary import encode_classes, per_template, template_sets

GOLDEN = Path(__file__).parent / "golden"
VIT = {"image_size": 224, "layers": 3, "width": 128, "patch_size": 16, "head_width": 64}
CONVNEXT = {"timm_model_name": "convnext_reference", "timm_pool": "", "timm_proj": "linear",
            "image_size": 320}  # fmt: skip
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
SIZES = {"vit": (320, 224), "convnext": (256, 192)}
SQUARE = {"vit": 320, "convnext": 256}
TEMPLATES = {"single": "single", "imagenet_select": "imagenet-select"}
GRID = 64


@dataclass(frozen=True, eq=False)
class Reference:
    """Stored values, and the model they were computed with; `strides` say what was stored."""

    model: str
    values: dict[str, object]
    strides: dict[str, list[int]]
    backbone: Backbone

    def __getitem__(self, key: str) -> object:
        return self.values[key]

    def stored_part(self, key: str, ours: Tensor) -> Tensor:
        """The part of our result that is stored under that key."""
        return ours[tuple(slice(None, None, step) for step in self.strides.get(key, ()))]

    def check_relative(self, key: str, ours: Tensor, limit: float) -> None:
        theirs, ours = self[key], self.stored_part(key, ours)
        assert ours.shape == theirs.shape
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < limit, f"{key}: relative L2 distance {error:.1e}"

    def check_absolute(self, key: str, ours: Tensor, limit: float) -> None:
        torch.testing.assert_close(self.stored_part(key, ours), self[key], rtol=0, atol=limit)

    def image(self, key: str) -> Tensor:
        """A stored picture, RGB in [0, 1]."""
        return self[key].float() / 255

    def dense_input(self, size: int) -> Tensor:
        key = "dense/image" if "dense/image" in self.values else self["dense/image_key"]
        return squash(self.image(key), size)[None]

    def segmenter(self) -> Segmenter:
        config = SegmentConfig(preset="authors", templates="single", precision="float32")
        return Segmenter(self.backbone, ("cat",), config=config, cache=False)


@cache
def text_features(reference: Reference, kind: str) -> Tensor:
    """Class features; the golden ConvNeXt comes without its text tower, but with these."""
    if reference.model == "convnext" and reference.strides:
        return reference[f"text/{kind}/class"]
    names, templates = reference["config/class_names"], reference[f"text/templates/{kind}"]
    return encode_classes(reference.backbone.text, names, templates)


@cache
def features64(reference: Reference, image_key: str) -> Tensor:
    """Unit-norm features on the authors' grid, of a picture resized straight to a square."""
    pixels = squash(reference.image(image_key), SQUARE[reference.model])
    return reference.segmenter().features([pixels])[0]


def golden_values(model: str) -> tuple[dict[str, object], dict[str, list[int]]]:
    content = json.loads((GOLDEN / f"{model}.json").read_text(encoding="utf-8"))
    packed = (GOLDEN / f"{model}.safetensors.gz").read_bytes()
    values = {**content["values"], **safetensors.torch.load(gzip.decompress(packed))}
    if "token_ids" in values:
        table = torch.zeros(TEXT["vocab_size"], TEXT["width"])
        table[values["token_ids"]] = values["state/token_embedding.weight"].float()
        values["state/token_embedding.weight"] = table
    return values, content["strides"]


def all_values(folder: Path, model: str) -> dict[str, object]:
    with gzip.open(folder / f"{model}.pt.gz") as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


@cache
def load_reference(folder: Path, model: str) -> Reference:
    values, strides = golden_values(model) if folder == GOLDEN else (all_values(folder, model), {})
    vision, activation = (VIT, "quickgelu") if model == "vit" else (CONVNEXT, "gelu")
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": TEXT}
    backbone = build_backbone(make_card(model, config, activation=activation, pixels={}))
    state = {k.removeprefix("state/"): v.float() for k, v in values.items() if "state/" in k}
    if model == "convnext" and strides:
        state |= {k: v for k, v in backbone.text.state_dict().items() if k not in state}
    _fill(backbone, state, folder)
    return Reference(model, values, strides, backbone)


def references(*cases: str):
    """A fixture over `origin-model` cases."""
    marks = {"golden": [], "shared": [pytest.mark.shared]}
    params = [pytest.param(case, marks=marks[case.partition("-")[0]]) for case in cases]

    @pytest.fixture(params=params)
    def load(request):
        origin, _, model = request.param.partition("-")
        if origin == "golden":
            return load_reference(GOLDEN, model)
        return load_reference(request.getfixturevalue("shared_dir") / "reference", model)

    return load


reference = references("golden-vit", "golden-convnext", "shared-vit", "shared-convnext")
with_text = references("golden-vit", "shared-vit", "shared-convnext")
vit = references("golden-vit", "shared-vit")
convnext = references("golden-convnext", "shared-convnext")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_pixel_statistics_are_the_authors(vit):
    np.testing.assert_allclose(np.multiply(CLIP_MEAN, 255), vit["config/pixel_mean"], rtol=1e-6)
    np.testing.assert_allclose(np.multiply(CLIP_STD, 255), vit["config/pixel_std"], rtol=1e-6)


@pytest.mark.parametrize("which", [0, 1], ids=["larger", "smaller"])
def test_dense_features_are_the_authors(reference, which):
    size = SIZES[reference.model][which]
    ours = reference.backbone.dense(reference.dense_input(size)).permute(0, 2, 3, 1)
    reference.check_relative(f"dense/{size}", ours, 2e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["larger", "smaller"])
def test_pooled_embedding_is_the_authors(reference, which):
    size = SIZES[reference.model][which]
    kind = "cls" if reference.model == "vit" else "pooled"
    ours = reference.backbone.pooled(reference.dense_input(size))
    reference.check_relative(f"dense/{kind}_{size}", ours, 2e-5)


@pytest.mark.parametrize("size", SIZES["convnext"])
def test_trunk_features_are_the_authors(convnext, size):
    ours = convnext.backbone.visual.trunk_features(convnext.dense_input(size))
    convnext.check_relative(f"dense/trunk_{size}", ours, 2e-5)


def test_resized_position_embedding_is_the_authors(vit):
    ours = vit.backbone.visual.positions((20, 20))[::8]  # the stored rows
    vit.check_absolute("dense/pos_embed_320_sub", ours, 1e-6)


def test_states_before_the_last_block_are_the_authors(vit):
    ours, grid = vit.backbone.visual.tokens(vit.dense_input(224))
    assert grid == (14, 14)
    vit.check_relative("dense/hidden_before_last_224", ours, 2e-5)


def test_states_after_the_last_block_are_the_authors(vit):
    visual = vit.backbone.visual
    tokens, grid = visual.tokens(vit.dense_input(224))
    patches = LAST_BLOCKS["pixelclip"](visual.tower.transformer.resblocks[-1], tokens, grid)
    key = "dense/last_block_dense_224"
    # Row 0 is the class token, which the authors compute and drop, and we do not compute.
    ours = vit.stored_part(key, torch.cat([tokens[:, :1], patches], dim=1))[:, 1:]
    theirs = vit[key][:, 1:]
    assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-5


def test_token_ids_are_the_authors(vit):
    ours = vit.backbone.text.tokenize(vit["text/tokens/strings"])
    padded = F.pad(ours, (0, TEXT["context_length"] - ours.shape[1]))
    assert torch.equal(padded, vit["text/tokens/ids"])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_are_the_authors(reference, kind):
    assert list(template_sets()[TEMPLATES[kind]]) == reference[f"text/templates/{kind}"]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_text_features_per_template_are_the_authors(with_text, kind):
    names, templates = with_text["config/class_names"], with_text[f"text/templates/{kind}"]
    ours = per_template(with_text.backbone.text, names, templates)
    with_text.check_relative(f"text/{kind}/per_template", ours, 1e-5)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_class_features_are_the_authors(with_text, kind):
    with_text.check_relative(f"text/{kind}/class", text_features(with_text, kind), 1e-5)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_half_precision_class_features_are_the_authors(vit, kind):
    half = half_precision(vit.backbone.text)
    ours = encode_classes(half, vit["config/class_names"], vit[f"text/templates/{kind}"])
    vit.check_absolute(f"text/{kind}/class_half", ours, 2e-3)  # half kernels differ by machine


def test_half_precision_keeps_layer_norms_in_float32(vit):
    half = half_precision(vit.backbone.text)
    norms = {
        id(p) for m in half.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()
    }
    assert len(norms) == 2 * (2 * TEXT["layers"] + 1)
    for parameter in half.parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in norms else torch.float16)


def test_half_precision_leaves_the_original_as_it_is(vit):
    half_precision(vit.backbone.text)
    assert {p.dtype for p in vit.backbone.text.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_cosines_on_the_grid_are_the_authors(reference, kind):
    cosines = torch.einsum(
        "hwd,kd->khw", features64(reference, "infer/image"), text_features(reference, kind)
    )
    reference.check_absolute(f"infer/{kind}/logits64", cosines, 1e-5)


def upsampled(features: Tensor, text: Tensor, height: int, width: int) -> Tensor:
    """Every class's map at pixel resolution, through the package's own upsampling."""
    rows, columns = upsampling_axes(features, height, width)
    maps = [upsample_grid(features @ row, rows, columns) for row in text]
    return torch.from_numpy(np.stack(maps))


def upsampling_axes(features: Tensor, height: int, width: int):
    grid_height, grid_width = features.shape[:2]
    return axis(height, grid_height, grid_height / height), axis(
        width, grid_width, grid_width / width
    )


@pytest.mark.parametrize("kind", TEMPLATES)
def test_upsampled_cosines_are_the_authors(reference, kind):
    size = reference["infer/orig_height"], reference["infer/orig_width"]
    maps = upsampled(features64(reference, "infer/image"), text_features(reference, kind), *size)
    reference.check_absolute(f"infer/{kind}/sem_seg_sub", maps[:, ::6, ::6], 1e-5)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_class_map_is_the_authors(reference, kind):
    features = features64(reference, "infer/image")
    size = reference["infer/orig_height"], reference["infer/orig_width"]
    labels, _ = upsampled_argmax(
        features, text_features(reference, kind), *upsampling_axes(features, *size)
    )
    differ = labels != reference[f"infer/{kind}/argmax"].numpy()
    assert differ.mean() <= 1e-4  # ties below 4e-7 exist


def test_small_picture_with_the_authors_crop_is_theirs(vit):
    # Their last resize first crops the 64 x 64 map to the picture's size (behaviour.md 17c).
    height, width = vit["infer_small/image"].shape[1:]
    cropped = features64(vit, "infer_small/image")[:height, :width]
    maps = upsampled(cropped, text_features(vit, "imagenet_select"), height, width)
    vit.check_absolute("infer_small/sem_seg_sub", maps[:, ::8, ::8], 1e-5)
    axes = upsampling_axes(cropped, height, width)
    labels, _ = upsampled_argmax(cropped, text_features(vit, "imagenet_select"), *axes)
    assert (labels != vit["infer_small/argmax"].numpy()).mean() <= 1e-4


def test_small_picture_is_not_cropped_by_the_authors_preset(vit):
    height, width = vit["infer_small/image"].shape[1:]
    photo = Image.fromarray(vit["infer_small/image"].permute(1, 2, 0).numpy())
    config = SegmentConfig(preset="authors", templates="imagenet-select", precision="float32")
    names = vit["config/class_names"]
    segmenter = Segmenter(vit.backbone, names, config=config, cache=False)
    enlarged = np.array(photo.resize((1280, 640), Image.Resampling.BILINEAR))  # behaviour.md 18a
    pixels = squash(torch.from_numpy(enlarged).permute(2, 0, 1).float() / 255, SQUARE["vit"])
    cosines = segmenter.features([pixels])[0] @ text_features(vit, "imagenet_select").T
    labels = segmenter(photo).labels

    def differing(rows: int) -> float:
        """Share of other labels when only that many rows of the map are stretched."""
        maps = cosines[:rows].permute(2, 0, 1)[None]
        maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[0]
        return (labels != maps.argmax(0).numpy()).mean()

    assert differing(GRID) < 1e-3  # ties
    assert differing(height) > 1e-2
