"""Steps on a few parameters by the loss of validation data, between a trainer's own steps on all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

Loss = Callable[[nn.Module, Any], Tensor]
# the finite difference of the second order moves the weights by this length (DARTS)
_REACH = 0.01


class ValidationSteps:
    """Bi-level optimisation, min_θ L_val(w*(θ), θ) with w*(θ) = argmin_w L_train(w, θ), in alternating steps.

    While this is entered (`with`), an Adam step on θ follows every optimizer step on w, whichever trainer takes it.
    The validation loss is computed in evaluation mode, so that dropout does not blur it. In a distributed run every
    process reads validation batches of its own, and the gradients of θ are averaged.

    Args:
        model: The model.
        parameters: θ; no other optimizer may hold them, and they ask for gradients only while a step is computed.
        follows: Parameters by which an optimizer of w is known.
        validation: Batches that training does not see, read over and over.
        loss: (model, batch) → scalar; None takes `model(**batch).loss`, with the batch on the model's device.
        warmup: How many steps on w go before the first on θ.
        lr: Learning rate of θ's Adam.
        betas: Its β₁, β₂.
        weight_decay: Its weight decay.
        training: Batches for the second-order gradient, which looks one step of w ahead; None takes the first order.
            It costs four passes more.
        inner_lr: ξ, the learning rate of that step.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        follows: Iterable[nn.Parameter],
        validation: Iterable[Any],
        *,
        loss: Loss | None = None,
        warmup: int = 0,
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 1e-3,
        training: Iterable[Any] | None = None,
        inner_lr: float = 1e-3,
    ) -> None:
        self.model, self.loss, self.warmup, self.inner_lr = model, loss or _own_loss, warmup, inner_lr
        self.parameters, self.follows = parameters, {id(p) for p in follows}
        self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        self.validation = _endless(validation, "validation")
        self.training = None if training is None else _endless(training, "training")
        self.steps = 0

    def __enter__(self) -> ValidationSteps:
        self._handle = register_optimizer_step_post_hook(self._after_step)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(p) in self.follows for group in optimizer.param_groups for p in group["params"]):
            self.steps += 1
            if self.steps > self.warmup:
                self.step()

    def step(self) -> Tensor:
        """One step on θ alone; for loops that call it themselves.

        Returns:
            The validation loss before it.

        Raises:
            RuntimeError: FSDP has sharded the model.
            ValueError: The batches cannot be read a second time.
        """
        if any(hasattr(p, "full_tensor") for p in self.parameters):
            raise RuntimeError("validation steps cannot differentiate through a model that FSDP has sharded; use DDP")
        was_training = self.model.training
        self.model.eval()
        self._ask(True)
        try:
            with torch.enable_grad():
                value, gradients = self._first_order() if self.training is None else self._second_order()
        finally:
            self._ask(False)
            self.model.train(was_training)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = _mean_over_processes(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _ask(self, gradients: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(gradients)

    def _first_order(self) -> tuple[Tensor, list[Tensor]]:
        value = self.loss(self.model, next(self.validation))
        return value.detach(), list(torch.autograd.grad(value, self.parameters))

    def _second_order(self) -> tuple[Tensor, list[Tensor]]:
        """∇_θ L_val(w - ξ ∇_w L_train(w, θ), θ), its second term by a finite difference along ∇_w' L_val."""
        own = {id(p) for p in self.parameters}
        weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        start, batch = [p.detach().clone() for p in weights], next(self.training)
        try:
            slope = torch.autograd.grad(self.loss(self.model, batch), weights, materialize_grads=True)
            _move(weights, start, slope, -self.inner_lr)
            value = self.loss(self.model, next(self.validation))
            found = torch.autograd.grad(value, [*self.parameters, *weights], materialize_grads=True)
            direct, along = list(found[: len(own)]), found[len(own) :]
            size = torch.stack([v.double().square().sum() for v in along]).sum().sqrt().item()
            if size == 0:
                return value.detach(), direct
            sides = []
            for step in (_REACH / size, -_REACH / size):
                _move(weights, start, along, step)
                sides.append(torch.autograd.grad(self.loss(self.model, batch), self.parameters))
        finally:
            _move(weights, start, start, 0.0)
        change = [(plus - minus) * size / (2 * _REACH) for plus, minus in zip(*sides, strict=True)]
        return value.detach(), [d - self.inner_lr * c for d, c in zip(direct, change, strict=True)]


def _own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items()}).loss


def _endless(batches: Iterable[Any], what: str) -> Iterator[Any]:
    while True:
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise ValueError(f"the {what} batches are used up: give a list or a data loader, which can be read again")


@torch.no_grad()
def _move(parameters: list[Tensor], start: list[Tensor], direction: Iterable[Tensor], step: float) -> None:
    for parameter, value, change in zip(parameters, start, direction, strict=True):
        # without a step the values come back bit for bit
        parameter.copy_(value + step * change if step else value)


def _mean_over_processes(gradient: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient
