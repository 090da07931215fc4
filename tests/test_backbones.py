"""Dense features and text features against slow, obvious versions, and open_clip's own."""

import copy
import math
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from pixelclip.backbones import (
    Backbone,
    build_backbone,
    exported_state,
    load_backbone,
    save_backbone,
)
from pixelclip.backbones.catalog import architecture_config, open_clip_card, refusal
from pixelclip.backbones.vit import LAST_BLOCKS
from pixelclip.errors import ConfigError, ModelError

SIZES = [(1, 1), (16, 16), (17, 31), (48, 80), (100, 37), (64, 64)]  # height, width
MODES = ["pixelclip", "plain", "maskclip", "sclip", "naclip", "clearclip"]
ACCEPTED = [
    name for name in open_clip.list_models() if refusal(open_clip.get_model_config(name)) is None
]


def with_attention(backbone: Backbone, attention: str) -> Backbone:
    other = build_backbone(backbone.card, attention)
    other.load_state_dict(backbone.state_dict())
    return other


def plain_open_clip(backbone: Backbone) -> CLIP:
    """open_clip's own model with the same weights."""
    clip = CLIP(**backbone.card.config, quick_gelu=backbone.card.activation == "quickgelu").eval()
    clip.load_state_dict(exported_state(backbone), strict=True)
    return clip


def photos(height: int, width: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def padded_pixels(backbone: Backbone, images: Tensor) -> Tensor:
    """Normalised pixels in a canvas of zeros."""
    stride, (height, width) = backbone.stride, images.shape[-2:]
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    canvas = torch.zeros(len(images), 3, rows * stride, columns * stride)
    for channel in range(3):
        mean, std = backbone.card.mean[channel], backbone.card.std[channel]
        canvas[:, channel, :height, :width] = (images[:, channel] - mean) / std
    return canvas


def bicubic_matrix(source: int, target: int) -> Tensor:
    """Weights of cubic convolution (a = -0.75), half-pixel centres, edges repeated."""
    matrix = torch.zeros(target, source)
    for i in range(target):
        place = (i + 0.5) * source / target - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - tap)
            near = 1.25 * d**3 - 2.25 * d**2 + 1
            far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(tap, 0), source - 1)] += near if d <= 1 else far
    return matrix


def slow_positions(tower: torch.nn.Module, rows: int, columns: int) -> Tensor:
    table = tower.positional_embedding
    side = math.isqrt(len(table) - 1)
    down, across = bicubic_matrix(side, rows), bicubic_matrix(side, columns)
    patches = torch.einsum("ry,cx,yxd->rcd", down, across, table[1:].reshape(side, side, -1))
    return torch.cat([table[:1], patches.reshape(rows * columns, -1)])


def slow_tokens(backbone: Backbone, images: Tensor) -> tuple[Tensor, int, int]:
    """Token states entering the last block, and the grid."""
    tower, stride = backbone.visual.tower, backbone.stride
    pixels = padded_pixels(backbone, images)
    rows, columns = pixels.shape[2] // stride, pixels.shape[3] // stride
    hidden = [tower.class_embedding.expand(len(images), -1)]
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride, column * stride
            patch = pixels[:, :, top : top + stride, left : left + stride]
            hidden.append(torch.einsum("bcij,dcij->bd", patch, tower.conv1.weight))
    tokens = torch.stack(hidden, dim=1) + slow_positions(tower, rows, columns)
    tokens = tower.ln_pre(tokens)
    for block in tower.transformer.resblocks[:-1]:
        tokens = slow_mlp(block, tokens + slow_attention(block, tokens, "qk"))
    return tokens, rows, columns


def slow_mlp(block: torch.nn.Module, hidden: Tensor) -> Tensor:
    inner = block.mlp.c_fc(block.ln_2(hidden))
    inner = inner * torch.sigmoid(1.702 * inner)
    return hidden + block.ls_2.gamma * block.mlp.c_proj(inner)


def slow_attention(
    block: torch.nn.Module, tokens: Tensor, kind: str, bonus: Tensor | float = 0.0
) -> Tensor:
    """Self-attention of a block, head by head.

    `kind`: which of queries, keys and values are compared, as in "qk"; joined by "+" their
    weights are added; "i": every token attends to itself alone.
    """
    normed, width = block.ln_1(tokens), tokens.shape[-1]
    size = width // block.attn.num_heads
    heads = []
    for head in range(block.attn.num_heads):
        parts = {}
        for number, letter in enumerate("qkv"):
            start = number * width + head * size
            weight = block.attn.in_proj_weight[start : start + size]
            parts[letter] = normed @ weight.T + block.attn.in_proj_bias[start : start + size]
        weights = torch.zeros(len(tokens), tokens.shape[1], tokens.shape[1])
        for pair in kind.split("+"):
            if pair == "i":
                weights = weights + torch.eye(tokens.shape[1])
                continue
            scores = torch.einsum("bid,bjd->bij", parts[pair[0]], parts[pair[1]])
            weights = weights + torch.softmax(scores / math.sqrt(size) + bonus, dim=-1)
        heads.append(torch.einsum("bij,bjd->bid", weights, parts["v"]))
    mixed = torch.cat(heads, dim=-1)
    return block.ls_1.gamma * (mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias)


def gaussian_bonus(rows: int, columns: int) -> Tensor:
    """NACLIP's bonus for near patches, std 5; none from or to the class token."""
    bonus = torch.zeros(1 + rows * columns, 1 + rows * columns)
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            bonus[1 + i, 1 + j] = math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * 5.0**2))
    return bonus


def slow_dense_vit(backbone: Backbone, images: Tensor, mode: str) -> Tensor:
    tower = backbone.visual.tower
    block = tower.transformer.resblocks[-1]
    tokens, rows, columns = slow_tokens(backbone, images)
    if mode == "pixelclip":
        hidden = slow_mlp(block, tokens[:, :1] + slow_attention(block, tokens, "i"))
    elif mode == "plain":
        hidden = slow_mlp(block, tokens + slow_attention(block, tokens, "qk"))
    elif mode == "maskclip":
        hidden = slow_mlp(block, tokens + slow_attention(block, tokens, "i"))
    elif mode == "sclip":
        hidden = slow_mlp(block, tokens + slow_attention(block, tokens, "qq+kk"))
    elif mode == "naclip":
        hidden = slow_attention(block, tokens, "kk", gaussian_bonus(rows, columns))
    else:
        hidden = slow_attention(block, tokens, "qq")
    features = tower.ln_post(hidden[:, 1:]) @ tower.proj
    return features.reshape(len(images), rows, columns, -1).permute(0, 3, 1, 2)


def assert_near(ours: Tensor, theirs: Tensor, limit: float = 1e-5) -> None:
    """Relative L2 distance; float32 in another order of operations costs about 1e-6."""
    assert ours.shape == theirs.shape
    assert ((ours - theirs).norm() / theirs.norm()).item() < limit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_dense_vit_equals_the_slow_version(tiny_vit, mode, height, width):
    images = photos(height, width, count=2)
    backbone = with_attention(tiny_vit, mode)
    assert_near(backbone.dense(images), slow_dense_vit(backbone, images, mode))


def test_every_attention_has_a_slow_version():
    assert set(LAST_BLOCKS) == set(MODES)


@pytest.mark.parametrize("mode", MODES[1:])
def test_other_attention_gives_other_features(tiny_vit, mode):
    images = photos(48, 80)
    ours = with_attention(tiny_vit, mode).dense(images)
    assert (ours - tiny_vit.dense(images)).norm() > 0.05 * ours.norm()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_dense_convnext_equals_the_slow_version(tiny_convnext, height, width):
    tower = tiny_convnext.visual.tower
    images = photos(height, width, count=2)
    maps = tower.trunk.forward_features(padded_pixels(tiny_convnext, images))
    norm, projection = tower.trunk.head.norm, tower.head.proj.weight
    rows = []
    for y in range(maps.shape[2]):
        cells = [
            F.layer_norm(maps[:, :, y, x], (maps.shape[1],), norm.weight, norm.bias, norm.eps)
            for x in range(maps.shape[3])
        ]
        rows.append(torch.stack([cell @ projection.T for cell in cells], dim=-1))
    assert_near(tiny_convnext.dense(images), torch.stack(rows, dim=-2))


@pytest.fixture(params=["tiny_vit", "tiny_convnext"])
def tiny(request) -> Backbone:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_grid_has_a_cell_for_every_begun_stride(tiny, height, width):
    rows, columns = math.ceil(height / tiny.stride), math.ceil(width / tiny.stride)
    assert tiny.dense(photos(height, width)).shape == (1, tiny.dim, rows, columns)


def test_padding_is_the_pixel_mean(tiny):
    images, stride = photos(40, 70), tiny.stride
    rows, columns = -(-40 // stride) * stride, -(-70 // stride) * stride
    whole = torch.tensor(tiny.card.mean).view(1, 3, 1, 1).repeat(1, 1, rows, columns)
    whole[:, :, :40, :70] = images
    torch.testing.assert_close(tiny.dense(images), tiny.dense(whole))


def test_batch_gives_what_single_photos_give(tiny):
    images = photos(64, 48, count=3)
    single = torch.cat([tiny.dense(image[None]) for image in images])
    assert_near(tiny.dense(images), single)


def test_pooled_equals_open_clip_at_native_size(tiny):
    images = photos(64, 64, count=2)
    theirs = plain_open_clip(tiny).encode_image(padded_pixels(tiny, images))
    assert_near(tiny.pooled(images), theirs)


TEXTS = ["a cat", "a photo of the large traffic light at the end of our street.", "", "x " * 100]


@pytest.mark.parametrize("text", TEXTS, ids=["short", "long", "empty", "cut"])
def test_text_features_equal_open_clip_over_the_whole_context(tiny, text):
    ours = tiny.text(tiny.text.tokenize([text, "dog"]))
    theirs = plain_open_clip(tiny).encode_text(open_clip.tokenize([text, "dog"]))
    assert_near(ours, theirs)


def test_tokens_are_those_of_open_clip_up_to_the_longest_text(tiny):
    ours, theirs = tiny.text.tokenize(TEXTS[:3]), open_clip.tokenize(TEXTS[:3])
    assert torch.equal(ours, theirs[:, : ours.shape[1]])
    assert theirs[:, ours.shape[1] :].sum() == 0
    assert (ours[:, -1] != 0).any()


def test_given_embeddings_replace_the_token_table(tiny):
    tokens = tiny.text.tokenize(["a cat", "two dogs on a sofa"])
    embeddings = tiny.text.embed(tokens)
    assert torch.equal(tiny.text(tokens, embeddings), tiny.text(tokens))
    assert not torch.equal(tiny.text(tokens, embeddings.flip(0)), tiny.text(tokens))


def test_gradients_reach_given_embeddings_up_to_the_end_token(tiny):
    tokens = tiny.text.tokenize(["a cat", "two dogs on a sofa"])
    embeddings = tiny.text.embed(tokens).requires_grad_()
    tiny.text(tokens, embeddings).square().sum().backward()
    reached = embeddings.grad.abs().sum(dim=2) > 0
    ends = tokens.argmax(dim=1)
    assert reached.tolist() == [[i <= end for i in range(tokens.shape[1])] for end in ends]


def test_gradients_reach_the_visual_weights_of_a_copy(tiny):
    visual = copy.deepcopy(tiny.visual).requires_grad_()
    visual(photos(32, 64)).square().sum().backward()
    assert all(p.grad is not None for p in visual.parameters())


def test_backbone_is_frozen_and_in_evaluation_mode(tiny):
    assert not any(module.training for module in tiny.modules())
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


def test_deepcopy_shares_no_weights(tiny):
    images = photos(32, 32)
    before = tiny.dense(images)
    teacher = copy.deepcopy(tiny)
    for parameter in teacher.parameters():
        parameter.data.zero_()
    assert torch.equal(tiny.dense(images), before)


def test_pickled_backbone_gives_the_same_features(tiny):
    again = pickle.loads(pickle.dumps(tiny))
    images = photos(40, 50)
    assert torch.equal(again.dense(images), tiny.dense(images))
    tokens = again.text.tokenize(["a cat"])
    assert torch.equal(again.text(tokens), tiny.text(tiny.text.tokenize(["a cat"])))


def test_temperature_is_the_exponential_of_the_logit_scale(tiny):
    assert tiny.temperature == pytest.approx(math.exp(tiny.text.logit_scale.item()))


def test_unknown_attention_lists_the_right_ones(tiny_vit):
    with pytest.raises(ConfigError, match="unknown attention 'gem'; available: pixelclip, plain"):
        build_backbone(tiny_vit.card, "gem")


def test_other_attention_needs_a_vit(tiny_convnext, tmp_path):
    save_backbone(tiny_convnext, tmp_path)
    with pytest.raises(ConfigError, match=r"--attention sclip needs a ViT; .* is a convnext"):
        load_backbone(str(tmp_path), attention="sclip")
    with pytest.raises(ConfigError, match="unknown attention 'gem'; available: pixelclip, plain"):
        load_backbone(str(tmp_path), attention="gem")


def test_unknown_family_lists_the_right_ones(tiny_vit):
    card = tiny_vit.card.model_copy(update={"family": "resnet"})
    with pytest.raises(ModelError, match="unknown family 'resnet'; available: vit, convnext"):
        build_backbone(card)


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_accepted_architecture_is_a_plain_clip(architecture):
    card = open_clip_card(architecture, None)
    with torch.device("meta"):
        backbone = build_backbone(card)
    assert backbone.dim == card.config["embed_dim"]
    tower = backbone.visual.tower
    if card.family == "vit":
        assert backbone.stride == card.config["vision_cfg"]["patch_size"]
        assert (tower.pool_type, tower.attn_pool, tower.final_ln_after_pool) == ("tok", None, False)
        assert len(tower.positional_embedding) == 1 + math.prod(tower.grid_size)
    else:
        assert type(tower.trunk).__name__ == "ConvNeXt"


def test_architectures_with_known_weights_are_accepted():
    vits = {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"}
    assert vits | {"convnext_base_w_320", "convnext_large_d", "convnext_xxlarge"} <= set(ACCEPTED)


REFUSED = {
    "RN50": "its image tower is a ResNet",
    "RN50x64": "its image tower is a ResNet",
    "ViT-B-16-SigLIP": "its text tower is not CLIP's own",
    "ViT-SO400M-14-SigLIP2": "its text tower is not CLIP's own",
    "EVA02-B-16": "its text tower is not CLIP's own",
    "coca_ViT-B-32": "its text tower is not CLIP's own",
    "roberta-ViT-B-32": "its text tower is not CLIP's own",
    "xlm-roberta-base-ViT-B-32": "its text tower is not CLIP's own",
    "ViT-H-14-CLIPA": "its text tower is not CLIP's own",
    "ViTamin-B": "its text tower is not CLIP's own",
    "MobileCLIP-S1": "its text tower is not CLIP's own",
    "ViT-H-14-worldwide": "its text tower is not CLIP's own",
    "swin_base_patch4_window7_224": "its trunk swin_base_patch4_window7_224 is not a ConvNeXt",
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_architecture_says_why(architecture):
    with pytest.raises(ModelError) as caught:
        load_backbone(f"{architecture}/openai")
    assert str(caught.value) == (
        f"{architecture} cannot segment here: {REFUSED[architecture]}; see pixelclip models"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attentional_pool": True}, "its image tower is not a plain ViT"),
        ({"no_ln_pre": True}, "its image tower is not a plain ViT"),
        ({"pos_embed_type": "sin_cos_2d"}, "its image tower is not a plain ViT"),
        ({"layers": [3, 4, 6, 3]}, "its image tower is a ResNet"),
        ({"timm_model_name": "vit_base_patch16_224"}, "its trunk vit_base_patch16_224 is not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_changed_image_tower_is_refused(change, reason):
    config = copy.deepcopy(architecture_config("ViT-B-16"))
    config["vision_cfg"].update(change)
    assert reason in refusal(config)
