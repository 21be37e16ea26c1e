"""Modules that have several weights and no layer for each: one update a weight, whatever their forward does with them.

That forward runs with W + ΔW in the place of each weight. A weight may be a stack of matrices, as experts have them;
then every matrix has an update of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.call import CallContext
from folklora.adapters.host.kinds import (
    evenly_spaced,
    in_attention,
    is_transposed,
    swapped_call,
    weight_at,
    weight_matrices,
    weight_names,
)
from folklora.adapters.host.layer import FolkloraLayer
from folklora.adapters.host.stacks import StackUpdate, expanded, stacked


class WeightsLayer(FolkloraLayer):
    """A module of several weights and their updates; each method sees one matrix [out, in] at a time."""

    def __init__(self, base_layer: nn.Module, name: str, context: CallContext) -> None:
        super().__init__(base_layer, name, context)
        # PEFT asks every layer for them
        self.out_features, self.in_features = weight_matrices(base_layer, weight_names(base_layer)[0]).shape[1:]

    def _new_update(self, config: AdapterConfig, waiting: bool) -> StackUpdate:
        base, stacks = self.get_base_layer(), {}
        count = 1
        for key in chosen_weights(base, self.name, config):
            own = config.for_module(f"{self.name}.{key}")
            matrices = weight_matrices(base, key)
            count = len(matrices)
            if waiting:
                stacks[key] = expanded(own.empty(tuple(matrices.shape[1:])), count)
            else:
                stacks[key] = stacked([own.update(matrix) for matrix in matrices])
        return StackUpdate(stacks, count)

    def stored_weight(self) -> Tensor:
        """The first of the weights."""
        base = self.get_base_layer()
        return weight_at(base, weight_names(base)[0])

    def derive(self, adapter_name: str, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """What an update's saved values leave out, made again from the weights, by parameter name."""
        update, made = self.folklora_updates[adapter_name], {}
        for name in update.names if update.unsaved else ():
            made |= update.derive_stack(name, weight_matrices(self.get_base_layer(), name), saved, self.name)
        return made

    def sample_base(self) -> Tensor:
        """Evenly spaced elements of every weight, float32."""
        base = self.get_base_layer()
        return torch.cat([evenly_spaced(weight_at(base, key).detach()) for key in weight_names(base)])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward over its adapted weights."""
        names = self._names_to_apply()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if self.context.by_rows:
            what = "a mixture by row" if self.context.rows is None else "adapter_names"
            raise ValueError(
                f"{what} cannot choose adapters of the {self.kind.name} '{self.name}': every row meets the same "
                "weights there; run one adapter at a time, or adapt other layers only"
            )
        check_in_place(self, x)
        weights = {key: self._adapted(key, names) for key in self._keys(names)}
        return swapped_call(self.base_layer, weights, x, *args, **kwargs)

    def _keys(self, names: list[str]) -> list[str]:
        return list(dict.fromkeys(key for name in names for key in self.folklora_updates[name].names))

    def _parts(self, key: str, names: list[str]) -> tuple[Tensor, Tensor]:
        """L and R of all updates of a weight, in the layout of its matrices."""
        names = [name for name in names if key in self.folklora_updates[name].names]
        made = self._corrections_made(names)
        pairs = [self.folklora_updates[name].pair(key, name not in made) for name in names]
        A, B = torch.cat([A for A, _ in pairs], dim=-2), torch.cat([B for _, B in pairs], dim=-1)
        return (A.mT, B.mT) if is_transposed(self.get_base_layer()) else (B, A)

    def _adapted(self, key: str, names: list[str]) -> Tensor:
        weight = weight_at(self.get_base_layer(), key)
        L, R = self._parts(key, names)
        return weight + (L.to(weight.dtype) @ R.to(weight.dtype)).view_as(weight)

    @torch.no_grad()
    def merged_weights(self, names: list[str]) -> dict[str, Tensor]:
        """The module's weights with these adapters' updates added, by name."""
        merged = {}
        for key in self._keys(names):
            merged[key] = self.unmerged.get(key, weight_at(self.get_base_layer(), key)).detach().clone()
            L, R = self._parts(key, names)
            for matrix, left, right in zip(merged[key].view(len(L), *merged[key].shape[-2:]), L, R, strict=True):
                matrix.copy_(matrix.to(torch.promote_types(matrix.dtype, torch.float32)) + left @ right)
        return merged

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion does not know such modules; `export_lora` does."""
        return adapter_name not in self.folklora_updates


def check_in_place(layer: FolkloraLayer, x: Tensor) -> None:
    """Refuse weights that come in just before the base's own forward: there they would lie over the adapted ones.

    Raises:
        ValueError: They are offloaded, or sharded by themselves.
    """
    weight, what = layer.stored_weight(), f"the {layer.kind.name} '{layer.name}'"
    if weight.is_meta and not x.is_meta:
        raise ValueError(f"{what} has offloaded weights; where they are adapted, they must stay in memory")
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            f"{what} has weights that are sharded by themselves; adapted ones can be sharded only with the block "
            "around them"
        )


def own_weights(base: nn.Module) -> list[str]:
    """Names of the weights of a module that can be named one by one: of several, or "weight" where there is one."""
    if in_attention(base):
        return []
    weight = base._parameters.get("weight")
    return weight_names(base) or (["weight"] if weight is not None and weight.dim() > 1 else [])


def chosen_weights(base: nn.Module, name: str, config: AdapterConfig) -> list[str]:
    """The weights of a module that a configuration names; all if it names none."""
    keys = own_weights(base)
    if not config.target_parameters:
        return keys
    return [key for key in keys if is_named(f"{name}.{key}", config.target_parameters)]


def is_named(name: str, targets: list[str]) -> bool:
    """Whether a name is, or ends in, one of the targets."""
    return any(f".{name}".endswith(f".{target}") for target in targets)
