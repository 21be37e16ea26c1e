"""Random models around a base, and a way to call any merging method with what it cannot do without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from folklora.methods import Method

_TAKES = {"slerp": 2, "nuslerp": 2, "nearswap": 1, "passthrough": 1}


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """`normal(*shape, seed=0, dtype=torch.float32)`."""

    def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return draw


@pytest.fixture
def around(normal: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """`around(base, count, seed=1, scale=0.1)` are models, the base plus noise."""

    def draw(base: Tensor, count: int, seed: int = 1, scale: float = 0.1) -> list[Tensor]:
        return [base + scale * normal(*base.shape, seed=seed + i, dtype=base.dtype) for i in range(count)]

    return draw


@pytest.fixture
def merged() -> Callable[..., list[Tensor]]:
    """`merged(method, models, base, seeds=None, **options)` are the tensors a method gives: one, or one a task.

    A method that takes less models gets the first ones, and a seed each for random masks.
    """

    def call(
        method: Method, models: Sequence[Tensor], base: Tensor, seeds: Sequence[int] | None = None, **options: Any
    ) -> list[Tensor]:
        models = list(models)[: _TAKES.get(method.name, len(models))]
        names = inspect.signature(method.factory).parameters
        given: dict[str, Any] = {"t": 0.3} if "t" in names else {}
        if "generator" in names:
            given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(models))]
        if "fisher" in names:
            given["fisher"] = [model.square() for model in models]
        result = method.factory(models, None if method.name == "slerp" else base, **given | options)
        return [result] if isinstance(result, Tensor) else [result.for_task(i) for i in range(len(models))]

    return call
