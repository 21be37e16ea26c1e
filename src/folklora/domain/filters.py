"""Filters of image batches [N, C, H, W] that corruptions and augmentations are made of; pure, torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_GRAY = (0.299, 0.587, 0.114)


def gaussian_blur(images: Tensor, sigma: float | Tensor) -> Tensor:
    """Each image convolved with a Gaussian, whose weights beyond the border are left out.

    Args:
        images: [N, C, H, W].
        sigma: Standard deviation in pixels; a number, or one an image [N]. 0 changes nothing.
    """
    sigma = torch.as_tensor(sigma, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
    rows, columns = (_gaussian_matrix(n, sigma).unsqueeze(1) for n in images.shape[-2:])
    return rows @ images @ columns.mT


def _gaussian_matrix(n: int, sigma: Tensor) -> Tensor:
    """Row i holds the weights of pixel i's neighbours, [images or 1, n, n]."""
    place = torch.arange(n, dtype=sigma.dtype, device=sigma.device)
    # far below half a pixel nothing is left of a neighbour, and 0 would divide by 0
    weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma.clamp_min(1e-3) ** 2))
    return weights / weights.sum(-1, keepdim=True)


def disk_blur(images: Tensor, radius: float, softness: float) -> Tensor:
    """The blur of a lens out of focus: convolution with a disk, whose edge is softened by a Gaussian.

    Args:
        images: [N, C, H, W].
        radius: Of the disk, in pixels.
        softness: Standard deviation of the Gaussian, in pixels.
    """
    reach = max(1, math.ceil(radius)) + 1
    place = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    distance = (place[:, None].square() + place.square()).sqrt()
    # a pixel that the edge crosses counts in part, so that radii between whole numbers differ
    disk = (radius + 0.5 - distance).clamp(0, 1)
    kernel = gaussian_blur(disk[None, None], softness)[0, 0]
    return convolved(images, kernel / kernel.sum())


def convolved(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel convolved with one kernel [k, k] of odd size; the border is repeated outwards."""
    reach, channels = kernel.shape[-1] // 2, images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)


def motion_blur(images: Tensor, length: float, sigma: float, angles: Tensor) -> Tensor:
    """Each image smeared along a direction of its own, with weights that fall off as a Gaussian's half.

    Args:
        images: [N, C, H, W].
        length: How many pixels it moves.
        sigma: Standard deviation of the weights, in pixels.
        angles: Direction of each image in degrees, [N].
    """
    steps = torch.arange(math.ceil(length) + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    turn = torch.deg2rad(angles.to(images))
    direction = torch.stack([turn.cos(), turn.sin()], dim=-1)
    moved = (shifted(images, step * direction) * weight for step, weight in zip(steps, weights, strict=True))
    return sum(moved, torch.zeros_like(images))


def shifted(images: Tensor, offset: Tensor) -> Tensor:
    """Each image moved by its offset (x, y) in pixels, [N, 2]; what comes in repeats the border."""
    return displaced(images, offset[:, None, None, :].expand(-1, *images.shape[-2:], 2))


def displaced(images: Tensor, offset: Tensor, border: str = "border") -> Tensor:
    """Each pixel replaced by what is found at an offset (x, y) from it, bilinearly, [N or 1, H, W, 2] in pixels."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=images.dtype, device=images.device),
        torch.arange(width, dtype=images.dtype, device=images.device),
        indexing="ij",
    )
    place = torch.stack([x, y], dim=-1) + offset
    size = torch.tensor([width, height], dtype=images.dtype, device=images.device)
    grid = (2 * place + 1) / size - 1
    grid = grid.expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=border, align_corners=False)


def affine(images: Tensor, matrices: Tensor, border: str = "border") -> Tensor:
    """Each image read through an affine map of pixel places, measured from the centre.

    Args:
        images: [N, C, H, W].
        matrices: From an output pixel's place (x, y, 1) to the input's, [N, 2, 3].
        border: What lies outside, as in `torch.nn.functional.grid_sample`.
    """
    height, width = images.shape[-2:]
    # grid_sample measures each axis in halves of the image
    half = torch.tensor([width / 2, height / 2], dtype=images.dtype, device=images.device)
    scale = torch.cat([half, half.new_ones(1)])
    theta = matrices.to(images) * scale / half[:, None]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=border, align_corners=False)


def zoomed(images: Tensor, factor: float) -> Tensor:
    """The centre of each image, enlarged by `factor` to the whole size."""
    matrix = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]], dtype=images.dtype, device=images.device)
    return affine(images, matrix.expand(len(images), 2, 3))


def plasma(count: int, size: Sequence[int], decay: float, generator: torch.Generator, ridged: bool = False) -> Tensor:
    """Random clouds in [0, 1], [count, 1, H, W]: noise on grids of 2, 4, 8, ... cells, each `decay` times weaker.

    Args:
        count: How many.
        size: (H, W).
        decay: How much weaker each finer grid is.
        generator: Where the draws come from.
        ridged: Fold each grid's noise at its middle, which makes veins of clouds.
    """
    total, weight, cells = torch.zeros(count, 1, *size), 1.0, 2
    while cells <= 2 * max(size):
        grid = torch.rand(count, 1, cells, cells, generator=generator)
        layer = F.interpolate(grid, size=tuple(size), mode="bicubic", align_corners=True)
        total = total + weight * (1 - (2 * layer - 1).abs() if ridged else layer)
        weight, cells = weight / decay, 2 * cells
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low).clamp_min(1e-12)


def gray(images: Tensor) -> Tensor:
    """Brightness [N, 1, H, W]; of images that have not three channels, their mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor(_GRAY, dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)
