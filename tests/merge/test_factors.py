"""Merging adapters as factors: the same as merging their dense updates, in float64 and float32, with none built."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from folklora.factored import Factors
from folklora.merge import average, factors, iso_c, task_arithmetic, tsv_m, wudi_closed_form

SHAPES = [(40, 30), (30, 40), (8, 40)]
WEIGHTS = [1.0, 0.5, -2.0]
CASES = {
    "sum": (lambda p: factors.task_arithmetic(p), lambda m, b: task_arithmetic(m, b)),
    "task_arithmetic": (
        lambda p: factors.task_arithmetic(p, weight=WEIGHTS, lambda_=0.7),
        lambda m, b: task_arithmetic(m, b, weight=WEIGHTS, lambda_=0.7),
    ),
    "average": (lambda p: factors.average(p, weight=WEIGHTS), lambda m, b: average(m, weight=WEIGHTS)),
    "tsv_m": (lambda p: factors.tsv_m(p, lambda_=1.3), lambda m, b: tsv_m(m, b, lambda_=1.3)),
    "iso_c": (
        lambda p: factors.iso_c(p, weight=WEIGHTS, lambda_=1.3),
        lambda m, b: iso_c(m, b, weight=WEIGHTS, lambda_=1.3),
    ),
    "wudi": (lambda p: factors.wudi_closed_form(p), lambda m, b: wudi_closed_form(m, b)),
}
cases = pytest.mark.parametrize("case", CASES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def adapters(normal):
    """`adapters(out, in, dtype)`: updates of ranks 3, 4 and 5; s is a number, 1, and one value a rank."""

    def draw(out: int, columns: int, dtype: torch.dtype) -> list[Factors]:
        scales = [0.5, 1.0, normal(5, seed=99).to(dtype)]
        return [
            Factors(normal(r, columns, seed=r).to(dtype), s, (normal(out, r, seed=9 + r) / r**0.5).to(dtype))
            for r, s in zip((3, 4, 5), scales, strict=True)
        ]

    return draw


@cases
@shapes
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_it_is_the_dense_result(adapters, case, shape, dtype, tolerance):
    parts = adapters(*shape, dtype)
    by_factors, by_tensors = CASES[case]
    found = by_factors(parts)
    dense = [part.dense() for part in parts]
    expected = by_tensors(dense, torch.zeros_like(dense[0]))
    assert found.A.dtype == found.B.dtype == dtype
    largest = expected.abs().max()
    assert (found.dense() - expected).abs().max() <= tolerance * largest


@shapes
@pytest.mark.parametrize("rank", [1, 4, 8, 99])
def test_truncation_is_the_best_of_its_rank(adapters, shape, rank):
    parts = adapters(*shape, torch.float64)
    total = sum(part.dense() for part in parts)
    found = factors.truncated(parts, rank).dense()
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    torch.testing.assert_close(found, (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=0, atol=1e-11)


def test_a_merged_adapters_forward_is_the_sum_of_the_forwards(adapters, normal):
    parts = adapters(40, 30, torch.float32)
    x = normal(6, 30, seed=50)
    merged = factors.task_arithmetic(parts, weight=WEIGHTS)
    assert merged.rank == 12
    A, B = merged.to_lora()
    expected = sum(w * (x @ part.A.T * part.s) @ part.B.T for w, part in zip(WEIGHTS, parts, strict=True))
    torch.testing.assert_close(x @ A.T @ B.T, expected, rtol=0, atol=1e-4)


@cases
def test_no_dense_update_is_built(adapters, case):
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return result

    parts = adapters(300, 200, torch.float32)
    with Sizes() as sizes:
        CASES[case][0](parts)
    # the stacked factors of 12 columns, where the update has 60,000 entries
    assert sizes.largest <= 300 * 12


def test_copies_of_an_adapter_merge_into_it(adapters):
    part = adapters(40, 30, torch.float64)[2]
    torch.testing.assert_close(factors.tsv_m([part] * 3).dense(), part.dense(), rtol=0, atol=1e-10)
    torch.testing.assert_close(factors.wudi_closed_form([part] * 3).dense(), part.dense(), rtol=0, atol=1e-10)


def test_untrained_adapters_merge_into_nothing():
    parts = [
        Factors(torch.randn(2, 6, generator=torch.Generator().manual_seed(i)), 1.0, torch.zeros(5, 2)) for i in (0, 1)
    ]
    for merge in (factors.tsv_m, factors.iso_c, factors.wudi_closed_form, factors.average):
        assert torch.equal(merge(parts).dense(), torch.zeros(5, 6))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda p: factors.average([]), "no adapter to merge"),
        (
            lambda p: factors.tsv_m([*p, Factors(torch.ones(2, 9), 1.0, torch.ones(40, 2))]),
            r"not \(40, 9\), \(40, 30\)",
        ),
        (lambda p: factors.iso_c(p, weight=[1.0, 2.0]), "there are 3 adapters, but 2 weights"),
        (lambda p: factors.average(p, weight=[1.0, -1.0, 0.0]), "sum to 0"),
        (
            lambda p: factors.tsv_m([Factors(torch.ones(2, 30), torch.ones(4, 2), torch.ones(40, 2))]),
            "no decomposition",
        ),
    ],
)
def test_what_cannot_be_is_refused(adapters, call, expected):
    with pytest.raises(ValueError, match=expected):
        call(adapters(40, 30, torch.float32))
