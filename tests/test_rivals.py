"""Rivals against slow versions of their authors' formulas; refined labels against full maps."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pixelclip.backbones import Backbone, build_backbone, load_backbone
from pixelclip.backbones.dino import DenseTimm, load_dense
from pixelclip.backbones.vit import LAST_BLOCKS, naclip_block
from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError
from pixelclip.evaluation.proxy import RivalSettings, proxy_attention, regrid
from pixelclip.evaluation.rivals import (
    RIVALS,
    check_rivals,
    departures_of,
    make_rival,
    rivals_of,
)
from pixelclip.masks.kmeans import MiniLevels
from pixelclip.masks.refine import grid_weights, mask_means, paint
from pixelclip.masks.runs import PhotoMasks, from_masks
from pixelclip.masks.superpixels import superpixels
from pixelclip.segmenter import Segmenter
from pixelclip.upsample import axis, upsample_grid
from tests.test_backbones import assert_near, photos, slow_tokens
from tests.tiny import photo
from tests.towers import save_tower

SIZES = [(64, 64), (48, 80), (100, 37), (17, 31)]  # height, width


@pytest.fixture(scope="module", params=["dino", "dinov2"])
def dino(request, tmp_path_factory) -> DenseTimm:
    """A tower with cells of 16 pixels, and one with 14."""
    folder = save_tower(tmp_path_factory.mktemp("towers") / request.param, request.param)
    return load_dense(str(folder), device="cpu")


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return load_backbone("mini", device="cpu")


def slow_attention(maps: Tensor, beta: float, gamma: float) -> list[list[float]]:
    """ProxyCLIP's attention, pair by pair."""
    cells = [maps[:, y, x] for y in range(maps.shape[1]) for x in range(maps.shape[2])]
    cosines = [[float(a @ b / (a.norm() * b.norm())) for b in cells] for a in cells]
    mean = sum(map(sum, cosines)) / len(cells) ** 2
    rows = []
    for line in cosines:
        shifted = [gamma * (cosine - beta * mean) for cosine in line]
        terms = [math.exp(value) if value >= 0 else 0.0 for value in shifted]
        rows.append([term / sum(terms) for term in terms])
    return rows


def slow_regrid(maps: Tensor, old: int, new: int, height: int, width: int) -> Tensor:
    """Maps with cells of `old` pixels brought to cells of `new` pixels, point by point."""

    def weights(points: int, cell: int) -> Tensor:
        place = min(max(((cell + 0.5) * new) / old - 0.5, 0.0), points - 1.0)
        return torch.tensor([max(0.0, 1 - abs(place - point)) for point in range(points)])

    rows = torch.stack([weights(maps.shape[-2], y) for y in range(math.ceil(height / new))])
    columns = torch.stack([weights(maps.shape[-1], x) for x in range(math.ceil(width / new))])
    return torch.einsum("yh,xw,...hw->...yx", rows, columns, maps)


def slow_proxyclip(
    backbone: Backbone, dino: DenseTimm, images: Tensor, beta: float, gamma: float
) -> Tensor:
    """The authors' `custom_attn`, head by head, one photo after the other."""
    tower, block = backbone.visual.tower, backbone.visual.tower.transformer.resblocks[-1]
    tokens, rows, columns = slow_tokens(backbone, images)
    normed, width = block.ln_1(tokens)[:, 1:], tokens.shape[-1]
    size = width // block.attn.num_heads
    results = []
    for image, states in zip(images, normed, strict=True):
        maps = dino.dense(image[None])[0]
        attention = torch.tensor(slow_attention(maps, beta, gamma))
        heads = []
        for head in range(block.attn.num_heads):
            start = 2 * width + head * size
            weight = block.attn.in_proj_weight[start : start + size]
            values = states @ weight.T + block.attn.in_proj_bias[start : start + size]
            grid = values.T.reshape(size, rows, columns)
            finer = slow_regrid(grid, backbone.stride, dino.stride, *image.shape[1:])
            heads.append(attention @ finer.flatten(1).T)
        mixed = torch.cat(heads, dim=-1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        features = tower.ln_post(block.ls_1.gamma * mixed) @ tower.proj
        results.append(features.T.reshape(-1, *maps.shape[1:]))
    return torch.stack(results)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("beta", "gamma"), [(1.2, 3.0), (0.5, 10.0)])
def test_proxyclip_equals_the_authors_formula(tiny_vit, dino, height, width, beta, gamma):
    images = photos(height, width, count=2)
    settings = RivalSettings(beta=beta, gamma=gamma)
    rival = make_rival("proxyclip", tiny_vit, dino=dino, settings=settings)
    assert rival.stride == dino.stride
    assert_near(rival.dense(images), slow_proxyclip(tiny_vit, dino, images, beta, gamma))


def test_attention_is_not_the_same_for_all_pairs(dino):
    attention = proxy_attention(dino.dense(photos(48, 80))[0])
    assert (attention == 0).float().mean() > 0.1  # pairs below the threshold are left out
    assert attention.max() > 2 / len(attention)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(len(attention)))


def test_a_photo_of_one_colour_is_no_failure():
    attention = proxy_attention(torch.ones(4, 2, 3))  # the authors' code gives NaN
    torch.testing.assert_close(attention, torch.full((6, 6), 1 / 6))


def test_a_photo_of_one_cell_listens_to_itself(tiny_vit, dino):
    assert make_rival("proxyclip", tiny_vit, dino=dino).dense(photos(9, 5)).isfinite().all()


@pytest.mark.parametrize("new", [8, 14, 16, 32])
def test_other_grids_equal_interpolation_where_both_fill_the_pixels(new):
    maps = torch.rand(2, 3, 14, 21)  # cells of 16 pixels: 224 x 336
    ours = regrid(maps, (224 // new, 336 // new), new / 16)
    theirs = F.interpolate(maps, (224 // new, 336 // new), mode="bilinear", align_corners=False)
    if 336 % new == 0:
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, slow_regrid(maps, 16, new, 224, 336 // new * new))


@pytest.mark.parametrize("name", ["plain", "maskclip", "sclip", "naclip", "clearclip"])
def test_rivals_of_the_last_block_equal_the_loaded_ones(tiny_vit, name):
    """Their formulas are checked in test_backbones.py."""
    loaded = build_backbone(tiny_vit.card, name)
    loaded.load_state_dict(tiny_vit.state_dict())
    rival, images = make_rival(name, tiny_vit), photos(48, 80)
    assert torch.equal(rival.dense(images), loaded.dense(images))
    assert torch.equal(rival.pooled(images), tiny_vit.pooled(images))
    assert rival.visual.attention == name
    assert tiny_vit.visual.attention == "pixelclip"


def test_every_last_block_of_others_is_a_rival():
    assert set(LAST_BLOCKS) - {"pixelclip"} <= set(RIVALS)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_proxy_on_mini_equals_the_slow_version(mini, dino, height, width):
    images = photos(height, width)
    for tower, given in ((dino, dino), (MiniLevels(mini.visual), None)):
        last, levels = mini.visual.levels(images)
        head = F.normalize(mini.visual.head(levels)[0].flatten(0, 1), dim=1)
        named = F.normalize(mini.visual.named_classes(last)[0].flatten(0, 1), dim=1)
        cells = torch.cat([mini.visual.config.head_weight * head, named], dim=1)
        cells = cells - mini.visual.config.contrast * cells.mean(dim=0)
        cells = F.normalize(torch.cat([cells, torch.ones(len(cells), 1)], dim=1), dim=1)
        values = slow_regrid(
            cells.T.reshape(mini.dim, *last.shape[1:3]), mini.stride, tower.stride, height, width
        )
        maps = tower.dense(images)[0]
        expected = torch.tensor(slow_attention(maps, 1.2, 3.0)) @ values.flatten(1).T
        ours = make_rival("proxy", mini, dino=given).dense(images)[0]
        assert_near(ours, expected.T.reshape(ours.shape), 1e-4)


def test_proxy_leaves_mini_as_it_is(mini):
    before = mini.dense(photos(48, 80))
    make_rival("proxy", mini).dense(photos(48, 80))
    assert mini.visual.config.affinity_steps > 0
    assert torch.equal(mini.dense(photos(48, 80)), before)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (75, 50)])
def test_features_in_superpixels_equal_the_slow_version(tiny_vit, height, width):
    image = np.asarray(photo(width, height))
    images = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255
    features = F.normalize(tiny_vit.dense(images), dim=1)[0]
    masks = superpixels(image)
    assert masks.count > 2
    full = slow_regrid(features, tiny_vit.stride, 1, height, width)  # a feature per pixel
    means = torch.zeros_like(full)
    for mask in masks.sample(np.arange(height), np.arange(width)):
        means[:, mask] = full[:, mask].mean(dim=1, keepdim=True)
    padded = F.pad(means, (0, -width % 16, 0, -height % 16))
    weight = F.avg_pool2d(
        F.pad(torch.ones(1, height, width), (0, -width % 16, 0, -height % 16)), 16
    )
    expected = F.avg_pool2d(padded, 16) / weight
    assert_near(make_rival("superpixels", tiny_vit).dense(images)[0], expected)


def test_pixels_outside_all_masks_keep_their_features(tiny_vit):
    class Nothing:
        batch_size = 1

        def __call__(self, images):
            return [from_masks(np.zeros((2, *image.shape[:2]), dtype=bool)) for image in images]

    images = photos(48, 80)
    ours = make_rival("superpixels", tiny_vit, source=Nothing()).dense(images)
    assert_near(ours, F.normalize(tiny_vit.dense(images), dim=1))


def test_what_runs_on_mini_runs_in_a_segmenter(mini):
    image = photo(90, 70)
    own = Segmenter(mini, ["sky", "grass", "dog"], cache=False)
    for name in rivals_of(mini):
        rival = Segmenter(make_rival(name, mini), own.classes, cache=False)
        assert rival(image).labels.shape == (70, 90)
        assert name in str(rival.description()["attention"])
        assert torch.equal(rival.text, own.text)


def test_windows_of_a_finer_grid_are_joined(tiny_vit, dino):
    rival = make_rival("proxyclip", tiny_vit, dino=dino)
    config = SegmentConfig(short_side=70, window=64, templates="a photo of {}")
    segmenter = Segmenter(rival, ["cat", "dog"], config=config, cache=False)
    assert len(segmenter.plan(150, 70).columns) > 1
    assert segmenter(photo(150, 70)).labels.shape == (70, 150)


def test_origin_names_both_models(mini, dino):
    rival = make_rival("proxy", mini, dino=dino)
    assert mini.origin in rival.origin
    assert dino.origin in rival.origin
    assert make_rival("superpixels", mini).origin == mini.origin


def test_a_tower_may_be_named_by_its_folder(tiny_vit, tmp_path):
    folder = save_tower(tmp_path / "tower", "dino")
    by_name = make_rival("proxyclip", tiny_vit, dino=str(folder))
    loaded = make_rival("proxyclip", tiny_vit, dino=load_dense(str(folder), device="cpu"))
    assert torch.equal(by_name.dense(photos(48, 80)), loaded.dense(photos(48, 80)))


def in_bfloat16(backbone: Backbone, images: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return backbone.dense(images).float()


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_bfloat16_decides_no_pair(dino):
    """A GPU runs in bfloat16 unless told otherwise; two digits of a cosine are not enough."""
    maps = dino.dense(photos(96, 80))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention = proxy_attention(maps)
    assert torch.equal(attention, proxy_attention(maps))


def test_the_bonus_of_naclip_survives_bfloat16(tiny_vit):
    """Scores near 256 are 2 apart in bfloat16, and the bonus is 1 at most."""
    alike, width = copy.deepcopy(tiny_vit), 32
    images = torch.linspace(0, 1, 320).round().expand(1, 3, 128, 320)  # black, then white
    attention = alike.visual.tower.transformer.resblocks[-1].attn
    with torch.no_grad():
        attention.in_proj_weight[width : 2 * width] = 0
        attention.in_proj_bias[width : 2 * width] = 8  # heads of 16: 64 * 16 / 4 for every pair
    exact = make_rival("naclip", alike).dense(images)
    blurred = make_rival("naclip", alike).visual.tower.transformer.resblocks[-1]
    tokens, grid = alike.visual.tokens(images)
    uniform = alike.visual.project(naclip_block(blurred, tokens, grid, std=1e6), grid)
    lost = distance(uniform, exact)
    assert distance(in_bfloat16(make_rival("naclip", alike), images), exact) < 0.5 * lost


def test_means_in_masks_are_exact_in_bfloat16(tiny_vit):
    """The features themselves are rounded, what is made of them is not."""

    class Whole:
        batch_size = 1

        def __call__(self, images):
            return [from_masks(np.ones((1, *image.shape[:2]), dtype=bool)) for image in images]

    images = photos(64, 96)
    ours = in_bfloat16(make_rival("superpixels", tiny_vit, source=Whole()), images)
    cells = F.normalize(in_bfloat16(tiny_vit, images), dim=1)
    size = (images.shape[2], images.shape[3])
    full = F.interpolate(cells, size, mode="bilinear", align_corners=False)
    assert_near(ours, full.mean(dim=(2, 3), keepdim=True).expand_as(ours), 1e-5)


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "proxy"])
def test_a_batch_gives_a_rival_what_single_photos_give(tiny_vit, dino, name):
    rival, images = make_rival(name, tiny_vit, dino=dino), photos(50, 77, count=3)
    singly = torch.cat([rival.dense(image[None]) for image in images])
    assert_near(rival.dense(images), singly, 1e-6)


def test_results_say_what_guides_and_what_is_averaged(mini, tiny_vit, dino):
    def said(name, backbone, tower=None):
        return make_rival(name, backbone, dino=tower).visual.attention

    architecture = dino.config.architecture
    assert said("proxy", mini) == "proxy beta=1.2 gamma=3 by mini's levels"
    assert said("proxy", mini, dino) == f"proxy beta=1.2 gamma=3 by {architecture}"
    assert said("proxyclip", tiny_vit, dino) == f"proxyclip beta=1.2 gamma=3 by {architecture}"
    assert said("superpixels", tiny_vit) == "superpixels over pixelclip"
    assert said("superpixels", make_rival("sclip", tiny_vit)) == "superpixels over sclip"


def test_departures_name_their_rival():
    assert departures_of("") == ()
    assert departures_of("plain") == ()
    for name in ("maskclip", "sclip", "naclip", "clearclip", "proxyclip"):
        assert departures_of(name)
        assert all(line.startswith(f"{name}: ") for line in departures_of(name))
    assert any("PAMR" in line for line in departures_of("naclip"))


def test_names_are_checked_before_a_model_is_loaded():
    check_rivals(["sclip", "proxy"], "dino")
    check_rivals([], None)
    with pytest.raises(ConfigError, match="unknown rival 'skip'; available: plain, maskclip, "):
        check_rivals(["sclip", "skip"], None)
    with pytest.raises(ConfigError, match=r"--dino goes with --rival proxyclip or proxy$"):
        check_rivals(["sclip"], "dino")


def message(name: str, backbone: Backbone) -> str:
    with pytest.raises(ConfigError) as caught:
        make_rival(name, backbone)
    return str(caught.value)


def test_what_does_not_run_is_refused_by_name(mini, tiny_vit):
    for name in ("plain", "maskclip", "sclip", "naclip", "clearclip", "proxyclip"):
        assert message(name, mini) == (
            f"the rival {name} needs a ViT; mini-base is a mini, on which these run: proxy,"
            " superpixels"
        )
    assert message("proxyclip", tiny_vit) == (
        "the rival proxyclip needs a DINO tower; without one these run: plain, maskclip, sclip,"
        " naclip, clearclip, superpixels"
    )
    assert message("skip", mini).startswith("unknown rival 'skip'; available: plain, maskclip,")


def some_masks(height: int, width: int) -> PhotoMasks:
    """Overlapping masks: noise, a box, the whole photo, nothing, runs over column ends."""
    draw = np.random.default_rng(3)
    masks = np.zeros((5, height, width), dtype=bool)
    masks[0] = draw.random((height, width)) < 0.4
    masks[1, : height // 2, width // 3 :] = True
    masks[2] = True
    masks[4, -2:], masks[4, :2] = True, True
    return from_masks(masks)


def grid_and_axes(height: int, width: int, rows: int, columns: int):
    draw = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(rows, columns, 8, generator=draw), dim=2)
    text = F.normalize(torch.randn(4, 8, generator=draw), dim=1)
    places = axis(height, rows, rows / height * 0.97), axis(width, columns, columns / width)
    return features, text, places


SHAPES = [(40, 60, 3, 5), (33, 17, 7, 4), (5, 9, 8, 12), (20, 30, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [8_000_000, 40])
def test_means_under_masks_equal_those_of_upsampled_maps(shape, block, monkeypatch):
    monkeypatch.setattr("pixelclip.masks.refine.VALUES_PER_BLOCK", block)
    features, _, (rows, columns) = grid_and_axes(*shape)
    masks = some_masks(*shape[:2])
    decoded = masks.sample(np.arange(shape[0]), np.arange(shape[1]))
    means = mask_means(features, masks, rows, columns).numpy()
    for channel in range(8):
        full = upsample_grid(features[..., channel], rows, columns)
        for index, mask in enumerate(decoded):
            expected = full[mask].mean() if mask.any() else 0.0
            assert means[index, channel] == pytest.approx(expected, abs=1e-6)


def test_weights_on_the_grid_add_up_to_the_areas():
    masks = some_masks(33, 17)
    _, _, (rows, columns) = grid_and_axes(33, 17, 7, 4)
    sums = grid_weights(masks, rows, columns, (7, 4)).sum(dim=(1, 2)).numpy()
    np.testing.assert_allclose(sums, masks.areas(), rtol=1e-12, atol=1e-12)


def test_small_masks_are_painted_over_large_ones():
    masks = np.zeros((2, 6, 5), dtype=bool)
    masks[0, 2:4, 1:3], masks[1, 1:5, :4] = True, True
    painted = paint(np.full((6, 5), 9), from_masks(masks), np.array([1, 2]))
    expected = np.full((6, 5), 9)
    expected[1:5, :4], expected[2:4, 1:3] = 2, 1
    np.testing.assert_array_equal(painted, expected)
