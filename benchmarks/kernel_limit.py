"""Where an adapted layer's time goes, product by product, and whether one product that does all would be faster.

    python benchmarks/kernel_limit.py --shape 1b --out limit.json

For each linear layer of a Llama-shaped block, in bfloat16 on a GPU: the base's own product, the narrow ones of rank 16
beside it, both as Folklora computes them (the second in the accumulator of the first's result), and a Triton product
that adds the update in its last step, so that the output is written once. Milliseconds, medians, the cache flushed
before each. A Triton product is the fastest of a few tilings.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from kernel import SHAPES
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from folklora.fused import products
from folklora.stream.files import write_json

RANK = 16
# rows and columns of the output and depth of a step, steps in flight, warps, whether the next tile's loads begin early
TILINGS = (
    (128, 256, 64, 3, 8, True),
    (128, 256, 64, 3, 8, False),
    (128, 256, 32, 5, 8, True),
    (128, 128, 64, 4, 4, True),
)
GROUP = 8  # tiles of rows that share their columns in the cache


@triton.jit
def _whole(
    x, w, z, b, y, rows, columns, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr,
    PROGRAMS: tl.constexpr, TRANSPOSED: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """y = x w + z b, or x wᵀ + z bᵀ."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=FLAT):
        first = tile // (GROUPED * across) * GROUPED
        height = min(down - first, GROUPED)
        row = (first + tile % (GROUPED * across) % height) * ROWS
        column = tile % (GROUPED * across) // height * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(tl.cdiv(depth, DEPTH)):
            part = w.load([column, step * DEPTH]).T if TRANSPOSED else w.load([step * DEPTH, column])
            total = tl.dot(x.load([row, step * DEPTH]), part, total)
        narrow = b.load([column, 0]).T if TRANSPOSED else b.load([0, column])
        y.store([row, column], tl.dot(z.load([row, 0]), narrow, total).to(tl.bfloat16))


def whole(x: Tensor, w: Tensor, z: Tensor, b: Tensor, y: Tensor, transposed: bool, tiling: Sequence[int]) -> Tensor:
    rows, columns, depth, stages, warps, flat = tiling
    described, programs = TensorDescriptor.from_tensor, torch.cuda.get_device_properties(0).multi_processor_count
    wide, narrow = ([columns, depth], [columns, RANK]) if transposed else ([depth, columns], [RANK, columns])
    _whole[(programs,)](
        described(x, [rows, depth]), described(w, wide), described(z, [rows, RANK]), described(b, narrow),
        described(y, [rows, columns]), *y.shape, x.shape[1], rows, columns, depth, RANK, GROUP, programs,
        transposed, flat, num_stages=stages, num_warps=warps,
    )  # fmt: skip
    return y


def fastest(run: Callable[[Sequence[int]], Tensor], expected: Tensor) -> float:
    """The best tiling's time.

    Raises:
        RuntimeError: A tiling's result is wrong, or none fits the device.
    """
    times = []
    for tiling in TILINGS:
        try:
            found = run(tiling)
        except triton.runtime.errors.OutOfResources:
            continue
        error = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
        # each rounds a sum to bfloat16 once or twice
        if not error <= 2 * torch.finfo(torch.bfloat16).eps:
            raise RuntimeError(f"tiling {tiling}: off by {error:.1e}")
        times.append(milliseconds(lambda tiling=tiling: run(tiling)))
    if not times:
        raise RuntimeError("no tiling fits this device")
    return min(times)


def milliseconds(run: Callable[[], object], repeats: int = 15) -> float:
    flush, laps = torch.empty(2**25, device="cuda"), []
    for lap in range(3 + repeats):
        flush.zero_()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        run()
        ended.record()
        laps += [(begun, ended)] if lap >= 3 else []
    torch.cuda.synchronize()
    return statistics.median(begun.elapsed_time(ended) for begun, ended in laps)


def layer(width: int, out: int, rows: int) -> dict[str, float]:
    """One layer's products: forward, and backward to its input and its factors."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, g, W = draw(rows, width), draw(rows, out), draw(out, width) * width**-0.5
    A, B = draw(RANK, width) * 0.02, draw(out, RANK) * 0.02
    z, gz = x @ A.T, g @ B
    y, gx = torch.empty_like(g), torch.empty_like(x)
    return {
        "x Wᵀ": milliseconds(lambda: x @ W.T),
        "x Aᵀ": milliseconds(lambda: x @ A.T),
        "z Bᵀ += x Wᵀ": milliseconds(lambda: (z @ B.T).addmm_(x, W.T)),
        "in one, forward": fastest(lambda t: whole(x, W, z, B, y, True, t), (z @ B.T).addmm_(x, W.T)),
        "g W": milliseconds(lambda: g @ W),
        "g B, gᵀ z": milliseconds(lambda: products(g, B, z)),
        "gz A += g W": milliseconds(lambda: (gz @ A).addmm_(g, W)),
        "in one, backward": fastest(lambda t: whole(g, W, gz, A, gx, False, t), (gz @ A).addmm_(g, W)),
        "gzᵀ x": milliseconds(lambda: gz.T @ x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", type=int, default=16_384, help="positions: batch times length")
    parser.add_argument("--out", help="write the figures here, as JSON")
    options = parser.parse_args()
    width, _, heads, groups, inner = SHAPES[options.shape]
    sizes = {
        "q, o": (width, width), "k, v": (width, width // heads * groups), "gate, up": (width, inner),
        "down": (inner, width),
    }  # fmt: skip
    found = {name: layer(*size, options.rows) for name, size in sizes.items()}
    if options.out:
        write_json(options.out, vars(options) | {"machine": torch.cuda.get_device_name(), "layers": found})
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, ms\n")
    print("| layer | " + " | ".join(next(iter(found.values()))) + " |\n| --- |" + " --: |" * 9)
    for name, times in found.items():
        print(f"| {name} | " + " | ".join(f"{time:.3f}" for time in times.values()) + " |")


if __name__ == "__main__":
    main()
