"""SAM's automatic masks are the authors', on tiny models saved as a user would save them."""

import json
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from pixelclip.errors import ConfigError, ModelError
from pixelclip.masks import candidates, sam
from pixelclip.masks.candidates import Candidate
from pixelclip.masks.runs import from_masks
from pixelclip.masks.sam import SamMasks, SamSettings
from pixelclip.masks.sources import MASK_SOURCES

PROMPTS = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
FAMILIES = ("sam", "sam_hq", "sam2")
# Random models are unsure of all masks, which are much alike.
LOOSE = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.5, "points_per_side": 5,
         "box_nms_thresh": 0.9, "crop_nms_thresh": 0.9}  # fmt: skip


def sam_model(kind="Sam"):
    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "mlp_dim": 64,
              "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16}  # fmt: skip
    decoder = DECODER | ({"vit_dim": 32} if kind == "SamHQ" else {})
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=decoder
    )
    square = {"height": 64, "width": 64}
    processor = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size=square)
    model = getattr(transformers, f"{kind}Model")(config)
    return model, getattr(transformers, f"{kind}Processor")(processor)


def sam2_model(kind="Sam2"):
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], num_attention_heads=1, blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 24, 32], num_attention_heads_per_stage=[1, 2, 2, 2],
        window_size_per_stage=[8, 4, 2, 1], global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = {"backbone_config": backbone, "backbone_channel_list": [32, 24, 16, 8],
              "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
              "fpn_hidden_size": 32}  # fmt: skip
    config = transformers.Sam2Config(
        vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER
    )
    processor = transformers.Sam2ImageProcessor(size={"height": 64, "width": 64})
    return transformers.Sam2Model(config), transformers.Sam2Processor(processor)


def randomise(model, gain, seed):
    """Weights with which masks differ between points and are as large as objects."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 3 if name.startswith("vision_encoder") else gain
            spread = 0.3 if weight.ndim == 1 else scale / math.sqrt(weight[0].numel())
            weight.normal_(0, spread, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
        decoder = model.mask_decoder
        decoder.iou_prediction_head.proj_out.weight *= 0.1  # SAM 2's sigmoid would give ones
        decoder.upscale_conv2.bias[0] = 6  # a channel that is the same everywhere
        for layer in decoder.output_hypernetworks_mlps:
            layer.proj_out.bias[0] -= 1
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder per family, with a model and its processor."""
    root = tmp_path_factory.mktemp("models")
    made = {"sam": sam_model(), "sam_hq": sam_model("SamHQ"), "sam2": sam2_model()}
    for family, (model, processor) in made.items():
        gain, seed = {"sam": (4, 0), "sam_hq": (2, 0), "sam2": (3, 1)}[family]
        randomise(model, gain, seed).save_pretrained(root / family)
        processor.save_pretrained(root / family)
    return {family: root / family for family in made}


@pytest.fixture(scope="module")
def photo():
    colours = np.random.default_rng(0).integers(0, 256, (10, 8, 3), dtype=np.uint8)
    return colours.repeat(30, axis=0).repeat(32, axis=1)  # 300 x 256


def make(folder, **settings):
    return SamMasks(SamSettings(checkpoint=str(folder), **settings), device="cpu")


def pixels(masks):
    """The masks as arrays."""
    return masks.sample(np.arange(masks.height), np.arange(masks.width))


def assert_same(ours, theirs):
    """The same masks but for pixels on the edge of the last bit of a logit."""
    assert ours.count == len(theirs)
    for mask, score, details, other in zip(
        pixels(ours), ours.scores, ours.details, theirs, strict=True
    ):
        assert (mask != other["mask"]).sum() <= 1e-3 * mask.size
        assert score == pytest.approx(min(max(other["iou"], 0), 1), abs=1e-4)
        assert details["predicted_iou"] == pytest.approx(other["iou"], abs=1e-3)
        assert details["stability_score"] == pytest.approx(other["stability"], abs=1e-2)
        assert details["point_coords"] == [pytest.approx(other["point"])]
        x0, y0, x1, y1 = other["crop"]
        assert details["crop_box"] == [x0, y0, x1 - x0, y1 - y0]


# The authors' algorithm as one would write it down: a point at a time, nothing reused.


def slow_crops(height, width, layers, ratio):
    crops = [((0, 0, width, height), 0)]
    for layer in range(layers):
        n = 2 ** (layer + 1)
        overlap = int(ratio * min(height, width) * (2 / n))
        w = math.ceil((overlap * (n - 1) + width) / n)
        h = math.ceil((overlap * (n - 1) + height) / n)
        for i in range(n):
            for j in range(n):
                x, y = i * (w - overlap), j * (h - overlap)
                crops.append(((x, y, min(x + w, width), min(y + h, height)), layer + 1))
    return crops


def slow_box_iou(a, b):
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union else 0


def slow_nms(found, score, limit):
    kept = []
    for one in sorted(found, key=score, reverse=True):
        if all(slow_box_iou(one["box"], other["box"]) <= limit for other in kept):
            kept.append(one)
    return kept


def slow_ask(model, processor, pixels, x, y):
    """Logits in the crop's size and predicted IoU of one point."""
    height, width = pixels.shape[:2]
    inputs = processor(images=Image.fromarray(pixels), return_tensors="pt")
    keeps_shape = "reshaped_input_sizes" in inputs
    seen = [int(side * 64 / max(height, width) + 0.5) if keeps_shape else 64
            for side in (height, width)]  # fmt: skip
    point = torch.tensor([[[[x * seen[1] / width, y * seen[0] / height]]]]).float()
    output = model(pixel_values=inputs["pixel_values"], input_points=point)
    logits = output.pred_masks[0]
    if keeps_shape:
        logits = F.interpolate(logits, (64, 64), mode="bilinear")[..., : seen[0], : seen[1]]
    logits = F.interpolate(logits, (height, width), mode="bilinear")
    return logits[0].numpy(), output.iou_scores[0, 0].numpy()


def slow_candidate(logits, iou, crop, frame, settings):
    stability = (logits > 1).sum() / max(1, (logits > -1).sum())
    mask = np.zeros(frame, dtype=bool)
    x0, y0, x1, y1 = crop
    mask[y0:y1, x0:x1] = logits > 0
    threshold = settings["pred_iou_thresh"]
    is_sure = iou > threshold or threshold == 0
    if not (mask.any() and is_sure and stability >= settings["stability_score_thresh"]):
        return None
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max(), rows.max())
    for side, edge, end in zip(box, crop, (0, 0, frame[1], frame[0]), strict=True):
        if abs(side - edge) <= 20 and abs(side - end) > 20:
            return None
    return {"mask": mask, "iou": float(iou), "stability": float(stability), "box": box}


@torch.no_grad()
def slow_masks(folder, image, **settings):
    model = transformers.AutoModelForMaskGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    height, width = image.shape[:2]
    crops = slow_crops(height, width, settings.get("crops_n_layers", 0), 512 / 1500)
    found = []
    for crop, layer in crops:
        x0, y0, x1, y1 = crop
        n = (
            settings["points_per_side"]
            // settings.get("crop_n_points_downscale_factor", 1) ** layer
        )
        in_crop = []
        for k in range(n * n):
            x, y = (k % n + 0.5) / n * (x1 - x0), (k // n + 0.5) / n * (y1 - y0)
            asked = slow_ask(model, processor, image[y0:y1, x0:x1], x, y)
            for logits, iou in zip(*asked, strict=True):
                one = slow_candidate(logits, iou, crop, (height, width), settings)
                if one is not None:
                    in_crop.append(one | {"point": [x0 + x, y0 + y], "crop": crop})
        found += slow_nms(in_crop, lambda one: one["iou"], settings["box_nms_thresh"])
    if len(crops) > 1:
        area = {crop: (crop[2] - crop[0]) * (crop[3] - crop[1]) for crop, _ in crops}
        found = slow_nms(found, lambda one: 1 / area[one["crop"]], settings["crop_nms_thresh"])
    return sorted(found, key=lambda one: -one["iou"])


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_authors_algorithm(family, folders, photo):
    theirs = slow_masks(folders[family], photo, **LOOSE)
    assert len(theirs) > 1
    assert_same(make(folders[family], **LOOSE)([photo])[0], theirs)


@pytest.mark.parametrize(("family", "factor", "limit"), [("sam", 2, 0.05), ("sam_hq", 2, 0.05)])
def test_crops_find_the_masks_of_the_authors_algorithm(family, factor, limit, folders, photo):
    settings = {**LOOSE, "crops_n_layers": 1, "crop_nms_thresh": limit}
    settings["crop_n_points_downscale_factor"] = factor
    theirs = slow_masks(folders[family], photo, **settings)
    assert len({one["crop"] for one in theirs}) > 1
    assert_same(make(folders[family], **settings, points_per_batch=1)([photo])[0], theirs)


def test_thresholds_are_those_of_the_authors(folders, photo):
    settings = {**LOOSE, "pred_iou_thresh": 0.88, "stability_score_thresh": 0.8}
    theirs = slow_masks(folders["sam"], photo, **settings)
    assert 0 < len(theirs) < len(slow_masks(folders["sam"], photo, **LOOSE))
    assert_same(make(folders["sam"], **settings)([photo])[0], theirs)
    by_default = make(folders["sam"], **{**settings, "pred_iou_thresh": None})([photo])[0]
    assert_same(by_default, theirs)


def test_sam2_is_less_sure_by_default(folders):
    assert make(folders["sam"])._pred_iou_thresh == 0.88
    assert make(folders["sam2"])._pred_iou_thresh == 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_points_per_batch_change_no_mask(family, folders, photo):
    one, many = (make(folders[family], **LOOSE, points_per_batch=n)([photo])[0] for n in (1, 64))
    assert one.count == many.count > 1
    assert (pixels(one) != pixels(many)).sum(axis=(1, 2)).max() <= 1e-3 * photo[..., 0].size


def test_masks_do_not_depend_on_other_photos_nor_on_the_run(folders, photo):
    other = photo[:200, ::-1].copy()
    together = make(folders["sam"], **LOOSE)([other, photo])[1]
    alone = make(folders["sam"], **LOOSE)([photo])[0]
    assert together.to_rle() == alone.to_rle()
    assert together.details == alone.details
    assert together.scores.tobytes() == alone.scores.tobytes()


def test_max_masks_are_the_best(folders, photo):
    every = make(folders["sam"], **LOOSE)([photo])[0]
    best = make(folders["sam"], **LOOSE, max_masks=3)([photo])[0]
    assert best.to_rle() == every.to_rle()[:3]
    assert list(every.scores) == sorted(every.scores, reverse=True)


def test_details_are_json(folders, photo):
    details = make(folders["sam"], **LOOSE)([photo])[0].details
    assert json.loads(json.dumps(details, allow_nan=False)) == list(details)


def test_memory_is_bounded(folders, photo, monkeypatch):
    """Few masks are in the size of the photo at once, and the others' runs have a limit."""
    every = make(folders["sam"], **LOOSE)([photo])[0]
    monkeypatch.setattr(sam, "PIXELS_AT_ONCE", 4 * photo[..., 0].size)
    sizes = []
    stability_scores = candidates.stability_scores

    def counted(logits, offset):
        sizes.append(logits.numel())
        return stability_scores(logits, offset)

    monkeypatch.setattr(sam, "stability_scores", counted)
    few = make(folders["sam"], **LOOSE)([photo])[0]
    assert max(sizes) == 4 * photo[..., 0].size
    assert few.to_rle() == every.to_rle()
    monkeypatch.setattr(candidates, "MAX_RUNS", 500)
    cut = make(folders["sam"], **LOOSE)([photo])[0]
    assert 0 < len(cut.starts) <= 500
    assert cut.broken > 0
    assert cut.to_rle()[0] == every.to_rle()[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_degenerate_photos_have_few_masks_or_none(family, folders):
    settings = {**LOOSE, "points_per_side": 2, "crops_n_layers": 1, "min_area": 2}
    source = make(folders[family], **settings)
    for shape in [(1, 1), (1, 4000), (4000, 1), (3, 3), (3, 40), (40, 30)]:
        image = np.full((*shape, 3), 128, dtype=np.uint8)
        image.flags.writeable = False
        masks = source([image])[0]
        assert (masks.height, masks.width) == shape
        assert masks.count == len(masks.details) < 12
        assert (masks.areas() >= 2).all()


def test_a_photo_of_three_rows_is_not_taken_for_three_channels(folders):
    image = np.random.default_rng(3).integers(0, 256, (3, 200, 3), dtype=np.uint8)
    settings = {**LOOSE, "stability_score_thresh": 0, "points_per_side": 3}
    theirs = slow_masks(folders["sam2"], image, **settings)
    assert theirs
    assert_same(make(folders["sam2"], **settings)([image])[0], theirs)


def test_no_mask_may_survive(folders, photo):
    settings = {"points_per_side": 4, "stability_score_offset": 100}
    masks = make(folders["sam"], **settings)([photo])[0]
    assert (masks.count, masks.details, masks.broken) == (0, (), 0)


# The steps, on masks that no tiny model makes.


def blobs(rng, count=40, height=60, width=70):
    """Logits of smooth noise."""
    noise = torch.from_numpy(rng.normal(-0.5, 2, (1, count, 9, 8))).float()
    return F.interpolate(noise, (height, width), mode="bicubic")[0]


def as_candidates(masks, rng):
    frame = masks.shape[1:]
    runs = candidates.mask_runs(torch.from_numpy(masks), (0, 0, frame[1], frame[0]), frame)
    boxes = candidates.mask_boxes(torch.from_numpy(masks)).tolist()
    scores = rng.integers(0, 20, len(masks)) / 20  # with ties
    crop = (0, 0, frame[1], frame[0])
    return [
        Candidate(starts, ends, tuple(box), float(score), 1.0, (0.0, 0.0), crop)
        for (starts, ends), box, score in zip(runs, boxes, scores, strict=True)
    ]


def test_runs_of_a_crop_are_those_of_the_padded_masks():
    masks = (blobs(np.random.default_rng(0)) > 0).numpy()
    padded = np.pad(masks, ((0, 0), (3, 10), (5, 0)))
    runs = candidates.mask_runs(torch.from_numpy(masks), (5, 3, 75, 63), (73, 75))
    expected = from_masks(padded)
    np.testing.assert_array_equal(np.concatenate(runs, axis=1)[0], expected.starts)
    np.testing.assert_array_equal(np.concatenate(runs, axis=1)[1], expected.ends)
    full = candidates.mask_runs(torch.ones(2, 4, 3, dtype=torch.bool), (0, 0, 3, 4), (4, 3))
    assert [run.tolist() for run in full] == [[[0], [12]]] * 2


def test_duplicates_are_those_of_plain_suppression():
    rng = np.random.default_rng(1)
    masks = np.zeros((80, 60, 70), dtype=bool)
    for mask, (x, y) in zip(masks, rng.integers(0, 40, (80, 2)), strict=True):
        mask[y : y + rng.integers(2, 20), x : x + rng.integers(2, 30)] = True
    found = as_candidates(masks, rng)
    scores = [candidate.predicted_iou for candidate in found]
    for limit in (0.123, 0.321, 0.654):  # no IoU is as large to the last bit
        kept = candidates.without_duplicates(found, scores, limit)
        plain = [
            {"box": one.box, "at": at, "iou": one.predicted_iou} for at, one in enumerate(found)
        ]
        expected = slow_nms(plain, lambda one: one["iou"], limit)
        assert [id(one) for one in kept] == [id(found[one["at"]]) for one in expected]
        assert 1 < len(kept) < len(found)


def test_masks_one_pixel_wide_are_kept_once():
    line = np.zeros((2, 9, 9), dtype=bool)
    line[:, 2:7, 4] = True
    found = as_candidates(line, np.random.default_rng(0))
    assert len(candidates.without_duplicates(found, [0.2, 0.5], 0.7)) == 1


def slow_small_parts(mask, min_pixels):
    """Holes, then regions, by flooding the whole photo."""

    def regions(wanted):
        left = set(zip(*np.nonzero(wanted), strict=True))
        while left:
            region, border = set(), [left.pop()]
            while border:
                row, column = border.pop()
                region.add((row, column))
                near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                left -= near
                border += near
            yield region

    mask = mask.copy()
    for value in (False, True):
        for region in list(regions(mask == value)):
            if len(region) < min_pixels:
                mask[tuple(zip(*region, strict=True))] = not value
    return mask


@pytest.mark.parametrize("min_pixels", [2.0, 9.0, 60.0, 500.0])
def test_small_regions_and_holes_go(min_pixels):
    rng = np.random.default_rng(2)
    masks = (blobs(rng, count=25, height=24, width=31) > 0).numpy()
    masks[:5] |= rng.random((5, 24, 31)) > 0.7
    masks[5:8] |= np.arange(31) > 2
    masks[8, 3:6, 3:6] = True
    masks[9:] &= np.arange(len(masks) - 9)[:, None, None] > 3  # four bands across the photo
    masks[9, 2:5] = masks[10, 19:22] = masks[11, :, 2:5] = masks[12, :, 26:29] = True
    for candidate in as_candidates(masks, rng):
        before = pixels(candidates.joined([candidate], (24, 31)))[0]
        expected = slow_small_parts(before, min_pixels)
        after = candidates.without_small_parts(candidate, (24, 31), min_pixels)
        if after is None:
            assert not expected.any()
            continue
        assert (after is candidate) == np.array_equal(before, expected)
        np.testing.assert_array_equal(pixels(candidates.joined([after], (24, 31)))[0], expected)
        rows, columns = np.nonzero(expected)
        assert after.box == (columns.min(), rows.min(), columns.max(), rows.max())


def test_min_area_is_a_share_or_pixels(folders, photo):
    share, count = (
        make(folders["sam"], **LOOSE, min_area=area)([photo])[0] for area in (0.005, 384)
    )
    assert share.to_rle() == count.to_rle()
    assert 0 < share.count < make(folders["sam"], **LOOSE)([photo])[0].count
    assert share.areas().min() >= 384


# What a user can do wrong.


def test_source_is_found_by_its_name(folders, photo):
    kind = MASK_SOURCES["sam"]()
    source = kind.make(kind.settings(checkpoint=str(folders["sam"]), **LOOSE), device="cpu")
    assert source.batch_size == 1
    assert source([photo])[0].count > 1


def test_a_checkpoint_of_video_segmentation_will_do(folders, photo, tmp_path):
    """As the published SAM 2.1 are."""
    changed(folders["sam2"], tmp_path, model_type="sam2_video")
    expected = make(folders["sam2"], **LOOSE)([photo])[0]
    assert make(tmp_path, **LOOSE)([photo])[0].to_rle() == expected.to_rle()


def test_bfloat16_makes_similar_masks(folders, photo):
    settings = {**LOOSE, "points_per_side": 2, "stability_score_thresh": 0}
    masks = make(folders["sam"], **settings, precision="bfloat16")([photo])[0]
    assert masks.count > 0
    assert masks.to_rle() != make(folders["sam"], **settings)([photo])[0].to_rle()


def changed(folder, target, **config):
    """A copy of a model with other values in its config."""
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


def test_loading_is_quiet_and_changes_nothing_global(folders, capfd, recwarn):
    before = torch.get_rng_state()
    verbosity = transformers.utils.logging.get_verbosity()
    make(folders["sam2"])
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert torch.equal(torch.get_rng_state(), before)
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_name_without_a_network_says_what_to_do():
    began = time.monotonic()
    with pytest.raises(ModelError) as raised:
        SamMasks(SamSettings())
    assert time.monotonic() - began < 5
    assert str(raised.value) == (
        "cannot fetch facebook/sam-vit-base: no network and not in the cache; give --checkpoint"
        " DIR, a folder that save_pretrained of model and processor wrote, or use --source"
        " superpixels, which needs no weights"
    )


def test_a_model_in_the_hubs_cache_needs_no_network(folders, photo, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "hub/models--someone--tiny-sam"
    changed(folders["sam"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    expected = make(folders["sam"], **LOOSE)([photo])[0]
    named = SamMasks(SamSettings(model="someone/tiny-sam", **LOOSE), device="cpu")
    assert named([photo])[0].to_rle() == expected.to_rle()


def test_a_name_that_no_hub_can_have_is_refused():
    with pytest.raises(ModelError, match=r"the model hub has no 'a/b/c'; give --checkpoint DIR"):
        SamMasks(SamSettings(model="a/b/c"))


def test_an_unknown_device_is_refused(folders):
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        SamMasks(SamSettings(checkpoint=str(folders["sam"])), device="tpu")


def no_folder(folder, target):
    return target / "none"


def no_model(folder, target):
    return target


def other_kind(folder, target):
    return changed(folder, target, model_type="clip")


def no_kind(folder, target):
    return changed(folder, target, model_type=["sam"])


def huge(folder, target):
    return changed(folder, target, vision_config={"hidden_size": 10**9})


def deep(folder, target):
    return changed(folder, target, vision_config={"num_hidden_layers": 50_000})


def wide(folder, target):
    return changed(folder, target, mask_decoder_config=DECODER | {"mlp_dim": 65_536})


def other_shape(folder, target):
    return changed(folder, target, mask_decoder_config=DECODER | {"mlp_dim": 32})


def other_size(folder, target):
    return changed(folder, target, prompt_encoder_config=PROMPTS | {"image_size": 128})


def no_weights(folder, target):
    changed(folder, target)
    (target / "model.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(b"never opened")
    return target


def cut_weights(folder, target):
    weights = changed(folder, target) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return target


def weights_lack(folder, target):
    state = load_file(changed(folder, target) / "model.safetensors")
    del state["mask_decoder.iou_token.weight"]
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


def no_processor(folder, target):
    (changed(folder, target) / "processor_config.json").unlink()
    return target


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_folder, "no such folder: .*; give --checkpoint DIR"),
        (no_model, "holds no model, as it has no config.json"),
        (
            other_kind,
            "a model of kind clip, which makes no masks of points; kinds that do: edgetam",
        ),
        (no_kind, r"a model of kind \['sam'\], which makes no masks"),
        (huge, "has hidden_size 1000000000; no model is so large"),
        (deep, "has num_hidden_layers 50000; no model is so large"),
        (wide, "^/[^ ]* has weights of .* bytes, its model has .* numbers"),
        (other_shape, r"has weights of another size: mask_decoder\.transformer\."),
        (other_size, "its processor makes pictures of 64 pixels, its network takes 128"),
        (no_weights, "cannot load .* no file named model.safetensors"),
        (cut_weights, "cannot load"),
        (weights_lack, "lacks weights of its model: mask_decoder.iou_token.weight"),
        (no_processor, "processor"),
    ],
)
def test_a_folder_that_is_no_such_model_is_refused_in_one_line(damage, message, folders, tmp_path):
    with pytest.raises(ModelError, match=message) as raised:
        make(damage(folders["sam"], tmp_path))
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["iou_prediction_head.proj_out.bias", "hypernetworks_mlps"])
def test_a_broken_model_makes_no_masks(part, value, folders, photo, tmp_path):
    changed(folders["sam"], tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    broken = [name for name in state if part in name]
    assert broken
    for name in broken:
        state[name][:] = value
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert make(tmp_path, **LOOSE)([photo])[0].count == 0


def test_a_model_that_cannot_run_is_one_line(folders, photo, tmp_path):
    vision = json.loads((folders["sam2"] / "config.json").read_text())["vision_config"]
    vision["backbone_config"]["window_size_per_stage"] = [8, 2, 1, 1]
    source = make(changed(folders["sam2"], tmp_path, vision_config=vision))
    with pytest.raises(ModelError, match="cannot make masks: Given input size"):
        source([photo])
