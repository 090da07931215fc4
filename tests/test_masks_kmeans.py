"""K-means on dense features: the clusters, and the masks that photos get."""

import copy
import json
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from pixelclip.errors import ConfigError, ModelError
from pixelclip.images import read_photo
from pixelclip.masks.kmeans import (
    DinoMasks,
    DinoSettings,
    KMeansMasks,
    KMeansSettings,
    MiniMasks,
    MiniSettings,
    cluster_maps,
    first_centres,
    input_size,
    move_centres,
    nearness,
    to_masks,
)
from pixelclip.masks.runs import PhotoMasks, from_labels
from pixelclip.masks.score import open_truth, score_photo
from pixelclip.masks.sources import MASK_SOURCES
from pixelclip.photos import find_photos
from tests.tiny import photo
from tests.towers import save_tower

SMALL = {"short_side": 64, "clusters": 5}


def blobs(seed: int, count: int = 60, dim: int = 6, groups: int = 5) -> np.ndarray:
    draw = np.random.default_rng(seed)
    middles = draw.normal(0, 1, (groups, dim))
    return (middles[draw.integers(groups, size=count)] + draw.normal(0, 0.5, (count, dim))).astype(
        np.float32
    )


def image(width: int = 90, height: int = 70, seed: int = 0) -> np.ndarray:
    return np.asarray(photo(width, height, seed))


def bytes_of(masks: PhotoMasks) -> tuple[object, ...]:
    return masks.height, masks.width, masks.to_rle(), masks.scores.tolist()


@pytest.fixture(scope="module")
def dino_dir(tmp_path_factory) -> str:
    return str(save_tower(tmp_path_factory.mktemp("dino"), "dino"))


@pytest.fixture(scope="module")
def dino(dino_dir) -> KMeansMasks:
    return DinoMasks(DinoSettings(model=dino_dir, **SMALL), "cpu")


@pytest.fixture(scope="module")
def mini() -> KMeansMasks:
    return MiniMasks(MiniSettings(components=False, min_share=0, **SMALL), "cpu")


# The clusters


def slow_kmeans(
    tokens: np.ndarray, centres: np.ndarray, options: KMeansSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and centres as the authors' library finds them (behaviour.md 19b), in a plain loop."""
    tokens, centres = tokens.astype(np.float64), centres.astype(np.float64)
    for _ in range(options.max_iterations):
        labels = np.array([((token - centres) ** 2).sum(axis=1).argmin() for token in tokens])
        means = np.zeros_like(centres)
        for index in range(len(centres)):
            members = tokens[labels == index]
            empty = centres[index] if options.start == "spread" else 0
            means[index] = members.mean(axis=0) if len(members) else empty
        if ((means - centres) ** 2).sum() <= options.tolerance:
            break
        last, centres = centres, means
    else:
        centres = last  # those the labels were found by
    return labels, centres


@pytest.mark.parametrize("start", ["spread", "random"])
@pytest.mark.parametrize(
    ("max_iterations", "tolerance"), [(100, 1e-4), (3, 0.0), (2, 0.0), (50, 1.0)]
)
def test_clusters_equal_a_slow_loop(start, max_iterations, tolerance):
    options = KMeansSettings(
        start=start, max_iterations=max_iterations, tolerance=tolerance, clusters=5
    )
    tokens = torch.from_numpy(np.stack([blobs(seed) for seed in range(8)]))
    randoms = [np.random.default_rng(seed) for seed in range(8)]
    first = first_centres(tokens, randoms, options)
    centres = move_centres(tokens, first, options)
    labels = nearness(tokens, centres).argmax(dim=2)
    for index in range(8):
        slow_labels, slow_centres = slow_kmeans(
            tokens[index].numpy(), first[index].numpy(), options
        )
        np.testing.assert_array_equal(labels[index], slow_labels)
        np.testing.assert_allclose(centres[index], slow_centres, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_clusters_equal_scikit_learns(seed):
    options = KMeansSettings(clusters=6, tolerance=0.0, max_iterations=300)
    tokens = torch.from_numpy(blobs(seed, count=300, groups=9))[None]
    first = first_centres(tokens, [np.random.default_rng(seed)], options)
    reference = KMeans(6, init=first[0].numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=300)
    reference.fit(tokens[0].numpy())
    centres = move_centres(tokens, first, options)
    labels = nearness(tokens, centres).argmax(dim=2)
    np.testing.assert_array_equal(labels[0], reference.labels_)
    np.testing.assert_allclose(centres[0], reference.cluster_centers_, rtol=1e-4, atol=1e-5)


def test_an_emptied_cluster_becomes_zero_for_the_authors_and_stays_for_us():
    tokens = torch.tensor([[[1.0], [1.1], [5.0], [5.1]]])
    centres = torch.tensor([[[1.0], [5.0], [40.0]]])
    for start, expected in (("random", 0.0), ("spread", 40.0)):
        options = KMeansSettings(clusters=3, start=start, max_iterations=2)
        assert move_centres(tokens, centres, options)[0, 2, 0] == expected


def test_first_centres_are_tokens_and_spread_ones_differ():
    tokens = torch.from_numpy(blobs(3, count=40))[None]
    for start in ("spread", "random"):
        options = KMeansSettings(clusters=40, start=start)
        centres = first_centres(tokens, [np.random.default_rng(0)], options)
        found = {tuple(centre) for centre in centres[0].tolist()}
        assert found <= {tuple(token) for token in tokens[0].tolist()}
        assert len(found) == 40 if start == "spread" else len(found) < 40  # with replacement


def test_spread_centres_fall_into_groups_far_apart():
    """A group that no centre is in is drawn with near certainty; random draws miss some."""
    draw = np.random.default_rng(0)
    groups = np.arange(8).repeat(20)
    tokens = (1000 * np.eye(8)[groups] + draw.normal(size=(160, 8))).astype(np.float32)
    for seed in range(20):
        centres = first_centres(
            torch.from_numpy(tokens)[None],
            [np.random.default_rng(seed)],
            KMeansSettings(clusters=8),
        )
        assert sorted(centres[0].argmax(dim=1).tolist()) == list(range(8))


@given(count=st.integers(1, 12), different=st.integers(1, 12), clusters=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_with_few_different_tokens_each_gets_its_cluster(count, different, clusters):
    draw = np.random.default_rng(count)
    kinds = draw.normal(size=(different, 3)).astype(np.float32)
    chosen = draw.integers(different, size=count)
    tokens = torch.from_numpy(kinds[chosen])[None]
    options = KMeansSettings(clusters=clusters)
    first = first_centres(tokens, [np.random.default_rng(0)], options)
    centres = move_centres(tokens, first, options)
    labels = nearness(tokens, centres).argmax(dim=2)[0].numpy()
    distinct = len(set(chosen.tolist()))
    assert len(set(labels.tolist())) == min(distinct, clusters)
    assert len(set(zip(chosen.tolist(), labels.tolist(), strict=True))) == distinct


def test_a_photos_clusters_do_not_depend_on_its_batch():
    """Each in float64, where rounding decides nothing: photos end after different iterations."""
    tokens = torch.from_numpy(np.stack([blobs(seed, count=200) for seed in range(6)])).double()
    options = KMeansSettings(clusters=7)
    randoms = [np.random.default_rng(seed) for seed in range(6)]
    first = first_centres(tokens, randoms, options)
    together = move_centres(tokens, first, options)
    for index in range(6):
        one = slice(index, index + 1)
        alone_first = first_centres(tokens[one], [np.random.default_rng(index)], options)
        assert torch.equal(alone_first, first[one])
        alone = move_centres(tokens[one], alone_first, options)
        torch.testing.assert_close(alone, together[one], rtol=1e-12, atol=1e-12)


# The masks


def test_masks_are_clusters_of_the_towers_features(dino):
    options = dino.settings.model_copy(update={"edges": "nearest"})
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    labels = cluster_maps(dino.tower, pixels, [np.random.default_rng(0)], options)[0].numpy()
    tokens = dino.tower.dense(pixels).flatten(2).mT
    first = first_centres(tokens, [np.random.default_rng(0)], options)
    slow, _ = slow_kmeans(tokens[0].numpy(), first[0].numpy(), options)
    np.testing.assert_array_equal(labels, slow.reshape(4, 6))


def test_smooth_edges_are_the_interpolated_distances(dino):
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    randoms = [np.random.default_rng(0)]
    labels = cluster_maps(dino.tower, pixels, randoms, dino.settings)[0]
    assert labels.shape == (64, 96)
    tokens = dino.tower.dense(pixels).flatten(2).mT
    first = first_centres(tokens, [np.random.default_rng(0)], dino.settings)
    centres = move_centres(tokens, first, dino.settings)
    distances = torch.cdist(tokens.double(), centres.double()).square()[0]  # [N, K]
    maps = distances.T.reshape(1, -1, 4, 6)
    maps = torch.nn.functional.interpolate(maps, (64, 96), mode="bilinear")[0]
    assert (maps.argmin(dim=0) == labels).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize("source", ["dino", "mini"])
def test_masks_of_a_photo_partition_it(source, request):
    made = request.getfixturevalue(source)([image()])[0]
    assert (made.height, made.width) == (70, 90)
    grid = made.sample(np.arange(70), np.arange(90))
    assert (grid.sum(axis=0) == 1).all()
    assert 2 <= made.count <= 5
    assert (made.areas() > 0).all()
    assert made.scores.tolist() == [1.0] * made.count


@pytest.mark.parametrize("source", ["dino", "mini"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_masks_do_not_depend_on_the_other_photos(source, batch_size, request):
    made = request.getfixturevalue(source)
    sizes = [(90, 70), (70, 90), (90, 70), (33, 400), (90, 70), (90, 71)]
    images = [image(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    made.batch_size = batch_size
    try:
        together = [bytes_of(masks) for masks in made(images)]
        alone = [bytes_of(made([one])[0]) for one in images]
        turned = [bytes_of(masks) for masks in made(images[::-1])][::-1]
    finally:
        made.batch_size = 1
    assert together == alone == turned
    assert made([]) == []


def _in_a_process(folder: str, threads: int) -> list[object]:
    torch.set_num_threads(threads)
    torch.manual_seed(threads)  # a global seed plays no part
    source = DinoMasks(DinoSettings(model=folder, **SMALL), "cpu")
    return [bytes_of(masks) for masks in source([image(seed=seed) for seed in range(2)])]


def test_another_process_makes_the_same_masks(dino, dino_dir):
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        other = pool.apply(_in_a_process, (dino_dir, 2))
    assert other == [bytes_of(masks) for masks in dino([image(seed=seed) for seed in range(2)])]


def test_the_seed_decides(dino_dir):
    first = DinoMasks(DinoSettings(model=dino_dir, **SMALL), "cpu")
    other = DinoMasks(DinoSettings(model=dino_dir, seed=1, **SMALL), "cpu")
    assert bytes_of(first([image()])[0]) == bytes_of(first([image()])[0])
    assert bytes_of(first([image()])[0]) != bytes_of(other([image()])[0])


@pytest.mark.parametrize("source", ["dino", "mini"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 2), (17, 5)])
@pytest.mark.parametrize("is_flat", [True, False])
def test_small_long_and_flat_photos_have_masks(source, size, is_flat, request):
    width, height = size
    pixels = np.full((height, width, 3), 90, np.uint8) if is_flat else image(width, height)
    made = request.getfixturevalue(source)([pixels])[0]
    assert (made.height, made.width) == (height, width)
    assert made.areas().sum() == width * height
    assert made.count >= 1


def test_a_photo_whose_features_are_equal_is_one_mask(dino):
    tower = copy.deepcopy(dino.tower)
    tower.tower.norm.weight.zero_()
    tower.tower.norm.bias.fill_(0.3)
    randoms = [np.random.default_rng(seed) for seed in range(2)]
    labels = cluster_maps(tower, torch.rand(2, 3, 64, 80), randoms, dino.settings)
    assert (labels == labels[0, 0, 0]).all()


def test_of_too_many_pieces_the_largest_are_kept():
    labels = np.random.default_rng(0).integers(0, 2, (300, 300))
    labels[200:] = 5  # noise above, one piece below
    masks = to_masks(labels, 300, 300, KMeansSettings(components=True))
    pieces = to_masks(labels[:200], 200, 300, KMeansSettings(components=True))
    assert masks.count == 4096
    assert masks.areas().max() == 100 * 300
    assert masks.broken == pieces.broken + 1 > 1


def test_components_are_the_connected_pieces():
    labels = np.array([[0, 0, 1, 1], [2, 2, 1, 0], [2, 2, 0, 1]])
    options = KMeansSettings(components=True)
    made = to_masks(labels, 6, 8, options)
    grid = made.sample(np.arange(6), np.arange(8))
    assert (grid.sum(axis=0) == 1).all()
    pieces = {tuple(map(tuple, np.argwhere(mask[::2, ::2]).tolist())) for mask in grid}
    assert pieces == {  # corners do not connect
        ((0, 0), (0, 1)), ((0, 2), (0, 3), (1, 2)), ((1, 0), (1, 1), (2, 0), (2, 1)),
        ((1, 3),), ((2, 2),), ((2, 3),),
    }  # fmt: skip
    assert to_masks(labels, 6, 8, KMeansSettings()).count == 3


def test_masks_below_the_least_share_are_left_out():
    labels = np.zeros((10, 10), dtype=np.int64)
    labels[0, :5], labels[5, 5] = 1, 2
    for share, areas in ((0.0, [94, 5, 1]), (0.01, [94, 5, 1]), (0.02, [94, 5]), (0.06, [94])):
        made = to_masks(labels, 10, 10, KMeansSettings(min_share=share))
        assert made.areas().tolist() == areas


@pytest.mark.parametrize(
    ("photo_size", "stride", "expected"),
    [
        ((640, 640), 16, (640, 640)),  # the authors' crop: 40 x 40 tokens
        ((889, 1333), 16, (640, 960)),
        ((1333, 889), 14, (966, 644)),
        ((100, 100), 32, (640, 640)),
        ((1, 100_000), 16, (16, 1280)),
        ((1, 1), 16, (640, 640)),
    ],
)
def test_the_input_keeps_the_photos_shape(photo_size, stride, expected):
    assert input_size(*photo_size, 640, stride) == expected


def test_the_sources_are_listed_and_described(dino_dir):
    for name, source in (("dino", DinoMasks), ("mini", MiniMasks)):
        kind = MASK_SOURCES[name]()
        assert kind.make is source
        json.dumps(kind.settings().model_dump(mode="json"))
    assert (DinoSettings().clusters, DinoSettings().short_side) == (16, 640)  # the authors'
    made = MASK_SOURCES["dino"]().make(DinoSettings(checkpoint=dino_dir, **SMALL), "cpu")
    assert made([image()])[0].count == 5


def test_wrong_models_and_devices_are_one_line():
    with pytest.raises(ModelError, match="timm has no model 'dono'"):
        DinoMasks(DinoSettings(model="dono"), "cpu")
    with pytest.raises(ModelError, match="unknown model 'dono'"):
        MiniMasks(MiniSettings(model="dono"), "cpu")
    with pytest.raises(ConfigError, match="unknown device"):
        MiniMasks(MiniSettings(), "tpu")


def test_mini_takes_another_backbone(run_dir):
    for options in ({"model": str(run_dir)}, {"model": "ViT-B-16", "checkpoint": str(run_dir)}):
        settings = MiniSettings(min_share=0, **options, **SMALL)
        if "checkpoint" in options:  # of another architecture than the one that is named
            with pytest.raises(ModelError, match="does not fit"):
                MiniMasks(settings, "cpu")
        else:
            assert MiniMasks(settings, "cpu")([image()])[0].areas().sum() == 70 * 90


def test_minis_features_are_its_levels_in_equal_measure(mini):
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = mini.tower.dense(pixels)
    levels = mini.tower.visual.levels(pixels)[1].permute(0, 3, 1, 2)
    start = 1280  # the tower's last map, left out
    for count, weight in ((48, 0.7), (120, 1.0), (352, 0.5)):
        for channel in range(0, count, 13):
            raw = levels[:, start + channel].flatten(1)
            expected = (raw - raw.mean(1, keepdim=True)) / raw.std(1, correction=0, keepdim=True)
            ours = found[:, start - 1280 + channel].flatten(1)
            torch.testing.assert_close(
                ours, weight * expected / count**0.5, rtol=1e-3, atol=1e-4, equal_nan=True
            )
        start += count


@pytest.mark.shared
def test_minis_masks_find_more_human_regions_than_blocks_do(shared_dir):
    """Six blocks cover as many pixels, and are as many masks before pieces are told apart."""
    folder = shared_dir / "data/regions"
    photos = find_photos([folder / "images"])[::20]
    truth = open_truth(folder, photos)
    source = MiniMasks(MiniSettings(), "cpu")
    ours, blocks = [], []
    for one in photos:
        pixels = np.asarray(read_photo(one.path))
        height, width = pixels.shape[:2]
        regions = truth(one, (height, width))
        grid = np.arange(6).reshape(2, 3).repeat(-(-height // 2), axis=0).repeat(width, axis=1)
        grid = grid[:height, np.arange(width) * grid.shape[1] // width]
        ours.append(score_photo(source([pixels])[0], regions))
        blocks.append(score_photo(from_labels(grid), regions))
    assert np.mean([s.covering for s in ours]) > np.mean([s.covering for s in blocks]) + 0.1
    assert np.mean([s.best_iou.mean() for s in ours]) > 0.2
