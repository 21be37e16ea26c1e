"""What JPEG does to an image: the loss of its quantised cosine transform, without the file."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# annex K of the standard (ITU-T T.81): step sizes of the 8 x 8 frequencies at quality 50
_LUMINANCE = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99
"""
_CHROMINANCE = """
17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99
"""
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Images as they come back from a JPEG file of some quality; colours are kept at half the resolution (4:2:0).

    Args:
        images: [N, C, H, W] in [0, 1]. Three channels are taken for red, green and blue, each of any others for gray.
        quality: From 1 to 100.
    """
    height, width = images.shape[-2:]
    values = F.pad(images.clamp(0, 1) * 255, (0, -width % 16, 0, -height % 16), mode="replicate").round()
    if images.shape[1] == 3:
        turn = torch.tensor(_TO_YCBCR, dtype=images.dtype, device=images.device)
        y, colours = torch.einsum("dc,nchw->ndhw", turn, values).split([1, 2], dim=1)
        # the file holds whole numbers; differences of colours are stored with 128 added, as is y with 128 taken off
        y = _coded(y.round() - 128, _LUMINANCE, quality) + 128
        colours = _coded(F.avg_pool2d(colours, 2).round(), _CHROMINANCE, quality)
        colours = F.interpolate(colours, scale_factor=2, mode="bilinear", align_corners=False)
        values = torch.einsum("cd,ndhw->nchw", torch.linalg.inv(turn), torch.cat([y, colours], dim=1))
    else:
        values = _coded(values - 128, _LUMINANCE, quality) + 128
    return values[..., :height, :width].round().clamp(0, 255) / 255


def _coded(values: Tensor, table: str, quality: int) -> Tensor:
    """Values [N, C, H, W] after their 8 x 8 blocks' frequencies were rounded to multiples of the table's steps."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    steps = torch.tensor([int(step) for step in table.split()], dtype=values.dtype, device=values.device).view(8, 8)
    steps = ((steps * scale + 50) / 100).floor().clamp(1, 255)
    basis = _cosines().to(values)
    blocks = values.unfold(2, 8, 8).unfold(3, 8, 8)
    frequencies = basis @ blocks @ basis.T
    blocks = basis.T @ ((frequencies / steps).round() * steps) @ basis
    return blocks.transpose(3, 4).reshape(values.shape).round()


def _cosines() -> Tensor:
    """The orthonormal cosine transform of 8 values, [frequency, place]."""
    k = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(math.pi / 8 * (k + 0.5) * k[:, None]) / 2
    basis[0] /= math.sqrt(2)
    return basis
