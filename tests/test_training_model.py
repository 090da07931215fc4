"""What a training step computes, against renderings of a few lines, at unusual settings."""

import copy
import io
import multiprocessing
import pickle
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixelclip.backbones import Backbone
from pixelclip.config import TrainConfig
from pixelclip.training.batch import Batch, make_batch
from pixelclip.training.clustering import ASSIGNERS, mask_pool, sinkhorn
from pixelclip.training.loop import make_accelerator
from pixelclip.training.model import PixelClip, Pooled, drop_paths
from pixelclip.training.parameters import make_optimizer
from pixelclip.training.step import StepResult, make_targets, train_step
from tests.conftest import randomise
from tests.tiny import tiny_vit as small_vit
from tests.training import PRELOADED, SMALL, join_processes

MASK_SIZE = 24
COUNTS = (3, 0, 2, 4)  # masks of the photos of a batch
SIZES = ((40, 30), (48, 48), (25, 48), (33, 21))


def make_config(**changes: object) -> TrainConfig:
    return TrainConfig(**{**SMALL, "steps": 4, "mask_size": MASK_SIZE, **changes})


def masks_of(count: int, height: int, width: int, draw: torch.Generator) -> Tensor:
    """Random blobs; some overlap."""
    coarse = torch.rand(count, 1, 4, 4, generator=draw)
    return F.interpolate(coarse, (height, width), mode="nearest")[:, 0] > 0.6


def random_batch(
    counts: tuple[int, ...] = COUNTS,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    *,
    strong: bool = True,
    seed: int = 0,
) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    weak = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=draw) for size in sizes]
    other = [255 - view // 2 for view in weak] if strong else None
    masks = [masks_of(n, *size, draw) for n, size in zip(counts, sizes, strict=True)]
    return make_batch(weak, other, masks, mask_size=MASK_SIZE, frame=(48, 48))


def one_step(model: PixelClip, batches: list[Batch], step: int = 0) -> StepResult:
    return train_step(Accelerator(cpu=True), model, make_optimizer(model, model.config),
                      batches, step)  # fmt: skip


def gradients(model: PixelClip) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["vit", "convnext"])
def backbone(request, tiny_convnext) -> Backbone:
    return small_vit() if request.param == "vit" else copy.deepcopy(tiny_convnext)


@pytest.fixture
def vit() -> Backbone:
    return randomise(small_vit())


# Pieces against renderings


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    cells=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(2, 31),
)
def test_pooling_is_the_mean_of_upsampled_features(seed, counts, cells, size):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(len(counts), 5, *cells, generator=draw)
    masks = torch.rand(sum(counts), size, size, generator=draw) < 0.3
    masks[:, 0, 0] = True
    photos = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    large = F.interpolate(features, (size, size), mode="bilinear", align_corners=False)
    wanted = torch.stack([large[b][:, m].mean(dim=1) for b, m in zip(photos, masks, strict=True)])
    torch.testing.assert_close(mask_pool(features, masks, photos), wanted, rtol=1e-4, atol=1e-5)


def test_the_network_sees_the_mean_colour_in_place_of_padding(vit):
    model, batch = PixelClip(vit, make_config()), random_batch()
    batch.weak[0, :, 40:] = 7  # what lies there must not matter
    inputs = model.network_input(batch.weak, batch.sizes)
    for view, (height, width), got in zip(batch.weak, SIZES, inputs, strict=True):
        frame = model.visual.mean.expand(3, 48, 48).clone()
        frame[:, :height, :width] = view[:, :height, :width] / 255
        wanted = F.interpolate(frame[None], (64, 64), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(got, wanted)
    assert model.visual.mean.flatten().tolist() == pytest.approx(vit.card.mean)


def test_teacher_features_are_pooled_per_photo(vit):
    model, batch = PixelClip(vit, make_config()), random_batch()
    pooled = model.pool(batch)
    assert pooled.photos.tolist() == [0, 0, 0, 2, 2, 3, 3, 3, 3]
    for feature, mask, photo in zip(pooled.features, pooled.masks, pooled.photos, strict=True):
        one = model.network_input(batch.weak[photo][None], batch.sizes[photo][None])
        large = F.interpolate(model.teacher(one), (MASK_SIZE, MASK_SIZE), mode="bilinear")[0]
        torch.testing.assert_close(feature, large[:, mask].mean(dim=1), rtol=1e-4, atol=1e-5)


def test_masks_of_one_pixel_are_dropped(vit):
    model, batch = PixelClip(vit, make_config()), random_batch()
    one = torch.zeros(2, MASK_SIZE, MASK_SIZE, dtype=torch.bool)
    one[0, 3, 4] = True
    changed = Batch(batch.weak, batch.strong, batch.sizes,
                    (torch.cat([one, batch.masks[0]]), *batch.masks[1:]))  # fmt: skip
    assert torch.equal(model.pool(changed).masks, model.pool(batch).masks)


def naive_sinkhorn(logits: Tensor) -> Tensor:
    shares = logits.double().softmax(dim=1)
    for _ in range(3):
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares.float()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), num=st.integers(1, 12), clusters=st.sampled_from([1, 2, 4, 30]),
       temperature=st.sampled_from([1.0, 100.0]), old=st.integers(0, 9))  # fmt: skip
def test_assigners_are_those_of_the_paper(seed, num, clusters, temperature, old):
    draw = torch.Generator().manual_seed(seed)
    logits = temperature * torch.randn(num, clusters, generator=draw).clamp(-1, 1)
    past = temperature * torch.randn(old, clusters, generator=draw).clamp(-1, 1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(sinkhorn(logits), naive_sinkhorn(logits), **close)
    together = naive_sinkhorn(torch.cat([past, logits]))[old:]
    torch.testing.assert_close(ASSIGNERS["queue"](logits, past), together, **close)
    torch.testing.assert_close(ASSIGNERS["softmax"](logits, past), logits.softmax(dim=1))


def own_loss(model: PixelClip, batch: Batch, clusters: Tensor | None) -> Tensor:
    """The method's loss, map by map: decode, up-sample, gather the pixels some mask covers."""
    vectors = F.normalize(model.vectors(model.text), dim=1)
    pooled = model.pool(batch)
    losses = []
    for photo in pooled.photos.unique().tolist():
        own = pooled.photos == photo
        views = batch.strong if batch.strong is not None else batch.weak
        inputs = model.network_input(views[photo][None], batch.sizes[photo][None])
        features = F.normalize(model.visual(inputs)[0], dim=0)
        masks, covered = pooled.masks[own].float(), pooled.masks[own].any(dim=0)
        if clusters is None:
            pairs = list(zip(F.normalize(pooled.features[own], dim=1), masks, strict=True))
        else:
            merged = [
                masks[clusters[own] == k].sum(dim=0).clamp(max=1) for k in range(len(vectors))
            ]
            pairs = list(zip(vectors, merged, strict=True))
        for vector, target in pairs:
            decoded = model.decoder(torch.einsum("dhw,d->hw", features, vector)[None, None])
            large = F.interpolate(decoded, (MASK_SIZE, MASK_SIZE), mode="bilinear")[0, 0]
            losses.append(
                F.binary_cross_entropy_with_logits(
                    large[covered], target[covered], reduction="none"
                )
            )
    return torch.cat(losses).mean()


@pytest.mark.parametrize("assigner", ["sinkhorn", "softmax", "none"])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("strong", [True, False])
def test_loss_and_gradients_are_those_of_the_method(backbone, assigner, temperature, strong):
    if assigner == "none" and temperature == 1.0:
        temperature = 10_000.0
    config = make_config(
        assigner=assigner, temperature=temperature, drop_path=False, finetune="full"
    )
    model, batch = PixelClip(randomise(backbone), config), random_batch(strong=strong)
    pooled = [model.pool(batch)]
    vectors = model.vectors(model.text)
    targets, assignment = make_targets(model, pooled, vectors)
    loss = model(batch, targets[0], vectors) / targets[0].terms
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    wanted = own_loss(model, batch, None if assignment is None else assignment.hard)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    theirs = gradients(model)
    assert ours.keys() - theirs.keys() == set()
    for name, gradient in theirs.items():
        # A ReLU whose input is zero but for rounding is on in one and off in the other.
        error = (ours[name] - gradient).norm() / (gradient.norm() + 1e-6)
        assert error < 0.02, name


@cache
def with_clusters(clusters: int) -> PixelClip:
    return PixelClip(small_vit(), make_config(num_clusters=clusters))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), clusters=st.integers(1, 5))
def test_every_mask_goes_to_the_map_of_its_cluster(seed, clusters):
    draw = torch.Generator().manual_seed(seed)
    model = with_clusters(clusters)
    masks = masks_of(6, MASK_SIZE, MASK_SIZE, draw)
    masks[:, 0, :2] = True
    photos = torch.tensor([1, 1, 1, 4, 4, 7])
    hard = torch.randint(clusters, (6,), generator=draw)
    targets = model.targets(Pooled(torch.zeros(6, model.dim), masks, photos), hard)
    assert targets.present.tolist() == [1, 4, 7]
    assert targets.terms == clusters * sum(
        int(masks[photos == p].any(dim=0).sum()) for p in (1, 4, 7)
    )
    probe = torch.randn(16, 16, generator=draw)
    large = F.interpolate(probe[None, None], (MASK_SIZE, MASK_SIZE), mode="bilinear")[0, 0]
    for index, photo in enumerate((1, 4, 7)):
        for cluster in range(clusters):
            union = masks[(photos == photo) & (hard == cluster)].any(dim=0)
            got = (targets.maps[index * clusters + cluster] * probe).sum()
            torch.testing.assert_close(got, (large * union).sum(), rtol=1e-4, atol=1e-4)


def test_teacher_is_the_moving_average(vit):
    model = PixelClip(vit, make_config(momentum=0.75))
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(1.0 if parameter.requires_grad else 0.0)
    model.update_teacher()
    students = dict(model.visual.named_parameters())
    for name, parameter in model.teacher.named_parameters():
        wanted = 0.75 * before[name] + 0.25 * students[name]
        torch.testing.assert_close(parameter, wanted)


# Switches


SWITCHES: list[dict[str, object]] = [
    {"assigner": "sinkhorn"}, {"assigner": "queue"}, {"assigner": "softmax"}, {"assigner": "none"},
    {"class_vectors": "words"}, {"class_vectors": "free"}, {"momentum": 0.0}, {"momentum": 1.0},
    {"prompt_start": "words"}, {"train_templates": "imagenet-select"}, {"strong_view": False},
    {"train_templates": "imagenet-select", "authors_defects": True}, {"loss_mean": "rank"},
    {"finetune": "full"}, {"finetune": ("*.0.*", "proj")}, {"num_clusters": 1},
    {"temperature": 1.0}, {"temperature": 10_000.0}, {"drop_path": False},
    {"precision": "float32", "micro_batches": 3}, {"authors_defects": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
@pytest.mark.parametrize("tower", ["vit", "convnext"])
def test_every_switch_trains(changes, tower, tiny_convnext):
    if tower == "convnext":
        changes = {"finetune": "full", **changes}
        if changes["finetune"] == ("*.0.*", "proj"):
            changes["finetune"] = ("trunk.stem.*", "*.mlp.*")
    backbone = small_vit() if tower == "vit" else copy.deepcopy(tiny_convnext)
    config = make_config(**changes)
    model = PixelClip(backbone, config)
    optimizer, batch = make_optimizer(model, config), random_batch(strong=config.strong_view)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        parts = batch.split(config.micro_batches)
        done = train_step(Accelerator(cpu=True), model, optimizer, parts, step)
        assert done.loss > 0
        assert done.loss < 20
        assert done.grad_norm > 0
    assert all(p.isfinite().all() for p in model.parameters())
    parts = {name.split(".")[0] for name, gradient in gradients(model).items() if gradient.any()}
    wanted = {"visual", "decoder"}
    if config.assigner != "none" and config.class_vectors != "words":
        wanted |= {"vectors"}
    assert parts == wanted
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    names = {f"{prefix}.{name}" for name in model.trained for prefix in ("visual", "teacher")}
    assert {name for name in moved if not name.startswith(("decoder", "vectors"))} <= names
    assert any(name.startswith("teacher.") for name in moved) == (config.momentum < 1)


def test_without_momentum_the_teacher_is_the_student(vit):
    model = PixelClip(vit, make_config(momentum=0.0))
    one_step(model, [random_batch()])
    model.update_teacher()
    students = dict(model.visual.named_parameters())
    assert all(torch.equal(p, students[name]) for name, p in model.teacher.named_parameters())


def test_without_any_mask_nothing_is_learned(vit):
    model = PixelClip(vit, make_config())
    done = one_step(model, [random_batch((0, 0, 0, 0))])
    assert done.loss != done.loss
    assert (done.masks, done.grad_norm) == (0, 0.0)
    assert gradients(model).keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("assigner", ["sinkhorn", "queue", "none"])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_micro_batches_change_nothing(assigner, parts):
    results = []
    for count in (1, parts):
        model = PixelClip(randomise(small_vit()), make_config(assigner=assigner))
        done = one_step(model, random_batch().split(count))
        results.append((done, gradients(model), dict(model.named_parameters())))
    (one, slopes, weights), (other, other_slopes, other_weights) = results
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for name in slopes:
        torch.testing.assert_close(slopes[name], other_slopes[name], rtol=1e-3, atol=1e-6)
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], rtol=1e-4, atol=1e-5)


# The model as an object


def dumped(model: PixelClip) -> PixelClip:
    return pickle.loads(pickle.dumps(model))


def saved(model: PixelClip) -> PixelClip:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, dumped, saved])
def test_a_copy_trains_the_same(backbone, copied: Callable[[PixelClip], PixelClip]):
    model = PixelClip(backbone, make_config(finetune="full"))
    again = copied(model)
    results = [one_step(each, [random_batch()]) for each in (model, again)]
    assert results[0].loss == results[1].loss
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_teacher_is_always_in_evaluation_mode(backbone):
    model = PixelClip(backbone, make_config(finetune="full"))
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == mode
        assert not any(module.training for module in model.teacher.modules())
        assert not any(module.training for module in model.text.modules())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert not any(p.requires_grad for p in model.text.parameters())


def test_drop_path_is_the_students_own_and_repeats(tiny_convnext):
    trunk = copy.deepcopy(tiny_convnext)
    model = PixelClip(trunk, make_config(finetune="full"))
    if not drop_paths(model.visual):
        pytest.skip("this trunk drops no paths")
    assert all(module.training for module in drop_paths(model.visual))


@pytest.mark.parametrize("drop_path", [True, False])
def test_a_step_leaves_global_random_numbers_alone(tiny_convnext, drop_path):
    model = PixelClip(
        copy.deepcopy(tiny_convnext), make_config(finetune="full", drop_path=drop_path)
    )
    before = torch.get_rng_state()
    one_step(model, [random_batch()])
    assert torch.equal(torch.get_rng_state(), before)


# Several processes


def _share(rank: int, port: int, assigner: str, counts: tuple[int, ...], out: Path) -> None:
    """Three steps of one of two processes, with half of the batch."""
    torch.set_num_threads(1)
    join_processes(rank, 2, port)
    config = make_config(assigner=assigner, queue_steps=2)
    accelerator = make_accelerator("cpu", config)
    model = PixelClip(randomise(small_vit()), config)
    optimizer, wrapped = make_optimizer(model, model.config), accelerator.prepare_model(model)
    batch, results = random_batch(counts).split(2)[rank], []
    for step in range(3):
        results.append(train_step(accelerator, wrapped, optimizer, [batch], step))
        if step == 0:
            first = gradients(model)
    torch.save((results, first), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", [(3, 0, 2, 4), (1, 1, 5, 0), (0, 0, 2, 3), (4, 2, 0, 0)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("assigner", ["sinkhorn", "queue"])
def test_two_processes_assign_and_learn_what_one_does(assigner, counts, tmp_path):
    model = PixelClip(randomise(small_vit()), make_config(assigner=assigner, queue_steps=2))
    optimizer, alone = make_optimizer(model, model.config), []
    for step in range(3):
        alone.append(train_step(Accelerator(cpu=True), model, optimizer, [random_batch(counts)],
                                step))  # fmt: skip
        if step == 0:
            slopes = gradients(model)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_share, args=(rank, port, assigner, counts, tmp_path))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for step in range(3):
        parts = [results[step] for results, _ in shares]
        hard = torch.cat([part.assignment.hard for part in parts])
        assert torch.equal(hard, alone[step].assignment.hard)
        soft = torch.cat([part.assignment.soft for part in parts])
        torch.testing.assert_close(soft, alone[step].assignment.soft, rtol=1e-3, atol=1e-4)
        for part in parts:
            assert part.loss == pytest.approx(alone[step].loss, rel=1e-5)
            assert part.grad_norm == pytest.approx(alone[step].grad_norm, rel=1e-3)
            assert torch.equal(part.clusters, alone[step].clusters)
            assert part.entropy == pytest.approx(alone[step].entropy, rel=1e-3)
    for name, slope in slopes.items():
        for _, share in shares:
            torch.testing.assert_close(share[name], slope, rtol=1e-3, atol=1e-5)
