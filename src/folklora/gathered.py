"""Products of few rows with matrices that each row chooses, which are read where they lie (Triton on a GPU).

    y_n = Σ_j W_{e(n, j)} x_{n, j}

One token of a model with experts needs a few of its matrices. To pick them out by indexing copies them first, which
costs more than to multiply with all. That plain form is the fallback, and what the tests compare with.
Imports torch, and Triton where it is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_OUT, _IN = 8, 512


def products(x: Tensor, W: Tensor, chosen: Tensor) -> Tensor:
    """y_n = Σ_j W[chosen[n, j]] x[(n terms + j) // m], where each row of x serves m products in turn.

    Args:
        x: [rows × terms / m, in].
        W: [matrices, out, in], of x's dtype; any strides, so it may be a view.
        chosen: [rows, terms], numbers of matrices.

    Returns:
        y [rows, out] in x's dtype, summed in float32 or more.
    """
    if fits(x, W):
        return _in_place(x, W, chosen)
    rows = x.repeat_interleave(chosen.numel() // len(x), dim=0).view(*chosen.shape, -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.einsum("nji,njoi->no", rows.to(wide), W[chosen].to(wide)).to(x.dtype)


def fits(x: Tensor, W: Tensor) -> bool:
    """Whether the matrices are read where they lie."""
    plain = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return triton is not None and plain and W.dtype == x.dtype and W.stride(2) == 1


def _in_place(x: Tensor, W: Tensor, chosen: Tensor) -> Tensor:
    (rows, terms), (_, out, width) = chosen.shape, W.shape
    x, chosen = x.contiguous(), chosen.contiguous()
    y = torch.empty(rows, out, device=x.device, dtype=x.dtype)
    with torch.cuda.device(x.device):
        _kernel[(rows, triton.cdiv(out, _OUT))](
            x, W, chosen, y, out, width, W.stride(0), W.stride(1), chosen.numel() // len(x), terms, _OUT, _IN,
            num_warps=4,
        )  # fmt: skip
    return y


if triton is not None:

    @triton.jit
    def _kernel(
        x, w, chosen, y, out, width, to_matrix, to_row, shared,
        TERMS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    ):  # fmt: skip
        """A few values of one row of y."""
        n = tl.program_id(0)
        row = tl.program_id(1) * OUT + tl.arange(0, OUT)
        exists = row < out
        total = tl.zeros((OUT, IN), dtype=tl.float32)
        for j in range(TERMS):
            number = n * TERMS + j
            matrix = w + tl.load(chosen + number).to(tl.int64) * to_matrix + row.to(tl.int64)[:, None] * to_row
            values = x + (number // shared).to(tl.int64) * width
            for start in range(0, width, IN):
                column = start + tl.arange(0, IN)
                inside = column < width
                part = tl.load(matrix + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
                value = tl.load(values + column, mask=inside, other=0.0)
                total += part.to(tl.float32) * value.to(tl.float32)[None, :]
        tl.store(y + n.to(tl.int64) * out + row, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=exists)
