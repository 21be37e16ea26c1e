"""Updates of a stack of matrices: a method's own update whose parameters have the matrices as first dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from folklora.adapters.base import Update
from folklora.adapters.host.kinds import swapped_call
from folklora.factored import Factors


def call_with(update: Update, method: str, parameters: dict[str, Tensor]) -> Any:
    """`update.method()` with other values for its parameters, by name; its own where there are none."""
    if not parameters:
        return getattr(update, method)()
    return swapped_call(_Method(update, method), {f"update.{key}": value for key, value in parameters.items()})


class _Method(nn.Module):
    def __init__(self, update: Update, method: str) -> None:
        super().__init__()
        self.update, self.method = update, method

    def forward(self) -> Any:
        return getattr(self.update, self.method)()


def stacked(updates: list[Update]) -> Update:
    """Updates of one method as one, the first, whose parameters hold those of all."""
    first = updates[0]
    for key, parameter in first.named_parameters():
        parameter.data = torch.stack([update.get_parameter(key).data for update in updates])
    return first


def expanded(update: Update, count: int) -> Update:
    """An update without values as one of `count` matrices."""
    for parameter in update.parameters():
        parameter.data = parameter.data.new_zeros(count, *parameter.shape)
    return update


def child_name(weight: str) -> str:
    """The name of the child that holds the update of a weight, whose own may have a dot: that of a part's weight."""
    return weight.replace(".", "_")


class StackUpdate(Update):
    """What one adapter adds to the stacks of matrices of a module, such as its experts' up and down projections.

    It has a child named after each stack: the method's own update, with parameters [matrices, ...]. All matrices share
    whatever that update holds besides its parameters.

    Args:
        stacks: The children, by the stack's name.
        count: How many matrices a stack has.
    """

    def __init__(self, stacks: dict[str, Update], count: int) -> None:
        super().__init__()
        self.names, self.count = tuple(stacks), count
        for name, stack in stacks.items():
            self.add_module(child_name(name), stack)
        self.starts_at_base = all(stack.starts_at_base for stack in stacks.values())
        self.weights = count * len(stacks)
        self.corrects_base = any(stack.corrects_base for stack in stacks.values())
        self.unsaved = frozenset(f"{child_name(name)}.{key}" for name, stack in stacks.items() for key in stack.unsaved)

    def stack(self, name: str) -> Update:
        """The method's own update of the weight `name`."""
        return self.get_submodule(child_name(name))

    def placed(self, layer: Any, adapter_name: str) -> None:
        """Each stack's own: it may have to know what a call is told."""
        for name in self.names:
            self.stack(name).placed(layer, adapter_name)

    def pair(self, name: str, corrects: bool = True) -> tuple[Tensor, Tensor]:
        """The factors A [matrices, r, in] and B [matrices, out, r] of a stack, s folded into B.

        Args:
            name: The stack.
            corrects: Whether to take what corrects the base as well.
        """
        stack = self.stack(name)

        def one(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            factors = call_with(stack, "factors", parameters) if corrects else call_with(stack, "split", parameters)[0]
            return factors.to_lora()

        return torch.func.vmap(one)(dict(stack.named_parameters()))

    def split(self, x: Tensor | None = None, mask: Tensor | None = None) -> tuple[Factors, Factors | None]:
        """That of the first matrix."""
        stack = self.stack(self.names[0])
        return call_with(stack, "split", self._of(stack, 0))

    def derive_stack(self, name: str, matrices: Tensor, saved: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
        """What a stack's saved values leave out, by the names of this module's parameters; see `Update.derive`."""
        stack, prefix = self.stack(name), f"{child_name(name)}."
        own = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        each = [
            stack.derive(matrix, {key: value[index] for key, value in own.items()}, f"{layer}.{name}")
            for index, matrix in enumerate(matrices)
        ]
        return {prefix + key: torch.stack([made[key] for made in each]) for key in each[0]}

    def penalty(self) -> Tensor | None:
        """The sum over all matrices; None where the method has none."""
        values = [value for name in self.names for value in self._penalties(self.stack(name))]
        return torch.stack(values).sum() if values else None

    def _penalties(self, stack: Update) -> list[Tensor]:
        if type(stack).penalty is Update.penalty:
            return []
        first = call_with(stack, "penalty", self._of(stack, 0))
        if first is None:
            return []
        if stack.batched_penalty:
            parameters = dict(stack.named_parameters())
            return [torch.func.vmap(lambda one: call_with(stack, "penalty", one))(parameters).sum()]
        return [first] + [call_with(stack, "penalty", self._of(stack, index)) for index in range(1, self.count)]

    def after_step(self) -> None:
        """The method's own, matrix by matrix."""
        for stack in map(self.stack, self.names):
            if type(stack).after_step is Update.after_step:
                continue
            for index in range(self.count):
                changed = {key: nn.Parameter(value, False) for key, value in self._of(stack, index).items()}
                call_with(stack, "after_step", changed)
                for key, value in self._of(stack, index).items():
                    value.copy_(changed[key])

    @staticmethod
    def _of(stack: Update, index: int) -> dict[str, Tensor]:
        return {key: parameter[index] for key, parameter in stack.named_parameters()}

    def frozen_parameters(self) -> frozenset[str]:
        """The method's own, in every stack."""
        return frozenset(
            f"{child_name(name)}.{key}" for name in self.names for key in self.stack(name).frozen_parameters()
        )
