"""Updates in as few terms as they need, down to none."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from folklora.factored import Factors, factored_linear

OUT, IN, RANK = 20, 24, 5


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kind: str = "vector", out: int = OUT, columns: int = IN, rank: int = RANK) -> Factors:
    s = {"number": 1.7, "vector": rand(rank, seed=1), "gate": rand(2, 3, rank, seed=2)}[kind]
    return Factors(rand(rank, columns, seed=3), s, rand(out, rank, seed=4))


@pytest.mark.parametrize(("sizes", "rank"), [((4, 6, 9), 4), ((6, 4, 9), 4), ((4, 6, 4), 4), ((4, 6, 2), 2)])
@pytest.mark.parametrize("kind", ["number", "vector"])
def test_a_compact_update_has_no_more_terms_than_the_weight(kind: str, sizes: tuple[int, int, int], rank: int):
    f = make(kind, *sizes)
    assert f.compact().rank == rank
    torch.testing.assert_close(f.compact().dense(), f.dense(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("zeros", "rank"), [([1, 3], 3), (range(RANK), 0), ([], RANK)])
def test_a_compact_update_has_no_term_that_is_switched_off(zeros: Iterable[int], rank: int):
    f = make()
    f.s[list(zeros)] = 0
    assert f.compact().rank == rank
    torch.testing.assert_close(f.compact().dense(), f.dense(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["number", "vector", "gate"])
def test_an_update_of_no_terms_is_the_base(kind: str):
    x, weight = rand(2, 3, IN, seed=5).requires_grad_(), rand(OUT, IN, seed=6)
    y = factored_linear(x, weight, None, make(kind, rank=0))
    torch.testing.assert_close(y, F.linear(x, weight), rtol=0, atol=1e-13)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=0, atol=1e-13)


def test_factors_of_two_precisions_have_a_dense_form_in_the_better_one():
    f = make()
    single = Factors(f.A, f.s, f.B.float())
    assert torch.equal(single.dense(), Factors(f.A, f.s, f.B.float().double()).dense())
