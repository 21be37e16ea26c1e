"""The fifteen common corruptions of images at five severities, made in code: the streams of test-time adaptation.

    corrupt(images, "gaussian-noise", severity=5, seed=0)

Kinds, order and strengths are those of ImageNet-C and CIFAR-10-C (Hendrycks, Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019, arXiv 1903.12261). Lengths in pixels grow with the
image, so that at the benchmark's own size they are its own. The images are not the benchmark's pixel for pixel: each is
drawn on whole batches with torch alone, frost is grown from noise and not pasted from photographs, clouds come from
noise on finer and finer grids, and glass moves each pixel by itself and does not swap pairs in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from folklora.domain import filters
from folklora.domain.jpeg import jpeg

_Strength = tuple[float, ...]
_SIDES = {"imagenet-c": 224, "cifar-10-c": 32}
# elastic's lengths are given as shares of the side, as in the benchmarks
_STRENGTHS: dict[str, dict[str, tuple[_Strength, ...]]] = {
    "imagenet-c": {
        "gaussian-noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
        "shot-noise": ((60,), (25,), (12,), (5,), (3,)),
        "impulse-noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
        "defocus-blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "glass-blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "motion-blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom-blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
        "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
        "elastic": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
        "jpeg": ((25,), (18,), (15,), (10,), (7,)),
    },
    "cifar-10-c": {
        "gaussian-noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.1,)),
        "shot-noise": ((500,), (250,), (100,), (75,), (50,)),
        "impulse-noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
        "defocus-blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass-blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "motion-blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom-blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
        "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
        "elastic": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
        "jpeg": ((80,), (65,), (58,), (50,), (40,)),
    },
}


def corrupt(
    images: Tensor,
    corruption: str,
    severity: int = 5,
    seed: int = 0,
    like: Literal["imagenet-c", "cifar-10-c"] = "imagenet-c",
) -> Tensor:
    """A corrupted copy of a batch of images; the same for the same seed.

    Args:
        images: [N, C, H, W] in [0, 1], floating point. With one channel, colours are gray.
        corruption: One of `CORRUPTIONS`.
        severity: From 1, mild, to 5.
        seed: Of everything drawn.
        like: Whose strengths: ImageNet-C's or CIFAR-10-C's, which are milder.

    Returns:
        The shape and dtype of `images`, in [0, 1].

    Raises:
        ValueError: There is no such corruption, severity or benchmark, or the images are not [N, C, H, W] in [0, 1].
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"there is no corruption '{corruption}'; there are {', '.join(CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity must be a whole number from 1 to 5, not {severity!r}")
    if like not in _STRENGTHS:
        raise ValueError(f"like must be one of {', '.join(_STRENGTHS)}, not {like!r}")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating point [N, C, H, W], not {images.dtype} {list(images.shape)}")
    if images.numel() and not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError(f"images must be in [0, 1], not from {images.amin():.3g} to {images.amax():.3g}")
    strength = _STRENGTHS[like][corruption][severity - 1]
    pixels = min(images.shape[-2:]) / _SIDES[like]
    generator = torch.Generator().manual_seed(seed)
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    made = CORRUPTIONS[corruption](precise, strength, pixels, generator)
    return made.clamp(0, 1).to(images.dtype)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _gaussian_noise(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    return x + strength[0] * _normal(x, generator)


def _shot_noise(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """Poisson noise of so many photons at full brightness."""
    return torch.poisson((x * strength[0]).cpu(), generator).to(x) / strength[0]


def _impulse_noise(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """A share of the values becomes 0 or 1."""
    chance, side = (torch.rand(x.shape, generator=generator).to(x) for _ in range(2))
    return torch.where(chance < strength[0], (side < 0.5).to(x), x)


def _defocus_blur(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    radius, softness = strength
    return filters.disk_blur(x, radius * pixels, softness)


def _glass_blur(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """Blur, pixels taken from nearby places, blur."""
    sigma, reach, rounds = strength
    x = filters.gaussian_blur(x, sigma * pixels)
    reach = max(1, round(reach * pixels))
    height, width = x.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for _ in range(int(rounds)):
        offset = torch.randint(-reach, reach + 1, (2, len(x), height, width), generator=generator)
        place = (rows + offset[0]).clamp(0, height - 1) * width + (columns + offset[1]).clamp(0, width - 1)
        place = place.flatten(1)[:, None].expand(-1, x.shape[1], -1).to(x.device)
        x = x.flatten(2).gather(2, place).view_as(x)
    return filters.gaussian_blur(x, sigma * pixels)


def _motion_blur(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    length, sigma = strength
    angles = _uniform(-45, 45, (len(x),), generator)
    return filters.motion_blur(x, length * pixels, sigma * pixels, angles)


def _zoom_blur(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """The mean of the image and its enlargements, 1 among them."""
    end, step = strength
    count = math.ceil((end - 1) / step - 1e-9)
    return (x + sum(filters.zoomed(x, 1 + step * k) for k in range(count))) / (count + 1)


def _snow(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """Flakes, smeared as they fall, over an image that is whitened; and the same flakes upside down."""
    mean, spread, zoom, threshold, length, sigma, kept = strength
    flakes = mean + spread * _normal(x[:, :1], generator)
    flakes = filters.zoomed(flakes, zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    angles = _uniform(-135, -45, (len(x),), generator)
    flakes = filters.motion_blur(flakes, length * pixels, sigma * pixels, angles)
    whitened = torch.maximum(x, filters.gray(x) * 1.5 + 0.5)
    return kept * x + (1 - kept) * whitened + flakes + flakes.flip(2, 3)


def _frost(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """Bluish veins over an image that is darkened."""
    kept, amount = strength
    veins = filters.plasma(len(x), x.shape[-2:], 1.6, generator, ridged=True).to(x) ** 2
    tint = torch.tensor([0.85, 0.95, 1.0] if x.shape[1] == 3 else [1.0], dtype=x.dtype, device=x.device)
    return kept * x + amount * veins * tint[:, None, None]


def _fog(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """Clouds added, and the whole darkened so that the brightest place stays as bright as it was."""
    amount, decay = strength
    brightest = x.amax((1, 2, 3), keepdim=True)
    clouds = filters.plasma(len(x), x.shape[-2:], decay, generator).to(x)
    return (x + amount * clouds) * brightest / (brightest + amount)


def _brightness(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """The value of each pixel's hue, saturation and value raised."""
    value = x.amax(1, keepdim=True)
    raised = (value + strength[0]).clamp(max=1)
    # black has no hue, and becomes gray
    return torch.where(value > 0, x / value.clamp_min(1e-12), torch.ones_like(x)) * raised


def _contrast(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * strength[0] + mean


def _elastic(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    """An affine map that moves three points at random, then a smooth random field of displacements."""
    side = min(x.shape[-2:])
    alpha, sigma, reach = (share * side for share in strength)
    third = side / 3
    points = torch.tensor([[third, third, 1], [third, -third, 1], [-third, -third, 1]], dtype=torch.float64)
    moved = points[:, :2] + _uniform(-reach, reach, (len(x), 3, 2), generator).double()
    # each row of the map is found from where the three points go
    matrices = torch.linalg.solve(points.expand(len(x), 3, 3), moved).mT
    x = filters.affine(x, matrices.to(x), border="reflection")
    if alpha == 0:
        return x
    field = filters.gaussian_blur(_uniform(-1, 1, (len(x), 2, *x.shape[-2:]), generator).to(x), sigma)
    return filters.displaced(x, alpha * field.movedim(1, -1), border="reflection")


def _pixelate(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    height, width = x.shape[-2:]
    size = (max(1, int(height * strength[0])), max(1, int(width * strength[0])))
    return F.interpolate(F.interpolate(x, size=size, mode="area"), size=(height, width), mode="nearest-exact")


def _jpeg(x: Tensor, strength: _Strength, pixels: float, generator: torch.Generator) -> Tensor:
    return jpeg(x, int(strength[0]))


CORRUPTIONS: dict[str, Callable[[Tensor, _Strength, float, torch.Generator], Tensor]] = {
    "gaussian-noise": _gaussian_noise,
    "shot-noise": _shot_noise,
    "impulse-noise": _impulse_noise,
    "defocus-blur": _defocus_blur,
    "glass-blur": _glass_blur,
    "motion-blur": _motion_blur,
    "zoom-blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
"""What makes each corruption of (images, strength, pixels a benchmark's pixel, generator), in the usual order."""
