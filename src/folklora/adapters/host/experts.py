"""Mixture-of-experts weights in three dimensions: one update an expert, applied where the experts multiply.

transformers keeps the experts of a layer in one module with parameters [experts, out, in] or [experts, in, out] and
several forwards that use them (a loop, batched and grouped products). The layer here hands that forward, in place of
each parameter, a tensor that stands for W + L R: the products that it knows are computed as x W + (x L) R, so no dense
update is formed, and any other operation gets the dense sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from folklora.adapters.host.kinds import weight_at
from folklora.adapters.host.weights import WeightsLayer
from folklora.factored import Factors, factored_linear

_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "layout", "requires_grad", "is_sparse")
} | {Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.is_floating_point, Tensor.data_ptr, Tensor.__len__}
_ALIGNMENT = 16


class SumWeight(Tensor):
    """W + L R, [..., rows, columns], not yet added up; L [..., rows, r], R [..., r, columns] in W's dtype."""

    @staticmethod
    def __new__(cls, W: Tensor, L: Tensor, R: Tensor) -> SumWeight:
        """A tensor with W's outward properties and no memory of its own."""
        return Tensor._make_wrapper_subclass(cls, W.shape, strides=W.stride(), dtype=W.dtype, device=W.device)

    def __init__(self, W: Tensor, L: Tensor, R: Tensor) -> None:
        self.W, self.L, self.R = W, L, R

    def dense(self) -> Tensor:
        """The sum, in W's dtype."""
        return self.W + self.L @ self.R

    def map(self, function: Callable[[Tensor], Tensor]) -> SumWeight:
        """The same of each part, for functions that commute with the product."""
        return SumWeight(function(self.W), function(self.L), function(self.R))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Apply the rule for `func`, or compute with the dense sum."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(args[0].W, *args[1:], **kwargs)
        rule = _RULES.get(func, _grouped if _is_grouped(func) else None)
        result = NotImplemented if rule is None else rule(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
        return func(*(_dense(value) for value in args), **{key: _dense(value) for key, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Refuse what goes past `__torch_function__`: it would compute without gradients."""
        raise NotImplementedError(f"adapted expert weights cannot take part in {func}")


def _dense(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(part) for part in value)
    return value.dense() if isinstance(value, SumWeight) else value


def _index(func: Any, w: SumWeight, key: Any) -> Any:
    # choosing experts leaves matrices whole; anything finer is left to the dense sum
    whole = isinstance(key, (int, slice)) or (isinstance(key, Tensor) and not key.dtype.is_floating_point)
    return w.map(lambda part: part[key]) if whole and w.W.dim() == 3 else NotImplemented


def _transpose(func: Any, w: SumWeight, *dims: int) -> Any:
    if dims and {dim % w.W.dim() for dim in dims} != {w.W.dim() - 2, w.W.dim() - 1}:
        return NotImplemented
    return SumWeight(w.W.mT, w.R.mT, w.L.mT) if dims or w.W.dim() == 2 else NotImplemented


def _mt(func: Any, w: SumWeight) -> SumWeight:
    return SumWeight(w.W.mT, w.R.mT, w.L.mT)


def _map(func: Any, w: SumWeight, *args: Any, **kwargs: Any) -> SumWeight:
    return w.map(lambda part: func(part, *args, **kwargs))


def _linear(func: Any, x: Any, w: Any, bias: Any = None) -> Any:
    if isinstance(x, SumWeight) or not isinstance(w, SumWeight) or w.W.dim() != 2:
        return NotImplemented
    return factored_linear(x, w.W, bias, Factors(w.R, 1.0, w.L))


def _matmul(func: Any, x: Any, y: Any) -> Any:
    if isinstance(x, SumWeight) and isinstance(y, SumWeight):
        return NotImplemented
    if isinstance(x, SumWeight):
        return func(x.W, y) + func(x.L, func(x.R, y))
    if y.W.dim() == 2:
        return _linear(func, x, _mt(func, y))
    return func(x, y.W) + func(func(x, y.L), y.R)


def _grouped(func: Any, x: Any, w: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, SumWeight) or not isinstance(w, SumWeight):
        return NotImplemented
    # grouped kernels want rows that begin at multiples of 16 bytes
    missing = -w.R.shape[-2] % (_ALIGNMENT // w.R.element_size())
    L, R = F.pad(w.L, (0, missing)), F.pad(w.R, (0, 0, 0, missing))
    return func(x, w.W, *args, **kwargs) + func(func(x, L, *args, **kwargs), R, *args, **kwargs)


def _is_grouped(func: Any) -> bool:
    return "grouped_mm" in getattr(func, "__name__", "")


_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _index,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.t: _transpose,
    Tensor.T.__get__: _transpose,
    Tensor.mT.__get__: _mt,
    Tensor.to: _map,
    Tensor.contiguous: _map,
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
}


class ExpertsLayer(WeightsLayer):
    """An experts module and the updates of its matrices; each method sees one matrix [out, in] an expert."""

    # dynamo follows no tensor without memory: a compiled model leaves its graph here, as loops over experts make it do
    @torch.compiler.disable
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' own forward over their adapted weights."""
        return super().forward(x, *args, **kwargs)

    def _adapted(self, key: str, names: list[str]) -> Tensor:
        weight = weight_at(self.get_base_layer(), key)
        L, R = self._parts(key, names)
        return SumWeight(weight, L.to(weight.dtype), R.to(weight.dtype))
