"""The mask decoder and its loss; both are used in training only (behaviour.md 15)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from pixelclip.training.clustering import upsampling

UPSCALE = 4  # decoder output pixels per feature cell and axis
CPU_CHUNK = 16  # maps at a time: their activations fit the cache (benchmarks/train_step.py)
GPU_CHUNK = 768


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution, GroupNorm with 16 channels a group, ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.GroupNorm(channels // 16, channels),
                nn.ReLU(inplace=True),
            ]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, maps: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """Maps of the same shape."""
        return self.double_conv(maps)


class MaskDecoder(nn.Module):
    """One-channel similarity maps to mask logits at four times the size (behaviour.md 15b).

    Every map goes through on its own. Parameter names are those of the authors' checkpoints.
    """

    def __init__(self, generator: torch.Generator | None = None):
        super().__init__()
        self.conv0 = nn.Conv2d(1, 64, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(64, 64, 2, stride=2)
        self.conv1 = DoubleConv(64)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.conv2 = DoubleConv(32)
        self.proj = nn.Conv2d(32, 1, 3, padding=1)
        if generator is not None:
            self._draw(generator)
        for part in (self.up1, self.conv1, self.up2, self.conv2, self.proj):
            part.to(memory_format=torch.channels_last)  # a third faster on a CPU (speed.md vii)

    def _draw(self, generator: torch.Generator) -> None:
        """PyTorch's default initial values, in construction order, from a generator of ours."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
                if module.bias is not None:
                    fan_in = module.weight[0].numel()
                    nn.init.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5, generator)

    def forward(self, maps: Float[Tensor, "N 1 h w"]) -> Float[Tensor, "N 1 H W"]:
        """Mask logits; H = 4 h, W = 4 w."""
        hidden = maps.contiguous(memory_format=torch.channels_last)
        hidden = self.conv1(self.up1(self.conv0(hidden)))
        return self.proj(self.conv2(self.up2(hidden)))


def decoded_loss(
    decoder: MaskDecoder,
    maps: Float[Tensor, "N h w"],
    targets: Float[Tensor, "N H W"],
    valid: Bool[Tensor, "B m m"],
    photos: Int[Tensor, " N"],
) -> Float[Tensor, ""]:
    """Sum of the binary cross-entropy over all maps and all valid pixels of their photos.

    Equal to up-sampling the decoder's output to m x m and gathering valid pixels; but targets
    enter on the decoder's own grid, as the loss is linear in them (speed.md iv).

    Args:
        decoder: gives logits of H = 4 h, W = 4 w.
        maps: similarities.
        targets: transposed up-sampling of the 0/1 targets: see `shrink`.
        valid: pixels that some mask covers.
        photos: photo that each map belongs to.
    """
    return _DecodedLoss.apply(maps, targets, valid, photos, decoder, *decoder.parameters())


class _DecodedLoss(torch.autograd.Function):
    """Decoder and loss a few maps at a time, each chunk with its backward pass at once.

    A chunk's activations stay in the cache and are gone before the next one, so peak memory is
    that of one chunk, and freed blocks are used again. The gradients wait for the backward call.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        maps: Tensor,
        targets: Tensor,
        valid: Tensor,
        photos: Tensor,
        decoder: MaskDecoder,
        *parameters: Tensor,
    ) -> Tensor:
        total = maps.new_zeros(())
        map_gradients = torch.zeros_like(maps)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        size = valid.shape[-1]
        rows, columns = (upsampling(cells, size, maps.device) for cells in targets.shape[1:])
        chunk = GPU_CHUNK if maps.is_cuda else CPU_CHUNK
        for part in (slice(start, start + chunk) for start in range(0, len(maps), chunk)):
            with torch.enable_grad():
                inputs = maps[part, None].detach().requires_grad_()
                logits = decoder(inputs)
            loss, slope = _loss_and_slope(
                logits.detach()[:, 0].to(maps.dtype),
                targets[part],
                valid[photos[part]],
                (rows, columns),
            )
            total += loss
            found = torch.autograd.grad(logits, (inputs, *parameters), slope[:, None])
            map_gradients[part] = found[0][:, 0]
            torch._foreach_add_(gradients, list(found[1:]))
        ctx.gradients = (map_gradients, gradients)  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:
        map_gradients, gradients = ctx.gradients  # type: ignore[attr-defined]
        return (map_gradients * scale, None, None, None, None, *(g * scale for g in gradients))


def _loss_and_slope(
    logits: Tensor, targets: Tensor, valid: Tensor, upsamplings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and its gradient with respect to the decoder's output."""
    rows, columns = upsamplings
    with torch.autocast(logits.device.type, enabled=False):
        full = rows @ logits @ columns.T  # [N, m, m]
        loss = (F.softplus(full) * valid).sum() - (logits * targets).sum()
        slope = rows.T @ (full.sigmoid_() * valid) @ columns - targets
    return loss, slope
