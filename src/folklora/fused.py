"""The two products of a layer's output gradient that a low rank needs, in one pass over it on a GPU (Triton).

    gz = g B  [positions, r]        gB = gᵀ z  [out, r]

Each reads g [positions, out], by far the largest of the three, and both are bound by memory. The plain form is
`products`' own fallback, and what the tests compare with. `sum_of_products` is two products in one accumulator.
Compilers take both as they are. Imports torch, and Triton where it is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# the narrowest that the tensor cores multiply; above it the partial sums that are written outweigh what is saved
_WIDEST = 16
# below these sizes two plain products are as fast, as measured on an H100
_LEAST_OUT, _LEAST_ROWS = 1024, 4096
_ROWS, _COLUMNS, _PARTS = 256, 128, 4


def products(g: Tensor, B: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """gz = g B and gB = gᵀ z.

    Args:
        g: [positions, out], the gradient of a layer's output.
        B: [out, r], in g's dtype.
        z: [positions, r], in g's dtype.

    Returns:
        gz [positions, r] in g's dtype; gB [out, r] in g's dtype, or in float32 where it was summed in one pass or a
        compiler calls.
    """
    if torch.compiler.is_compiling() and g.is_cuda:
        return _opaque_products(g, B, z)
    if _fits(g, B, z):
        return _one_pass(g, B, z)
    return g @ B, g.T @ z


def _fits(g: Tensor, B: Tensor, z: Tensor) -> bool:
    if triton is None or not g.is_cuda or g.dtype not in (torch.bfloat16, torch.float16):
        return False
    large = g.shape[1] >= _LEAST_OUT and g.shape[0] >= _LEAST_ROWS and 0 < B.shape[1] <= _WIDEST
    return large and all(t.is_contiguous() for t in (g, B, z))


def _of_one_dtype(g: Tensor, B: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    gz, gb = products(g, B, z)
    return gz, gb.to(torch.promote_types(g.dtype, torch.float32))


_opaque_products = torch.library.custom_op(
    "folklora::products", _of_one_dtype, mutates_args=(), schema="(Tensor g, Tensor b, Tensor z) -> (Tensor, Tensor)"
)


@_opaque_products.register_fake
def _(g: Tensor, b: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(g.dtype, torch.float32)
    return g.new_empty(g.shape[0], b.shape[1]), g.new_empty(b.shape, dtype=wide)


def sum_of_products(z: Tensor, b: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """z b + x w + bias, the second product in the accumulator of the first one's result."""
    whole = _opaque_sum_of_products if torch.compiler.is_compiling() else _two_products
    return whole(z, b, x, w, bias)


def _two_products(z: Tensor, b: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return (z @ b if bias is None else torch.addmm(bias, z, b)).addmm_(x, w)


# a compiler that sees the two products gives the second one an output of its own, and copies the first one's into it
_opaque_sum_of_products = torch.library.custom_op(
    "folklora::sum_of_products",
    _two_products,
    mutates_args=(),
    schema="(Tensor z, Tensor b, Tensor x, Tensor w, Tensor? bias) -> Tensor",
)


@_opaque_sum_of_products.register_fake
def _(z: Tensor, b: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def _one_pass(g: Tensor, B: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    (rows, out), rank = g.shape, B.shape[1]
    chunks, blocks = triton.cdiv(rows, _ROWS), triton.cdiv(out, _COLUMNS)
    parts = min(_PARTS, blocks)
    # sums of parts in a fixed order, not atomic additions: the same gradient each time
    gz = torch.empty(parts, rows, rank, device=g.device, dtype=torch.float32)
    gb = torch.empty(chunks, out, rank, device=g.device, dtype=torch.float32)
    with torch.cuda.device(g.device):
        _kernel[(chunks, parts)](
            g, B, z, gz, gb, rows, out, rank, _WIDEST, _ROWS, _COLUMNS, triton.cdiv(blocks, parts),
            num_warps=8, num_stages=3,
        )  # fmt: skip
    return gz.sum(0).to(g.dtype), gb.sum(0)


if triton is not None:

    @triton.jit
    def _kernel(
        g, b, z, gz, gb, rows, out, rank,
        R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """One chunk of rows and one part of the columns: its share of gz, and its rows' share of the part's gB."""
        chunk, part = tl.program_id(0), tl.program_id(1)
        row, r = chunk * ROWS + tl.arange(0, ROWS), tl.arange(0, R)
        here, narrow = row < rows, r < rank
        row = row.to(tl.int64)
        at_z = row[:, None] * rank + r[None, :]
        inside = here[:, None] & narrow[None, :]
        z_tile = tl.load(z + at_z, mask=inside, other=0.0)
        total = tl.zeros((ROWS, R), dtype=tl.float32)
        for block in range(BLOCKS):
            column = (part * BLOCKS + block) * COLUMNS + tl.arange(0, COLUMNS)
            exists = column < out
            g_tile = tl.load(g + row[:, None] * out + column[None, :], mask=here[:, None] & exists[None, :], other=0.0)
            at_b, both = column[:, None] * rank + r[None, :], exists[:, None] & narrow[None, :]
            total += tl.dot(g_tile, tl.load(b + at_b, mask=both, other=0.0))
            tl.store(gb + chunk.to(tl.int64) * out * rank + at_b, tl.dot(tl.trans(g_tile), z_tile), mask=both)
        tl.store(gz + part.to(tl.int64) * rows * rank + at_z, total, mask=inside)
