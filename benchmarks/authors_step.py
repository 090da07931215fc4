"""The authors' training step, rendered plainly: what `train_step.py` measures ours against.

It computes what behaviour.md items 2-5, 6e and 9-16 say, in the obvious way and with their waste:
the text encoder over all 77 tokens, three projections in the last block of which one is used,
features and masks at 256 x 256 pixels, gathered copies of predictions and targets. Nothing is made
slower than a straightforward PyTorch program would be. `tests/test_authors_step.py` holds it to
their numbers.

It knows nothing of `pixelclip.training`. From the package come open_clip's towers with weights in
them; the `Backbone` that is handed in is trained in place.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from pixelclip.backbones import Backbone

MASK_SIDE = 256
MOMENTUM = 0.999
SINKHORN_ITERATIONS = 3
TEMPLATE = "A photo of a {} in the scene"
PLACEHOLDER = "{}"

STEPS = 10_000
BASE_RATE = 2e-4
RATE_FACTORS = {"prompt_tokens": 10.0, "clip": 0.01, "head": 1.0}
WEIGHT_DECAY = 1e-4
GRADIENT_NORM = 0.01

Photos = Sequence[UInt8[Tensor, "3 _ _"]]
Masks = Sequence[Bool[Tensor, "_ _ _"]]


class DoubleConv(nn.Module):
    """Twice a 3 x 3 convolution, GroupNorm with 16 channels per group, ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(channels // 16, channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(channels // 16, channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, maps: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """Maps of the same shape."""
        return self.double_conv(maps)


class Decoder(nn.Module):
    """One cosine map to mask logits at four times its size (behaviour.md 15b)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 64, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(64, 64, 2, stride=2)
        self.conv1 = DoubleConv(64)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.conv2 = DoubleConv(32)
        self.proj = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, maps: Float[Tensor, "N 1 h w"]) -> Float[Tensor, "N 1 4h 4w"]:
        """Mask logits of every map on its own."""
        hidden = self.conv1(self.up1(self.conv0(maps)))
        return self.proj(self.conv2(self.up2(hidden)))


@dataclass(frozen=True, eq=False)
class Forward:
    """Everything that one forward pass computes; masks in the order of the photos."""

    student_features: Float[Tensor, "B h w D"]
    teacher_features: Float[Tensor, "B h w D"]
    cluster_features: Float[Tensor, "K D"]
    mask_features: Float[Tensor, "N D"]
    masks_kept: list[int]
    logits: Float[Tensor, "N K"]
    soft: Float[Tensor, "N K"]
    hard: Int[Tensor, " N"]
    targets: Float[Tensor, "B K 256 256"]
    valid: Bool[Tensor, "B 256 256"]
    cost_volume: Float[Tensor, "B K h w"]
    decoded: Float[Tensor, "B K 4h 4w"]
    prediction: Float[Tensor, "B K 256 256"]
    loss: Float[Tensor, ""]


class AuthorsStep:
    """Student, teacher, prompts, decoder and optimiser; `step` is one training step.

    Attributes:
        student: open_clip's image tower of the given backbone.
        teacher: its momentum copy.
        text: the frozen text encoder.
        prompt_tokens: learnable token embeddings [K, L, E].
        decoder: see `Decoder`.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt_tokens: Float[Tensor, "K L E"],
        head_state: Mapping[str, Tensor] | None = None,
        *,
        temperature: float = 100.0,
        clip_resolution: int = 320,
    ):
        self.temperature = temperature
        self.clip_resolution = clip_resolution
        self.mean = torch.tensor(backbone.card.mean).view(3, 1, 1) * 255
        self.std = torch.tensor(backbone.card.std).view(3, 1, 1) * 255
        backbone.train()  # the teacher as well, drop path included (behaviour.md 7d)
        self.text = backbone.text
        self.student: VisionTransformer | TimmModel = backbone.visual.tower
        self.teacher = copy.deepcopy(self.student)
        self.prompt_tokens = nn.Parameter(prompt_tokens.clone())
        self.decoder = Decoder()
        if head_state is not None:
            self.decoder.load_state_dict(dict(head_state))
        self.template = prompt_template(backbone, num_tokens=prompt_tokens.shape[1])
        for parameter in trainable_visual(self.student):
            parameter.requires_grad_(True)
        self.trainable = dict(self._trainable())
        self.optimizer = self._make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate_multiplier)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters under the names of the reference file."""
        yield "prompt_tokens", self.prompt_tokens
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                yield f"clip.visual.{name}", parameter
        for name, parameter in self.decoder.named_parameters():
            yield f"head.{name}", parameter

    def _make_optimizer(self) -> torch.optim.AdamW:
        """AdamW with one group per parameter (behaviour.md 16b)."""
        without_decay = norm_parameters(self.student) | norm_parameters(self.decoder)
        groups = [
            {
                "params": [parameter],
                "lr": BASE_RATE * RATE_FACTORS[name.partition(".")[0]],
                "weight_decay": 0.0 if id(parameter) in without_decay else WEIGHT_DECAY,
            }
            for name, parameter in self.trainable.items()
        ]
        return torch.optim.AdamW(groups, lr=BASE_RATE)

    def step(self, weak: Photos, strong: Photos | None, masks: Masks) -> Float[Tensor, ""]:
        """Loss of the batch before its update (behaviour.md 16e)."""
        loss = self.forward(weak, strong, masks).loss
        self.backward(loss)
        self.update()
        return loss.detach()

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Set the gradients of all trainable parameters."""
        self.optimizer.zero_grad()
        loss.backward()

    def update(self) -> Float[Tensor, ""]:
        """Clip, step the optimiser and then the schedule; the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(list(self.trainable.values()), GRADIENT_NORM)
        self.optimizer.step()
        self.scheduler.step()
        return norm

    def forward(self, weak: Photos, strong: Photos | None, masks: Masks) -> Forward:
        """One forward pass, which also moves the teacher.

        Args:
            weak: photos, RGB; the teacher sees these.
            strong: the same photos as the student sees them; None for the weak ones.
            masks: of each photo, at the photo's own size.
        """
        student_input = self.network_input(weak if strong is None else strong)
        teacher_input = self.network_input(weak)
        clusters = self.encode_prompts()
        student = self.encode_student(student_input)
        self.update_teacher()
        teacher = self.encode_teacher(teacher_input)
        pooled, kept = self.pool_masks(teacher, masks)
        logits = self.compare(pooled, clusters)
        soft = self.balance(logits)
        hard = soft.argmax(dim=1)
        targets = self.merge_targets(kept, hard, len(clusters))
        valid = targets.sum(dim=1) > 0
        cost_volume = self.correlate(student, clusters)
        decoded = self.decode(cost_volume)
        prediction = F.interpolate(
            decoded, (MASK_SIDE, MASK_SIDE), mode="bilinear", align_corners=False
        )
        return Forward(
            student, teacher, clusters, pooled, [len(each) for each in kept], logits, soft, hard,
            targets, valid, cost_volume, decoded, prediction,
            loss=self.compute_loss(prediction, targets, valid),
        )  # fmt: skip

    def network_input(self, photos: Photos) -> Float[Tensor, "B 3 S S"]:
        """Normalised, zero-padded to the largest, squashed to a square (behaviour.md 9)."""
        normalised = [(photo - self.mean) / self.std for photo in photos]
        height = max(photo.shape[1] for photo in photos)
        width = max(photo.shape[2] for photo in photos)
        padded = torch.stack(
            [F.pad(photo, (0, width - photo.shape[2], 0, height - photo.shape[1]))
             for photo in normalised]
        )  # fmt: skip
        square = (self.clip_resolution, self.clip_resolution)
        return F.interpolate(padded, square, mode="bilinear", align_corners=False)

    def encode_prompts(self) -> Float[Tensor, "K D"]:
        """Feature of every learnable class, from all 77 positions (behaviour.md 6e)."""
        text = self.text
        embeddings = text.token_embedding(self.template).repeat(len(self.prompt_tokens), 1, 1)
        embeddings[:, self.template == text.tokenizer.encode(PLACEHOLDER)[0]] = self.prompt_tokens
        hidden = embeddings + text.positional_embedding
        hidden = text.ln_final(text.transformer(hidden, attn_mask=text.attn_mask))
        return hidden[:, self.template.argmax()] @ text.text_projection

    def encode_student(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B h w D"]:
        """Dense features, not normalised."""
        return encode(self.student, images)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move every visual parameter, frozen ones included, one by one (behaviour.md 10)."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.data = teacher.data * MOMENTUM + student.data * (1 - MOMENTUM)

    @torch.no_grad()
    def encode_teacher(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B h w D"]:
        """Dense features, not normalised."""
        return encode(self.teacher, images)

    def pool_masks(
        self, features: Float[Tensor, "B h w D"], masks: Masks
    ) -> tuple[Float[Tensor, "N D"], list[Float[Tensor, "_ 256 256"]]]:
        """Mean feature under each mask, and the masks of each photo (behaviour.md 11)."""
        size = (MASK_SIDE, MASK_SIDE)
        maps = features.permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        pooled, kept = [], []
        for photo_map, photo_masks in zip(maps, masks, strict=True):
            resized = photo_masks.new_zeros(0, *size, dtype=torch.float32)
            if len(photo_masks):
                resized = F.interpolate(photo_masks[:, None].float(), size, mode="nearest")[:, 0]
            areas = resized.sum(dim=(1, 2))
            resized, areas = resized[areas > 1], areas[areas > 1]
            kept.append(resized)
            if len(resized):
                sums = torch.einsum("dhw,mhw->md", photo_map, resized)
                pooled.append(sums / areas[:, None])
        return torch.cat(pooled), kept

    def compare(
        self, pooled: Float[Tensor, "N D"], clusters: Float[Tensor, "K D"]
    ) -> Float[Tensor, "N K"]:
        """Scaled cosines, with a graph that nothing uses (behaviour.md 12g)."""
        cosines = F.normalize(pooled, dim=1) @ F.normalize(clusters, dim=1).T
        return self.temperature * cosines

    @torch.no_grad()
    def balance(self, logits: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """Softmax over clusters, then Sinkhorn; rows sum to 1 (behaviour.md 12b)."""
        num_masks, num_clusters = logits.shape
        shares = logits.softmax(dim=1).T
        shares = shares / shares.sum()
        for _ in range(SINKHORN_ITERATIONS):
            shares = shares / shares.sum(dim=1, keepdim=True) / num_clusters
            shares = shares / shares.sum(dim=0, keepdim=True) / num_masks
        return (shares * num_masks).T

    def merge_targets(
        self,
        masks: Sequence[Float[Tensor, "_ 256 256"]],
        hard: Int[Tensor, " N"],
        num_clusters: int,
    ) -> Float[Tensor, "B K 256 256"]:
        """1 where a mask of that cluster lies; added twice, as they do (behaviour.md 14)."""
        targets = torch.zeros(len(masks), num_clusters, MASK_SIDE, MASK_SIDE)
        counts = torch.tensor([len(each) for each in masks])
        photo = torch.arange(len(masks)).repeat_interleave(counts)
        every_mask = torch.cat(list(masks))
        targets[photo, hard] += every_mask
        targets.index_put_((photo, hard), every_mask, accumulate=True)
        return targets.clamp(0, 1)

    def correlate(
        self, features: Float[Tensor, "B h w D"], clusters: Float[Tensor, "K D"]
    ) -> Float[Tensor, "B K h w"]:
        """Cosine of every cell with every cluster (behaviour.md 15a)."""
        features, clusters = F.normalize(features, dim=-1), F.normalize(clusters, dim=-1)
        return torch.einsum("bhwd,kd->bkhw", features, clusters)

    def decode(self, cost_volume: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K 4h 4w"]:
        """Mask logits; each of the B * K maps goes through the decoder on its own."""
        maps = cost_volume.flatten(0, 1)[:, None]
        return self.decoder(maps)[:, 0].unflatten(0, cost_volume.shape[:2])

    def compute_loss(
        self,
        prediction: Float[Tensor, "B K 256 256"],
        targets: Float[Tensor, "B K 256 256"],
        valid: Bool[Tensor, "B 256 256"],
    ) -> Float[Tensor, ""]:
        """Binary cross-entropy over covered pixels, which are gathered (behaviour.md 15c)."""
        logits, truth = (maps.permute(0, 2, 3, 1)[valid] for maps in (prediction, targets))
        return F.binary_cross_entropy_with_logits(logits, truth)


def encode(
    tower: VisionTransformer | TimmModel, images: Float[Tensor, "B 3 S S"]
) -> Float[Tensor, "B h w D"]:
    """Dense features of either tower, not normalised."""
    return encode_vit(tower, images) if is_vit(tower) else encode_convnext(tower, images)


def encode_vit(
    tower: VisionTransformer, images: Float[Tensor, "B 3 S S"]
) -> Float[Tensor, "B h w D"]:
    """Dense features; the class token goes along to the end (behaviour.md 1-5)."""
    patches = tower.conv1(images)
    side = patches.shape[-1]
    patches = patches.flatten(2).transpose(1, 2)  # [B, hw, C]
    start = tower.class_embedding.expand(len(patches), 1, -1)
    hidden = torch.cat([start, patches], dim=1)
    hidden = tower.ln_pre(hidden + resized_positions(tower.positional_embedding, side))
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        hidden = block(hidden)
    hidden = tower.ln_post(last_block(last, hidden)) @ tower.proj
    return hidden[:, 1:].unflatten(1, (side, side))


def resized_positions(table: Float[Tensor, "_ C"], side: int) -> Float[Tensor, "_ C"]:
    """Position embedding for that many patches a side, resized bicubically (behaviour.md 5)."""
    stored = math.isqrt(len(table) - 1)
    if stored == side:
        return table
    grid = table[1:].unflatten(0, (stored, stored)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid[0].permute(1, 2, 0).flatten(0, 1)])


def last_block(
    block: ResidualAttentionBlock, tokens: Float[Tensor, "B L C"]
) -> Float[Tensor, "B L C"]:
    """Values and the class token's residual; query and key are thrown away (behaviour.md 2-3)."""
    attention = block.attn
    parts = F.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    parts = torch.cat(parts.chunk(3, dim=-1))  # [3B, L, C]
    parts = F.linear(parts, attention.out_proj.weight, attention.out_proj.bias)
    _, _, values = parts.chunk(3)
    hidden = values + tokens[:, :1]
    return hidden + block.mlp(block.ln_2(hidden))


def encode_convnext(tower: TimmModel, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B h w D"]:
    """Dense features: norm and projection at every position (behaviour.md 7a)."""
    maps = tower.trunk.head.norm(tower.trunk.forward_features(images))
    return tower.head(maps.permute(0, 2, 3, 1))


def is_vit(tower: nn.Module) -> bool:
    """Whether this is open_clip's ViT and not its wrapper of timm's ConvNeXt."""
    return isinstance(tower, VisionTransformer)


def trainable_visual(tower: nn.Module) -> list[nn.Parameter]:
    """Attention and positions of a ViT, everything of a ConvNeXt (behaviour.md 16a)."""
    return [
        parameter
        for name, parameter in tower.named_parameters()
        if not is_vit(tower) or "attn" in name or name == "positional_embedding"
    ]


def norm_parameters(module: nn.Module) -> set[int]:
    """Identities of the parameters of LayerNorm and GroupNorm, which do not decay."""
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm | nn.GroupNorm)]
    return {id(parameter) for norm in norms for parameter in norm.parameters()}


def prompt_template(backbone: Backbone, num_tokens: int) -> Int[Tensor, " 77"]:
    """Token ids of the prompt with that many placeholders, padded to the context length."""
    placeholders = " ".join([PLACEHOLDER] * num_tokens)
    return backbone.text.tokenizer([TEMPLATE.format(placeholders)])[0]


def rate_multiplier(step: int) -> float:
    """From 1 to 0.5 along half a cosine (behaviour.md 16d)."""
    return 0.5 + 0.25 * (1 + math.cos(math.pi * step / STEPS))
