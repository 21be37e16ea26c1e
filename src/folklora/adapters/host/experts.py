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
from torch import Tensor, nn
from torch.func import functional_call

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.kinds import expert_matrices, expert_parameters, experts_transposed
from folklora.adapters.host.layer import FolkloraLayer, evenly_spaced
from folklora.adapters.host.stacks import StackUpdate, expanded, stacked
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


class ExpertsLayer(FolkloraLayer):
    """An experts module and the updates of its matrices; each method sees one matrix [out, in] an expert."""

    def _new_update(self, config: AdapterConfig, waiting: bool) -> StackUpdate:
        base, stacks = self.get_base_layer(), {}
        for key in chosen_experts(base, self.name, config):
            own = config.for_module(f"{self.name}.{key}")
            matrices = expert_matrices(base, key)
            if waiting:
                stacks[key] = expanded(own.empty(tuple(matrices.shape[1:])), len(matrices))
            else:
                stacks[key] = stacked([own.update(matrix) for matrix in matrices])
        return StackUpdate(stacks, len(matrices))

    def stored_weight(self) -> Tensor:
        """The first of the experts' parameters."""
        base = self.get_base_layer()
        return getattr(base, expert_parameters(base)[0])

    def derive(self, adapter_name: str, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """What an update's saved values leave out, made again from the experts' weights, by parameter name."""
        update, made = self.folklora_updates[adapter_name], {}
        for name in update.names if update.unsaved else ():
            made |= update.derive_stack(name, expert_matrices(self.get_base_layer(), name), saved, self.name)
        return made

    def sample_base(self) -> Tensor:
        """Evenly spaced elements of every stack, float32."""
        base = self.get_base_layer()
        return torch.cat([evenly_spaced(getattr(base, key).detach()) for key in expert_parameters(base)])

    # dynamo follows no tensor without memory: a compiled model leaves its graph here, as loops over experts make it do
    @torch.compiler.disable
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' own forward over their adapted weights."""
        names = self._names_to_apply()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if self.context.by_rows:
            what = "a mixture by row" if self.context.rows is None else "adapter_names"
            raise ValueError(
                f"{what} cannot choose adapters of the experts '{self.name}': their tokens are mixed across "
                "rows; run one adapter at a time, or adapt the attention layers only"
            )
        self._check_in_place(x)
        weights = {key: self._adapted(key, names) for key in self._keys(names)}
        return functional_call(self.base_layer, weights, (x, *args), kwargs)

    def _check_in_place(self, x: Tensor) -> None:
        # what brings such weights in, just before the experts' forward, would put them over the adapted ones
        weight = self.stored_weight()
        if weight.is_meta and not x.is_meta:
            raise ValueError(f"the experts '{self.name}' are offloaded; adapted experts must stay in memory")
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                f"the experts '{self.name}' are sharded by themselves; adapted experts can be sharded only with the "
                "block around them"
            )

    def _keys(self, names: list[str]) -> list[str]:
        return list(dict.fromkeys(key for name in names for key in self.folklora_updates[name].names))

    def _parts(self, key: str, names: list[str]) -> tuple[Tensor, Tensor]:
        """L and R of all updates of a stack, in the layout of its parameter."""
        names = [name for name in names if key in self.folklora_updates[name].names]
        made = self._corrections_made(names)
        pairs = [self.folklora_updates[name].pair(key, name not in made) for name in names]
        A, B = torch.cat([A for A, _ in pairs], dim=-2), torch.cat([B for _, B in pairs], dim=-1)
        return (A.mT, B.mT) if experts_transposed(self.get_base_layer()) else (B, A)

    def _adapted(self, key: str, names: list[str]) -> Tensor:
        weight = getattr(self.get_base_layer(), key)
        L, R = self._parts(key, names)
        return SumWeight(weight, L.to(weight.dtype), R.to(weight.dtype))

    @torch.no_grad()
    def merged_weights(self, names: list[str]) -> dict[str, Tensor]:
        """The experts' parameters with these adapters' updates added, by name."""
        merged = {}
        for key in self._keys(names):
            merged[key] = self.unmerged.get(key, getattr(self.get_base_layer(), key)).detach().clone()
            L, R = self._parts(key, names)
            for expert, left, right in zip(merged[key], L, R, strict=True):
                expert.copy_(expert.to(torch.promote_types(expert.dtype, torch.float32)) + left @ right)
        return merged

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion knows no experts; `export_lora` does."""
        return adapter_name not in self.folklora_updates


def chosen_experts(base: nn.Module, name: str, config: AdapterConfig) -> list[str]:
    """The three-dimensional parameters of an experts module that a configuration names; all if it names none."""
    keys = expert_parameters(base)
    if not config.target_parameters:
        return keys
    return [key for key in keys if is_named(f"{name}.{key}", config.target_parameters)]


def is_named(name: str, targets: list[str]) -> bool:
    """Whether a name is, or ends in, one of the targets."""
    return any(f".{name}".endswith(f".{target}") for target in targets)
