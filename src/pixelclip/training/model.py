"""The method: a student, its momentum teacher, class prompts and the mask decoder."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from pixelclip.backbones import Backbone, Text
from pixelclip.config import TrainConfig
from pixelclip.errors import ConfigError
from pixelclip.training.batch import Batch, framed
from pixelclip.training.clustering import ASSIGNERS, mask_pool, merge, shrink
from pixelclip.training.decoder import UPSCALE, MaskDecoder, decoded_loss
from pixelclip.training.parameters import choose_parameters
from pixelclip.training.prompts import draw_words, make_vectors


@dataclass(frozen=True)
class Pooled:
    """Kept masks of a batch and the teacher's mean feature under each.

    Attributes:
        features: not normalised.
        masks: those of more than one pixel, photos in order.
        photos: photo that each mask belongs to.
    """

    features: Float[Tensor, "N D"]
    masks: Bool[Tensor, "N m m"]
    photos: Int[Tensor, " N"]


@dataclass(frozen=True)
class Assignment:
    """Which cluster each mask of a step belongs to."""

    similarity: Float[Tensor, "N K"]
    soft: Float[Tensor, "N K"]
    hard: Int[Tensor, " N"]


@dataclass(frozen=True)
class Targets:
    """What the student shall predict for a batch, on the decoder's grid.

    Attributes:
        present: photos of the batch that have a mask; the others take no part.
        vectors: what features are compared with, where maps have vectors of their own.
        maps: 0/1 targets after `shrink`; without `vectors`, K for each present photo.
        photos: index into `present` for each map.
        valid: pixels of each present photo that some mask covers.
        terms: number of pixels times maps that the loss is the mean over.
    """

    present: Int[Tensor, " P"]
    vectors: Float[Tensor, "N D"] | None
    maps: Float[Tensor, "N H W"]
    photos: Int[Tensor, " N"]
    valid: Bool[Tensor, "P m m"]
    terms: int


class PixelClip(nn.Module):
    """Everything a training step computes; `step.train_step` says in which order.

    Attributes:
        visual: the student, whose weights are the result.
        teacher: moving average of the student, always in evaluation mode.
        vectors: learnable class prompts, fixed words or free vectors.
        decoder: similarity maps to masks.
        text: frozen.
        past: teacher features of the masks of the last steps, for the assigner `queue`.
    """

    def __init__(self, backbone: Backbone, config: TrainConfig):
        super().__init__()
        self.config = config
        self.input_size = _input_size(config.input_size, backbone)
        self.dim = backbone.dim
        self.cells = self.input_size // backbone.stride
        self.visual, self.text = backbone.visual, backbone.text
        self.trained = choose_parameters(self.visual, config.finetune)
        self.teacher = _share_frozen(copy.deepcopy(self.visual).requires_grad_(False), self.visual)
        generator = torch.Generator().manual_seed(config.seed)
        # The authors draw the prompts first: with seed 0 the decoder gets their initial weights.
        draw_words(cast(Text, self.text), config.num_clusters, config.prompt_length, generator)
        self.vectors = make_vectors(backbone, config, generator)
        if config.assigner == "none":  # unused weights would keep several processes waiting
            self.vectors.requires_grad_(False)
        self.decoder = MaskDecoder(generator)
        self.past: list[Tensor] = []
        self.train()

    def train(self, mode: bool = True) -> "PixelClip":
        """Only the student's drop path knows a training mode; BatchNorm keeps its statistics."""
        super().train(False)
        self.training = mode
        for module in drop_paths(self.visual):
            module.train(mode and self.config.drop_path)
        for module in drop_paths(self.teacher):
            module.train(mode and self.config.authors_defects)  # behaviour.md 7d
        return self

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Teacher = momentum teacher + (1 - momentum) student, trained weights; buffers are copied.

        Comes once per step before the teacher is asked, so that targets are made by a teacher that
        includes the student as of before this step (behaviour.md 10).
        """
        averaged, current = (
            [weights[name].detach() for name in self.trained]
            for weights in map(
                dict, (self.teacher.named_parameters(), self.visual.named_parameters())
            )
        )
        torch._foreach_mul_(averaged, self.config.momentum)
        torch._foreach_add_(averaged, current, alpha=1 - self.config.momentum)
        for ours, theirs in zip(self.teacher.buffers(), self.visual.buffers(), strict=True):
            ours.copy_(theirs)

    @torch.no_grad()
    def pool(self, batch: Batch) -> Pooled:
        """Teacher features under the masks of a batch; masks of at most one pixel are dropped."""
        device = batch.weak.device
        counts = torch.tensor([len(masks) for masks in batch.masks])
        photos = torch.arange(len(counts)).repeat_interleave(counts).to(device)
        masks = torch.cat(batch.masks)
        kept = masks.sum(dim=(1, 2)) > 1
        masks, photos = masks[kept], photos[kept]
        if not len(photos):
            return Pooled(torch.zeros(0, self.dim, device=device), masks, photos)
        present, rows = photos.unique(return_inverse=True)
        features = self.teacher(self.network_input(batch.weak[present], batch.sizes[present]))
        with torch.autocast(features.device.type, enabled=False):
            means = mask_pool(features.float(), masks, rows)
        return Pooled(means, masks, photos)

    @torch.no_grad()
    def assign(self, features: Float[Tensor, "N D"], vectors: Float[Tensor, "K D"]) -> Assignment:
        """Cluster of every mask of a step, over all processes (behaviour.md 12)."""
        with torch.autocast(features.device.type, enabled=False):
            centres = F.normalize(vectors.float(), dim=1)
            similarity = F.normalize(features, dim=1) @ centres.T
            past = F.normalize(torch.cat([features[:0], *self.past]), dim=1) @ centres.T
            temperature = self.config.temperature
            soft = ASSIGNERS[self.config.assigner](temperature * similarity, temperature * past)
        if self.config.assigner == "queue":
            self.past = [*self.past, features][-self.config.queue_steps :]
        return Assignment(similarity, soft, soft.argmax(dim=1))

    @torch.no_grad()
    def targets(self, pooled: Pooled, clusters: Int[Tensor, " N"] | None) -> Targets:
        """Masks merged by cluster (behaviour.md 14); each its own without clusters."""
        present, photos = pooled.photos.unique(return_inverse=True)
        size = pooled.masks.shape[-1]
        covered = torch.zeros((len(present), size, size), device=photos.device)
        valid = covered.index_add_(0, photos, pooled.masks.float()) > 0
        grid = (UPSCALE * self.cells, UPSCALE * self.cells)
        pixels = valid.sum(dim=(1, 2))
        if clusters is None:
            maps = shrink(pooled.masks.float(), grid)
            terms = int(pixels[photos].sum())
            return Targets(present, pooled.features, maps, photos, valid, terms)
        num = self.config.num_clusters
        union, used = merge(pooled.masks, photos * num + clusters)
        maps = torch.zeros((len(present) * num, *grid), device=valid.device)
        maps[used] = shrink(union, grid)
        owners = torch.arange(len(present), device=valid.device).repeat_interleave(num)
        return Targets(present, None, maps, owners, valid, int(pixels.sum()) * num)

    def forward(
        self, batch: Batch, targets: Targets, vectors: Float[Tensor, "K D"], seed: int = 0
    ) -> Float[Tensor, ""]:
        """Sum of the loss over `targets.terms` terms (behaviour.md 15).

        Args:
            batch: photos.
            targets: of the same batch.
            vectors: result of `self.vectors(self.text)`, with its graph.
            seed: for drop path.
        """
        if not len(targets.present):
            return self._nothing()
        views = batch.weak if batch.strong is None else batch.strong
        inputs = self.network_input(views[targets.present], batch.sizes[targets.present])
        with self._drop_path(seed):
            features = self.visual(inputs)
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.float(), dim=1)
            if targets.vectors is None:
                centres = F.normalize(vectors.float(), dim=1)
                maps = torch.einsum("bdhw,kd->bkhw", features, centres).flatten(0, 1)
            else:
                own = F.normalize(targets.vectors, dim=1)
                maps = torch.einsum("ndhw,nd->nhw", features[targets.photos], own)
        return decoded_loss(self.decoder, maps, targets.maps, targets.valid, targets.photos)

    def network_input(
        self, views: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]
    ) -> Float[Tensor, "B 3 S S"]:
        """Views in [0, 1], padding in the mean colour, resized to a square (behaviour.md 9)."""
        pixels = framed(views, sizes, cast(Tensor, self.visual.mean))
        size = (self.input_size, self.input_size)
        return F.interpolate(pixels, size, mode="bilinear", align_corners=False)

    def _nothing(self) -> Float[Tensor, ""]:
        """Zero with a zero gradient for every weight, which all processes must have."""
        zero = sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)
        assert isinstance(zero, Tensor)
        return zero

    @contextmanager
    def _drop_path(self, seed: int) -> Iterator[None]:
        """Drop path drawn from a seed of its own; nothing else draws while training."""
        if not any(module.training for module in drop_paths(self.visual)):
            yield
            return
        device = next(self.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


def _input_size(wanted: int | None, backbone: Backbone) -> int:
    """Side of the network's input: as asked for, or the model's own, in whole cells.

    Raises:
        ConfigError: the one asked for is no multiple of the model's stride.
    """
    stride = backbone.stride
    near = max(1, round((wanted or backbone.card.square) / stride)) * stride
    if wanted is not None and near != wanted:
        raise ConfigError(
            f"input_size: {wanted} is not a multiple of the model's stride, {stride}; try {near}"
        )
    return near


def drop_paths(module: nn.Module) -> list[nn.Module]:
    """The layers of a tower that drop residual branches at random."""
    return [m for m in module.modules() if type(m).__name__ == "DropPath"]


def _share_frozen(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """Let both use the same memory for weights that never change."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        if not theirs.requires_grad:
            ours.data = theirs.data
    return teacher
