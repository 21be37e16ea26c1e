"""The random views of a batch by which test-time adaptation judges how sure a classifier is; pure, torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from folklora.domain import filters

_NOISE = 0.005


def augmented(images: Tensor, generator: torch.Generator, mirrored: bool = True) -> Tensor:
    """A random view of each image: colour jitter and gamma, a small affine map, blur, a flip, noise.

    The recipe and its ranges are CoTTA's and ViDA's: brightness 0.6-1.4, contrast 0.7-1.3, saturation 0.5-1.5, hue
    ±0.06 of a turn, gamma 0.7-1.3; rotation ±15°, shift 1/16 of the side, scale 0.9-1.1, the border repeated; Gaussian
    blur up to 0.5 pixels; half of the images mirrored; noise of 0.005. Here every image has its own draw, where the
    authors draw once a batch, and the changes of colour come in one order. Images that have not three channels keep
    their hue and saturation.

    Args:
        images: [N, C, H, W] in [0, 1].
        generator: Where the draws come from, on the CPU.
        mirrored: Whether half of the images are mirrored; False for what a mirror makes something else, such as digits.

    Returns:
        The same shape, in [0, 1].
    """

    def draw(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(images), generator=generator)).to(images)

    x = _jittered(images.clamp(0, 1), draw(0.6, 1.4), draw(0.7, 1.3), draw(0.5, 1.5), draw(-0.06, 0.06))
    x = x ** draw(0.7, 1.3).view(-1, 1, 1, 1)
    side = min(images.shape[-2:])
    shift = torch.stack([draw(-side / 16, side / 16), draw(-side / 16, side / 16)], dim=-1)
    x = filters.affine(x, _similarity(draw(-15, 15), draw(0.9, 1.1), shift))
    x = filters.gaussian_blur(x, draw(0.001, 0.5))
    if mirrored:
        x = torch.where((draw(0, 1) < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return (x + _NOISE * noise).clamp(0, 1)


def _jittered(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Each image's brightness, contrast and saturation times a factor, its colours turned by a part of a circle."""
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in (brightness, contrast, saturation))
    x = (x * brightness).clamp(0, 1)
    mean = filters.gray(x).mean((2, 3), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 1)
    if x.shape[1] != 3:
        return x
    value = filters.gray(x)
    x = (value + (x - value) * saturation).clamp(0, 1)
    return torch.einsum("ndc,nchw->ndhw", _hue_turn(hue), x).clamp(0, 1)


def _hue_turn(share: Tensor) -> Tensor:
    """Rotations of the colours about the axis of grays, [N, 3, 3]."""
    angle = (2 * math.pi * share).view(-1, 1, 1)
    axis = torch.full((3, 3), 1 / 3, dtype=share.dtype, device=share.device)
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=share.dtype, device=share.device) / math.sqrt(3)
    return axis + angle.cos() * (torch.eye(3).to(share) - axis) + angle.sin() * cross


def _similarity(degrees: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Where the pixels of an image that is turned, enlarged and shifted are read, [N, 2, 3]."""
    turn = torch.deg2rad(degrees)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    turned = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return torch.cat([turned, -turned @ shift[:, :, None]], dim=-1)
