"""Labels by experts and by masks, against slow, obvious renderings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixelclip.config import SegmentConfig
from pixelclip.errors import ConfigError, DataError
from pixelclip.labelling import Experts, Labeller, group_templates
from pixelclip.masks.make import make_masks
from pixelclip.masks.refiner import find_masks
from pixelclip.masks.runs import from_labels, from_masks
from pixelclip.masks.superpixels import Superpixels, SuperpixelSettings
from pixelclip.photos import Photo
from pixelclip.segmenter import Segmenter
from pixelclip.upsample import axis, upsample_grid
from pixelclip.vocabulary import encode_classes
from tests.tiny import photo
from tests.varied import varied_vit

CLASSES = ("cat", "sofa, couch", "sky", "tree")
TEMPLATES = (
    "cat\ta {}", "cat\tphoto of a {}.", "sofa, couch\t{} in a room", "sky\tmany {}",
    "a {}", "photo of a {}.", "{} in a room", "many {}", "the {}",
)  # fmt: skip
COMMON = TEMPLATES[4:]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def some_experts(names=4, templates=6, sets=((0, 1), (2,), (3, 4), (0, 1, 2, 3, 4, 5))):
    texts = unit(names, templates, 8, seed=2)
    owners = tuple(index % len(sets) for index in range(names))
    groups = group_templates(
        [str(index) for index in range(names)],
        [*(f"{k}\t{t} {{}}" for k in range(names) for t in sets[owners[k]]),
         *(f"{t} {{}}" for t in range(templates))],
    )  # fmt: skip
    order = [int(text.split()[0]) for text in groups.templates]
    assert order == list(range(templates))
    return Experts(texts, groups), [sets[owner] for owner in owners]


def upsampled(features, text, axes):
    return torch.stack([torch.from_numpy(upsample_grid(features @ one, *axes)) for one in text])


def slow_fusion(scores_of, experts, own_templates, temperature):
    """As the paper says it: an expert for every class; the surest that says its own class wins.

    Args:
        scores_of: scores [K, ...] of all classes from their features.
        experts: for the texts alone.
        own_templates: per class.
        temperature: of the softmax.
    """
    average = scores_of(F.normalize(experts.texts.mean(dim=1), dim=1))
    labels = average.argmax(dim=0)
    chances = (temperature * average).softmax(dim=0).amax(dim=0)
    surest = torch.zeros(labels.shape)
    for index, templates in enumerate(own_templates):
        expert = F.normalize(experts.texts[:, list(templates)].mean(dim=1), dim=1)
        sure, best = (temperature * scores_of(expert)).softmax(dim=0).max(dim=0)
        wins = (best == index) & (sure > surest)
        labels[wins], surest[wins] = index, sure[wins]
    return labels, torch.where(surest > 0, surest, chances), surest == 0


@pytest.mark.parametrize("block", [4_000_000, 48 * 12])
def test_fused_labels_equal_the_papers_in_a_slow_rendering(monkeypatch, block):
    monkeypatch.setattr("pixelclip.labelling.PIXELS_PER_BLOCK", block)
    experts, own = some_experts()
    features = unit(5, 6, 8)
    axes = (axis(40, 5, 5 / 40), axis(48, 6, 6 / 48))
    labeller = Labeller(tuple("abcd"), experts.average(), experts, 5.0)
    result = labeller.label(iter([features]), axes, confidence=True)
    expected, sure, nobody = slow_fusion(
        lambda text: upsampled(features, text, axes), experts, own, 5.0
    )
    assert 0 < nobody.sum() < nobody.numel()
    # The confidence of pixels between grid points is approximate in its rest: few may differ.
    same = result.labels == expected.numpy()
    assert same.mean() > 0.98
    assert same[nobody.numpy()].all()
    assert np.abs(result.confidence - sure.numpy())[same].mean() < 0.005
    average = labeller.label(iter([features]), axes).labels
    plain = replace(labeller, experts=None).label(iter([features]), axes).labels
    np.testing.assert_array_equal(average, result.labels)
    assert (plain != average).mean() > 0.1


def test_classes_that_share_templates_share_an_expert_with_the_same_result():
    experts, own = some_experts(names=9)
    assert len(experts.groups.sets) == 4
    features = unit(5, 6, 8)
    axes = (axis(40, 5, 5 / 40), axis(48, 6, 6 / 48))
    labeller = Labeller(tuple("abcdefghi"), experts.average(), experts, 5.0)
    result = labeller.label(iter([features]), axes)
    expected, _, _ = slow_fusion(lambda text: upsampled(features, text, axes), experts, own, 5.0)
    assert (result.labels == expected.numpy()).mean() > 0.98


def test_groups_by_hand():
    groups = group_templates(("cat", "dog", "sky"), ("cat\tb {}", "x {}", "cat\tx {}", "sky\tb {}"))
    assert groups.templates == ("x {}", "b {}")
    assert groups.common == (0,)
    assert groups.sets == ((1, 0), (0,), (1,))
    assert groups.owners == (0, 1, 2)
    alone = group_templates(("cat", "sky"), ("cat\tb {}", "sky\tx {}"))
    assert alone.common == (0, 1)  # where none is for all, all are the average's
    assert group_templates(("cow",), ("cat\tb {}", "x {}")) is None
    with pytest.raises(ConfigError, match="the class 'dog' has no templates"):
        group_templates(("cat", "dog"), ("cat\tb {}",))


def test_too_many_names_for_templates_of_their_own_are_refused():
    groups = group_templates(("cat",), ("cat\tb {}",))
    with pytest.raises(ConfigError, match="70000 names in 80 templates are too many"):
        Experts(torch.zeros(1).expand(70_000, 80, 64), groups)


def make(classes=CLASSES, templates=TEMPLATES, refine=None, folder=None, **settings):
    path = folder / f"{len(templates)}.txt"
    path.write_text("\n".join(templates))
    config = SegmentConfig(templates=str(path), **settings)
    return Segmenter(varied_vit(), classes, config=config, refine=refine, cache=False)


def test_a_segmenter_encodes_each_class_in_its_templates(tmp_path):
    segmenter = make(folder=tmp_path)
    text = segmenter.backbone.text
    torch.testing.assert_close(segmenter.text, encode_classes(text, CLASSES, COMMON))
    wanted = [("a {}", "photo of a {}."), ("{} in a room",), ("many {}",), COMMON]
    found = list(segmenter.experts)
    for index, (is_own, features) in enumerate(found):
        assert is_own.tolist() == [k == index for k in range(4)]
        torch.testing.assert_close(features, encode_classes(text, CLASSES, wanted[index]))
    assert segmenter.description()["fused"] is True
    assert "cat\ta {}" in segmenter.description()["templates"]
    assert make(templates=COMMON, folder=tmp_path).experts is None


def test_features_in_each_template_are_kept_on_disk(tmp_path, own_cache):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(TEMPLATES))
    config = SegmentConfig(templates=str(path))
    first, second = (Segmenter(varied_vit(), CLASSES, config=config) for _ in range(2))
    assert torch.equal(first.experts.texts, second.experts.texts)
    assert first.experts.texts.shape == (4, 5, 16)
    assert len(list(own_cache.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("settings", [{}, {"preset": "authors"}, {"short_side": 210, "window": 96}])
def test_fusion_works_with_windows_and_the_authors_preset(tmp_path, settings):
    image = photo(330, 210)
    segmenter = make(folder=tmp_path, **settings)
    prepared = segmenter.prepare(image)
    assert (len(prepared.plan.columns) > 1) == ("window" in settings)
    result = segmenter.run([prepared], confidence=True)[0]
    features, axes = segmenter.grid_features(prepared), segmenter.axes(prepared)
    experts = segmenter.experts
    own = [experts.groups.sets[owner] for owner in experts.groups.owners]
    common = Experts(experts.texts[:, list(experts.groups.common)], experts.groups)
    assert common.texts.shape == experts.texts.shape  # the average of all is that of the common
    temperature = segmenter.backbone.temperature
    expected, _, _ = slow_fusion(
        lambda text: upsampled(features, text, axes), experts, own, temperature
    )
    assert (result.labels == expected.numpy()).mean() > 0.98
    assert len(np.unique(result.labels)) > 1


def test_background_of_fused_labels_is_by_the_same_confidence(tmp_path):
    image = photo(200, 120)
    sure = make(folder=tmp_path)(image, confidence=True)
    limit = float(np.median(sure.confidence))
    result = make(folder=tmp_path, background="threshold", threshold=limit)(image)
    unsure = sure.confidence.astype(np.float32) < limit
    assert 0.2 < unsure.mean() < 0.8
    assert ((result.labels == 255) == unsure).mean() > 0.99  # float16 rounds the kept map
    names = make(CLASSES[:2], folder=tmp_path, background="names", background_names=CLASSES[2:])(
        image
    )
    np.testing.assert_array_equal(names.labels, np.where(sure.labels >= 2, 255, sure.labels))


def test_a_photo_is_labelled_alike_alone_and_in_a_batch(tmp_path):
    segmenter = make(folder=tmp_path, refine="superpixels")
    photos = [photo(120, 90, seed) for seed in range(3)]
    for alone, together in zip(map(segmenter, photos), segmenter(photos), strict=True):
        assert (alone.labels != together.labels).mean() < 1e-3  # ties within float rounding


def test_scores_are_refused_where_they_make_no_labels(tmp_path):
    image = photo(60, 40)
    with pytest.raises(ConfigError, match="scores cannot be kept with templates of single"):
        make(folder=tmp_path)(image, scores=True)
    with pytest.raises(ConfigError, match="scores cannot be kept with masks"):
        make(templates=COMMON, folder=tmp_path, refine="superpixels")(image, scores=True)


def slow_refinement(labels, scores, decoded, temperature):
    """Every mask, larger ones first, gets the class of its mean score."""
    labels = labels.copy()
    sure = (temperature * scores).softmax(dim=0).amax(dim=0).numpy()
    for mask in sorted(decoded, key=lambda mask: -mask.sum()):
        if mask.any():
            means = torch.stack([one[torch.from_numpy(mask)].mean() for one in scores])
            chances = (temperature * means).softmax(dim=0)
            labels[mask], sure[mask] = means.argmax(), chances.max()
    return labels, sure


def nested_masks(height, width):
    """Overlapping masks that leave pixels free, an empty one and a long run among them."""
    draw = np.random.default_rng(3)
    masks = np.zeros((5, height, width), dtype=bool)
    masks[0] = draw.random((height, width)) < 0.1
    masks[1, : height // 2, width // 3 :] = True
    masks[2, :, width // 4 :] = True
    masks[3, height // 4 : height // 3, : width // 2] = True
    return masks


SHAPES = [(40, 60, 3, 5), (33, 17, 7, 4), (5, 9, 8, 12), (1030, 90, 20, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("runs", [4096, 1])
def test_refined_labels_equal_a_slow_rendering(shape, runs, monkeypatch):
    monkeypatch.setattr("pixelclip.masks.refine.RUNS_PER_BLOCK", runs)
    height, width, rows, columns = shape
    features, text = unit(rows, columns, 8), unit(4, 8, seed=1)
    axes = (axis(height, rows, rows / height * 0.97), axis(width, columns, columns / width))
    masks = nested_masks(height, width)
    labeller = Labeller(tuple("abcd"), text, None, 5.0)
    result = labeller.label(iter([features]), axes, from_masks(masks), confidence=True)
    plain = labeller.label(iter([features]), axes)
    scores = upsampled(features, text, axes)
    labels, sure = slow_refinement(plain.labels, scores, masks, 5.0)
    np.testing.assert_array_equal(result.labels, labels)
    under = masks.any(axis=0)
    np.testing.assert_allclose(result.confidence[under], sure[under], atol=1e-3)
    assert np.abs(result.confidence - sure).max() < 0.05  # free pixels: approximate in the rest
    assert result.labels.dtype == np.uint8
    for k in np.unique(labels):
        mean = sure[labels == k].mean()
        assert result.mean_confidence[k] == pytest.approx(mean, abs=0.02)
    if min(shape[:2]) > 5:
        assert (result.labels != plain.labels).any()


def test_no_masks_at_all_change_nothing():
    features, text = unit(3, 5, 8), unit(4, 8, seed=1)
    axes = (axis(40, 3, 3 / 40), axis(60, 5, 5 / 60))
    labeller = Labeller(tuple("abcd"), text, None, 5.0)
    nothing = from_labels(np.zeros((40, 60), np.uint8), ignore=(0,))
    result = labeller.label(iter([features]), axes, nothing, confidence=True)
    plain = labeller.label(iter([features]), axes, confidence=True)
    np.testing.assert_array_equal(result.labels, plain.labels)
    np.testing.assert_array_equal(result.confidence, plain.confidence)
    np.testing.assert_allclose(result.mean_confidence, plain.mean_confidence, atol=1e-6)


def test_masks_of_unsure_or_background_names_have_no_class():
    features, text = unit(3, 5, 8), unit(4, 8, seed=1)
    axes = (axis(40, 3, 3 / 40), axis(60, 5, 5 / 60))
    masks = from_labels(np.arange(40 * 60).reshape(40, 60) // 300)
    whole = Labeller(tuple("abcd"), text, None, 5.0)
    plain = whole.label(iter([features]), axes, masks, confidence=True)
    names = replace(whole, classes=("a", "b")).label(iter([features]), axes, masks)
    np.testing.assert_array_equal(names.labels, np.where(plain.labels >= 2, 255, plain.labels))
    assert 0 < (names.labels == 255).mean() < 1
    limit = float(np.median(np.unique(plain.confidence.astype(np.float64))))
    sure = replace(whole, threshold=limit).label(iter([features]), axes, masks)
    is_unsure = plain.confidence < limit
    np.testing.assert_array_equal(sure.labels == 255, is_unsure)
    assert 0 < is_unsure.mean() < 1


def test_masks_are_classified_by_experts_too():
    experts, own = some_experts()
    features = unit(5, 6, 8)
    axes = (axis(40, 5, 5 / 40), axis(48, 6, 6 / 48))
    masks = from_labels(np.arange(40 * 48).reshape(40, 48) // (48 * 4))
    labeller = Labeller(tuple("abcd"), experts.average(), experts, 5.0)
    result = labeller.label(iter([features]), axes, masks)
    bands = torch.arange(10).repeat_interleave(4 * 48).view(40, 48)

    def means(text):
        scores = upsampled(features, text, axes)
        return torch.stack([scores[:, bands == band].mean(dim=1) for band in range(10)], dim=1)

    expected, _, nobody = slow_fusion(means, experts, own, 5.0)
    np.testing.assert_array_equal(result.labels, expected.numpy()[bands.numpy()])
    assert len(np.unique(expected)) > 1
    assert (~nobody).any()


@pytest.mark.parametrize("settings", [{}, {"preset": "authors"}, {"short_side": 210, "window": 96}])
def test_a_segmenter_refines_by_masks_of_the_photo(tmp_path, settings):
    image = photo(330, 210)
    segmenter = make(templates=COMMON, folder=tmp_path, refine="superpixels", **settings)
    result = segmenter(image, confidence=True)
    prepared = segmenter.prepare(image)
    (masks,) = Superpixels()([np.asarray(image)])
    decoded = masks.sample(np.arange(210), np.arange(330))
    np.testing.assert_array_equal(decoded.sum(axis=0), 1)
    features = segmenter.grid_features(prepared)
    scores = upsampled(features, segmenter.text, segmenter.axes(prepared))
    labels, sure = slow_refinement(
        np.zeros((210, 330), np.uint8), scores, decoded, segmenter.backbone.temperature
    )
    np.testing.assert_array_equal(result.labels, labels)
    np.testing.assert_allclose(result.confidence, sure, atol=2e-3)
    assert len(np.unique(labels)) > 1
    said = segmenter.description()["refine"]
    assert said["source"] == "superpixels"
    assert said["threshold"] == 0.85


def test_masks_made_before_give_the_same_as_made_on_the_fly(tmp_path):
    images = tmp_path / "images"
    for name in ("a/1.png", "b/1.png"):
        (images / name).parent.mkdir(parents=True)
        photo(90, 70, len(name) + ord(name[0])).save(images / name)
    make_masks(images, tmp_path / "store", source="superpixels")
    photos = [Photo(images / name, (images / name).relative_to(images).with_suffix(""))
              for name in ("a/1.png", "b/1.png")]  # fmt: skip
    flying = make(templates=COMMON, folder=tmp_path, refine="superpixels")
    stored = make(templates=COMMON, folder=tmp_path, refine=find_masks(tmp_path / "store", photos))
    for own in photos:
        first = flying.run([flying.prepare(own.path)])[0].labels
        second = stored.run([stored.prepare(own.path, own)])[0].labels
        np.testing.assert_array_equal(first, second)
    said = stored.description()["refine"]
    assert said["masks"] == str(tmp_path / "store")
    (tmp_path / "store" / "more").write_text("x")
    assert find_masks(tmp_path / "store").state != said["state"]


def test_sources_of_ones_own_refine(tmp_path):
    source = Superpixels(SuperpixelSettings(threshold=0.3))
    segmenter = make(templates=COMMON, folder=tmp_path, refine=source)
    assert segmenter.description()["refine"]["threshold"] == 0.3
    assert segmenter.description()["refine"]["source"] == "Superpixels"
    assert segmenter(photo(60, 40)).labels.shape == (40, 60)


def test_masks_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match="no masks at nowhere; give a file or folder of masks, or"
    ):
        make(templates=COMMON, folder=tmp_path, refine="nowhere")
    maps = tmp_path / "maps"
    maps.mkdir()
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(maps / "a.png")
    photo(60, 40).save(tmp_path / "a.jpg")
    photo(50, 40).save(tmp_path / "b.jpg")
    segmenter = make(templates=COMMON, folder=tmp_path, refine=maps)
    assert len(np.unique(segmenter(tmp_path / "a.jpg").labels)) == 1
    with pytest.raises(DataError, match=r"b.jpg has no masks in .*maps"):
        segmenter(tmp_path / "b.jpg")
    with pytest.raises(DataError, match="a photo without a path has no masks made before"):
        segmenter(photo(60, 40))
    with pytest.raises(DataError, match="none of the photos has masks in"):
        find_masks(maps, [Photo(tmp_path / "b.jpg", tmp_path / "b")])
    other = make(
        templates=COMMON,
        folder=tmp_path,
        refine=lambda photo, size: from_labels(np.ones((3, 4), np.uint8)),
    )
    with pytest.raises(DataError, match="has 60 x 40 pixels, its masks are of a photo of 4 x 3"):
        other(tmp_path / "a.jpg")
