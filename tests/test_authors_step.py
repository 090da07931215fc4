"""The baseline of `benchmarks/train_step.py` computes what the authors' code computed.

Only then does a comparison of speed against it mean anything. Tolerances are those of
../shared/reference/README.md.
"""

import copy
import importlib
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.test_reference import Reference, load_reference

pytestmark = [pytest.mark.shared, pytest.mark.slow]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESOLUTION = {"vit": 320, "convnext": 256}
TEMPERATURE = {"vit-a": 100.0, "vit-b": 1.0, "vit-c": 100.0, "convnext-a": 1.0}
STEPS = 3

# Our name, the stored one, and the tolerance of the relative L2 distance.
FEATURES = {
    "student_features": ("student_feat", 2e-5),
    "teacher_features": ("teacher_feat", 2e-5),
    "mask_features": ("mask_feat", 2e-5),
    "cluster_features": ("cluster_emb", 1e-5),
}
# The same with every how many rows and columns are stored, and an absolute tolerance.
VALUES = {
    "logits": ("logits", 1, 5e-4),
    "soft": ("soft_assign", 1, 2e-5),
    "cost_volume": ("cost_volume_sub", 4, 1e-5),
    "decoded": ("head_out_sub", 10, 1e-5),
    "prediction": ("pred_sub", 32, 1e-5),
    "loss": ("loss", 1, 1e-6),
}


@dataclass(frozen=True, eq=False)
class Batch:
    """A stored batch."""

    weak: list[Tensor]
    strong: list[Tensor] | None
    masks: list[Tensor]


@dataclass(frozen=True, eq=False)
class Trained:
    """Three steps on batch a: what the first one computed and what each one left behind."""

    forward: object
    gradients: dict[str, Tensor]
    rates: dict[str, float]
    decays: dict[str, float]
    after_first: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    assignments: list[Tensor]
    distances: list[float]
    prompt_norms: list[float]
    rates_used: list[list[float]]
    clipped_prompt_norm: float


@pytest.fixture(scope="session")
def authors_step(shared_dir) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("authors_step")
        sys.modules.pop("authors_step")


def read_batch(reference: Reference, case: str) -> Batch:
    count = len([key for key in reference.values if key.startswith(f"{case}/image/")])

    def masks(index: int) -> Tensor:
        shape = reference[f"{case}/masks_shape/{index}"]
        packed = reference[f"{case}/masks_packed/{index}"].numpy()
        return torch.from_numpy(np.unpackbits(packed, axis=-1, count=shape[-1]).astype(bool))

    has_strong = f"{case}/image_strong/0" in reference.values
    return Batch(
        weak=[reference[f"{case}/image/{i}"] for i in range(count)],
        strong=[reference[f"{case}/image_strong/{i}"] for i in range(count)]
        if has_strong
        else None,
        masks=[masks(i) for i in range(count)],
    )


def build(authors_step: ModuleType, reference: Reference, case: str):
    head = {k.removeprefix("head/"): v for k, v in reference.values.items() if "head/" in k}
    head = {k: v for k, v in head.items() if k in authors_step.Decoder().state_dict()}
    return authors_step.AuthorsStep(
        copy.deepcopy(reference.backbone),
        reference["prompt/tokens"],
        head,
        temperature=TEMPERATURE[f"{reference.model}-{case}"],
        clip_resolution=RESOLUTION[reference.model],
    )


@cache
def train(authors_step: ModuleType, reference: Reference) -> Trained:
    step, batch = build(authors_step, reference, "a"), read_batch(reference, "a")
    runs, norms, distances, prompt_norms, rates_used = [], [], [], [], []
    for index in range(STEPS):
        forward = step.forward(batch.weak, batch.strong, batch.masks)
        step.backward(forward.loss)
        if index == 0:
            gradients = {name: p.grad.clone() for name, p in step.trainable.items()}
            by_name = dict(zip(step.trainable, step.optimizer.param_groups, strict=True))
            rates = {name: group["lr"] for name, group in by_name.items()}
            decays = {name: group["weight_decay"] for name, group in by_name.items()}
        groups = step.optimizer.param_groups
        rates_used.append([groups[i]["lr"] for i in (0, 1, -1)])  # prompts, image tower, decoder
        norms.append(float(step.update()))
        if index == 0:
            clipped = float(step.prompt_tokens.grad.norm())
            after_first = {name: p.detach().clone() for name, p in step.trainable.items()}
        distances.append(teacher_distance(step))
        prompt_norms.append(float(step.prompt_tokens.detach().norm()))
        runs.append(detached(forward))
    losses = [float(run.loss) for run in runs]
    assignments = [run.hard for run in runs]
    return Trained(runs[0], gradients, rates, decays, after_first, losses, norms, assignments,
                   distances, prompt_norms, rates_used, clipped)  # fmt: skip


def detached(forward):
    """Without its graph."""
    values = {field.name: getattr(forward, field.name) for field in fields(forward)}
    values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
    return type(forward)(**values)


@torch.no_grad()
def teacher_distance(step) -> float:
    pairs = zip(step.teacher.parameters(), step.student.parameters(), strict=True)
    return float(sum(((t - s).double() ** 2).sum() for t, s in pairs) ** 0.5)


@pytest.fixture(scope="module", params=["vit", "convnext"])
def reference(request, shared_dir) -> Reference:
    return load_reference(shared_dir / "reference", request.param)


@pytest.fixture(scope="module")
def trained(authors_step, reference) -> Trained:
    return train(authors_step, reference)


@pytest.fixture(scope="module", params=TEMPERATURE)
def computed(request, authors_step, shared_dir):
    """Reference, case and our forward pass of each stored batch."""
    model, _, case = request.param.partition("-")
    reference = load_reference(shared_dir / "reference", model)
    if case == "a":
        return reference, case, train(authors_step, reference).forward
    batch, step = read_batch(reference, case), build(authors_step, reference, case)
    with torch.no_grad():
        return reference, case, step.forward(batch.weak, batch.strong, batch.masks)


def unpacked(packed: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)).bool()


@pytest.mark.parametrize("name", VALUES)
def test_forward_values_are_the_authors(computed, name):
    reference, case, forward = computed
    key, stride, tolerance = VALUES[name]
    ours = getattr(forward, name)
    ours = ours[..., ::stride, ::stride] if stride > 1 else ours
    torch.testing.assert_close(ours, reference[f"{case}/{key}"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_the_authors(computed, name):
    reference, case, forward = computed
    key, tolerance = FEATURES[name]
    stored, ours = reference[f"{case}/{key}"], getattr(forward, name)
    if ours.ndim == 4:  # [B, h, w, D]
        ours = ours[:, :: ours.shape[1] // stored.shape[1], :: ours.shape[2] // stored.shape[2]]
    assert float((ours - stored).norm() / stored.norm()) < tolerance


def test_masks_assignments_and_targets_are_the_authors(computed):
    reference, case, forward = computed
    kept = [count for count in forward.masks_kept if count]
    assert kept == reference[f"{case}/num_kept_masks_nonempty_images"]
    assert torch.equal(forward.hard, reference[f"{case}/hard_assign"])
    assert torch.equal(forward.targets.bool(), unpacked(reference[f"{case}/target_packed"]))
    assert torch.equal(forward.valid, unpacked(reference[f"{case}/valid_packed"]))
    assert int(forward.valid.sum()) == reference[f"{case}/valid_count"]


def test_trainable_parameters_rates_and_decays_are_the_authors(reference, trained):
    ours = [[name, rate, trained.decays[name]] for name, rate in trained.rates.items()]
    assert [name for name, _, _ in ours] == reference["opt/requires_grad"]
    for mine, theirs in zip(ours, reference["opt/groups"], strict=True):
        assert mine == [theirs[0], pytest.approx(theirs[1]), theirs[2]]


def test_gradients_are_the_authors(reference, trained):
    keys = [key for key in reference.values if key.startswith("a/grad/")]
    assert keys
    for key in keys:
        name = key.removeprefix("a/grad/")
        error = (trained.gradients[name] - reference[key]).norm() / reference[key].norm()
        assert float(error) < (1e-3 if name == "prompt_tokens" else 5e-4), name


def test_gradient_norms_are_the_authors(reference, trained):
    for name, gradient in trained.gradients.items():
        stored = reference[f"a/grad_norm/{name}"]
        assert float(gradient.norm()) == pytest.approx(stored, rel=1e-3), name


def test_parameters_after_one_step_are_the_authors(reference, trained):
    keys = [key for key in reference.values if key.startswith("a/step1/")]
    assert keys
    for key in keys:
        name = key.removeprefix("a/step1/")
        ours = trained.after_first[name]
        ours = ours if len(ours) == len(reference[key]) else ours[::4]  # large ones are thinned
        # Clipped gradients are as small as Adam's eps, so a step shows their rounding.
        error = (ours - reference[key]).abs() / trained.rates[name]
        assert float(error.max()) < 0.2, name
        assert float(error.mean()) < 0.02, name


def test_three_steps_are_the_authors(reference, trained):
    np.testing.assert_allclose(trained.losses[0], reference["traj/loss"][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(trained.losses, reference["traj/loss"], rtol=0, atol=1e-5)
    for step in (1, 2):
        assert torch.equal(trained.assignments[step], reference[f"traj/hard_assign/{step}"])
    # One momentum update more or less changes the distance by 5e-4.
    stored = reference["traj/teacher_student_l2_after"]
    np.testing.assert_allclose(trained.distances, stored, rtol=1e-4)


def test_rates_and_prompts_of_three_steps_are_the_authors(authors_step, shared_dir):
    reference = load_reference(shared_dir / "reference", "vit")
    trained = train(authors_step, reference)
    np.testing.assert_allclose(
        trained.rates_used, reference["traj/lr_prompt_clip_head"], rtol=1e-10
    )
    np.testing.assert_allclose(trained.prompt_norms, reference["traj/prompt_norm_after"], rtol=1e-6)


def test_norms_before_and_after_clipping_are_the_authors(reference, trained):
    if reference.model == "convnext":
        assert trained.norms[0] == pytest.approx(reference["a/total_grad_norm"], rel=1e-3)
        return
    np.testing.assert_allclose(trained.norms, reference["traj/grad_norm_before_clip"], rtol=1e-3)
    stored = reference["a/clipped_grad/prompt_tokens_norm"]
    assert trained.clipped_prompt_norm == pytest.approx(stored, rel=1e-3)


def test_rate_schedule_is_the_authors(authors_step, shared_dir):
    reference = load_reference(shared_dir / "reference", "vit")
    for step, multiplier in reference["opt/lr_multiplier"].items():
        assert authors_step.rate_multiplier(int(step)) == pytest.approx(multiplier, abs=1e-12)
