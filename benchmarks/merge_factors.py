"""What merging LoRA adapters costs in factor space, and by way of the weights they add up to.

    OMP_NUM_THREADS=1 python benchmarks/merge_factors.py --width 4096 --adapters 4 --rank 16 --out results.json

One linear layer [width, width]. The dense way builds each adapter's update B A and calls the method of `folklora.merge`
on these; for truncation it sums them and decomposes the sum with `torch.linalg.svd` in their own dtype, as PEFT's
`add_weighted_adapter(combination_type="svd")` does. Factor space calls `folklora.merge.factors`. Both start from the
same float32 factors; the two results are compared as dense updates, which is not timed. A dense way is timed once.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import folklora
from folklora import merge
from folklora.factored import Factors
from folklora.merge import factors
from folklora.stream.files import write_json

Parts = Sequence[Factors]


def main() -> None:
    """Measure every case and show the table."""
    options = _options()
    torch.set_num_threads(options.threads)
    parts = [_adapter(options.width, options.rank, seed) for seed in range(options.adapters)]
    rows = []
    for name, (by_factors, by_tensors) in _cases(options.rank).items():
        rows.append({"case": name, **_measured(by_factors, by_tensors, parts, options.repeats)})
        print(_line(rows[-1]), flush=True)
    where = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    where |= {"folklora": folklora.__version__, "date": datetime.date.today().isoformat()}
    if options.out:
        write_json(options.out, {"options": {**vars(options), "out": None}, **where, "rows": rows})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="in and out of the layer")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of each adapter")
    parser.add_argument("--repeats", type=int, default=5, help="of the way by factors; the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="a JSON file")
    return parser.parse_args()


def _adapter(width: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((rank, width), (width, rank)))
    return Factors(A / width**0.5, 2.0, 0.01 * B)


def _cases(rank: int) -> dict[str, tuple[Callable[[Parts], Factors], Callable[[list[Tensor], Tensor], Tensor]]]:
    """By name: the way by factors, and the dense one of the updates and a base of zeros."""
    return {
        "task arithmetic": (factors.task_arithmetic, merge.task_arithmetic),
        "truncation": (lambda parts: factors.truncated(parts, rank), lambda updates, _: _truncated(updates, rank)),
        "Iso-C": (factors.iso_c, merge.iso_c),
        "TSV-M": (factors.tsv_m, merge.tsv_m),
        "WUDI, closed form": (factors.wudi_closed_form, merge.wudi_closed_form),
    }


def _truncated(updates: list[Tensor], rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(sum(updates), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def _measured(by_factors: Any, by_tensors: Any, parts: Parts, repeats: int) -> dict[str, float]:
    found, first = _timed(by_factors, parts)
    seconds = [_timed(by_factors, parts)[1] for _ in range(repeats)]

    def dense(parts: Parts) -> Tensor:
        updates = [part.dense() for part in parts]
        return by_tensors(updates, torch.zeros_like(updates[0]))

    expected, dense_seconds = _timed(dense, parts)
    error = float((found.dense() - expected).abs().max() / expected.abs().max())
    median = statistics.median(seconds)
    return {
        "factors_seconds": median,
        "first_seconds": first,
        "dense_seconds": dense_seconds,
        "ratio": dense_seconds / median,
        "error": error,
        "rank": found.rank,
    }


def _timed(function: Callable[[Parts], Any], parts: Parts) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function(parts)
    return result, time.perf_counter() - start


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:<18} factors {row['factors_seconds'] * 1e3:9.2f} ms   dense {row['dense_seconds']:8.2f} s   "
        f"ratio {row['ratio']:9.0f}   largest difference {row['error']:.1e} of the largest entry   rank {row['rank']}"
    )


if __name__ == "__main__":
    main()
