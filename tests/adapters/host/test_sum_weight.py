"""Experts' weights that stand for W + L R without the sum: what is done with them computes what the sum would."""

from __future__ import annotations

import torch

from folklora import tiny
from folklora.adapters.host.experts import SumWeight


def test_operations_that_are_not_known_get_the_dense_sum() -> None:
    torch.manual_seed(0)
    W, L, R = torch.randn(3, 4, 5), torch.randn(3, 4, 2), torch.randn(3, 2, 5)
    weight, dense, x = SumWeight(W, L, R), W + L @ R, torch.randn(3, 7, 5)
    known = {
        "linear": lambda w: torch.nn.functional.linear(x[0], w[1]),
        "matmul of one": lambda w: x[0] @ w[2].T,
        "matmul of all": lambda w: x @ w.transpose(-1, 1),
        "bmm": lambda w: torch.bmm(w, x.mT),
        "chosen": lambda w: torch.bmm(w[torch.tensor([2, 0, 2])], x.mT),
        "slice": lambda w: w[1:] @ x[1:].mT,
        "double": lambda w: w.to(torch.float64) @ x.mT.double(),
    }
    unknown = {
        "einsum": lambda w: torch.einsum("eoi,eni->eno", w, x),
        "chunk": lambda w: torch.cat([x @ part.mT for part in w.chunk(2, dim=1)], dim=-1),
        "view": lambda w: w.view(12, 5) @ x[0].T,
        "rows": lambda w: w[:, 1:3],
        "permute": lambda w: w.permute(2, 0, 1),
        "sum": lambda w: w + 1.0,
        "norm": lambda w: torch.linalg.norm(w),
    }
    for name, function in {**known, **unknown}.items():
        tiny.close(function(weight), function(dense).to(function(dense).dtype), 1e-5, name)
    assert (weight.shape, weight.dtype, weight.device, weight.dim()) == (W.shape, W.dtype, W.device, 3)
