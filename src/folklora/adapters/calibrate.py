"""One pass over examples that finds what a method must know of a model beforehand.

Of a layer y = W x + b with W [out, in], over the batches b = 1 ... N, each with its loss L_b:

    covariance   C = Σ x xᵀ / (number of x)    [in, in]     second moments of its input, uncentred; padding left out
    gradient     G = Σ_b ∂L_b/∂W / N           [out, in]
    fisher       F = Σ_b (∂L_b/∂W)² / N        [out, in]    elementwise

F squares the gradient of a whole batch's loss. It is the diagonal of the empirical Fisher information only where each
batch is one example whose loss is the sum of its tokens' -log p; transformers' models give their mean. A weight that
several layers share (a tied embedding and head) has one gradient, that of all its uses, and each of them gets it.

Memory: C once for each distinct input, however many layers read it (one for q, k and v, one for gate and up); G and F
once for each weight. The gradients themselves exist for one weight at a time: each is added up and freed as soon as
the backward pass has made it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.call import CallContext, read_masks
from folklora.adapters.host.kinds import is_quantised, kind_of
from folklora.adapters.host.layer import layers_of
from folklora.adapters.host.tuner import FolkloraModel
from folklora.adapters.lora import LoRA
from folklora.adapters.statistics import COVARIANCE, FISHER, GRADIENT, KINDS, Statistics

Loss = Callable[[nn.Module, Any], Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    want: Collection[str] | str,
    *,
    target_modules: AdapterConfig | list[str] | str | None = None,
    loss: Loss | None = None,
    normalise: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Statistics:
    """Find statistics of a model's layers; see `folklora.adapters.calibrate` for their formulas and memory.

    The model runs in evaluation mode, so nothing is drawn and equal batches give equal statistics. Nothing is written
    to its weights; its modes, `requires_grad` and gradients are afterwards as they were. Where a batch has an
    attention mask, positions that it leaves out do not count in the covariance. In a run of several processes each
    finds its own statistics of the batches that it is given.

    Args:
        model: Before `get_peft_model`.
        batches: Each is what the model is called with: keyword arguments, one tensor, or a tuple of arguments; moved
            to the model's device. For gradients: keyword arguments with labels, or `loss`. A mask is known by its
            name, "attention_mask" [batch, positions].
        want: Kinds of statistics: "covariance", "gradient", "fisher"; those of a method are `config.needs`.
        target_modules: Which layers, as in a configuration; a configuration stands for its own choice of layers.
        loss: A function of (model, batch) that calls the model and returns a scalar; None takes the model's own.
        normalise: Take the covariance as CorDA's authors do: each row of a batch is divided by the magnitude of its
            input's largest entry, and Σ x xᵀ by the number of rows.
        dtype: Of the statistics and of the sums; float32 or float64.
        device: Where the sums are kept; None keeps them where the layers are.
        progress: Show a bar, where rich is installed.

    Returns:
        The statistics, by the layers' names.

    Raises:
        ValueError: An option or a layer is not suitable, there are no batches, a layer is not reached by any of them,
            there is no loss, or something is not finite.
        RuntimeError: Layers read one input in the first batch and different ones later.
    """
    wanted = _checked_want(want)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"statistics are float32 or float64, not {dtype}")
    layers = _layers(model, wanted, target_modules)
    backward = not wanted.isdisjoint((GRADIENT, FISHER))
    run = loss or (_own_loss if backward else _call)
    count = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_left_as_found(model))
        inputs = gradients = None
        if COVARIANCE in wanted:
            inputs = stack.enter_context(_Inputs(model, layers, normalise, dtype, device))
        if backward:
            gradients = stack.enter_context(_Gradients(layers, wanted, dtype, device))
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        for batch in _watched(batches, progress):
            count += 1
            with torch.set_grad_enabled(backward):
                value = run(model, send_to_device(batch, place))
            if backward:
                _checked_loss(value, count).backward()
    if not count:
        raise ValueError("there are no batches to calibrate on")
    found: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for part in (inputs, gradients):
        for name, kind, value in part.results(count) if part is not None else ():
            found[name][kind] = value
    _check_found(found, wanted)
    return Statistics(found)


class _Moment:
    """Σ x xᵀ of one input, for all the layers that read it."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.calls = 0
        self._last: Callable[[], Tensor | None] = lambda: None
        self._version = -1

    def holds(self, x: Tensor) -> bool:
        """Whether `x` is the very input that was added last, unchanged since."""
        return self._last() is x and self._version == x._version

    def add(self, x: Tensor, square: Tensor, count: int) -> None:
        """Add an input's square."""
        self._last, self._version = weakref.ref(x), x._version
        self.total = square if self.total is None else self.total.add_(square)
        self.count += count
        self.calls += 1


class _Inputs(contextlib.AbstractContextManager):
    """The second moments of what the layers read, while it is entered."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        normalise: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.normalise, self.dtype, self.device = normalise, dtype, device
        self.moments: dict[str, _Moment] = {}
        self.calls = dict.fromkeys(layers, 0)
        self.context = CallContext()
        self.handles = read_masks(model, self.context)
        self.handles += [
            base.register_forward_pre_hook(self._reader(name), with_kwargs=True) for name, base in layers.items()
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def results(self, batches: int) -> list[tuple[str, str, Tensor]]:
        """(layer, kind, C), one tensor for the layers that read one input."""
        for name, moment in self.moments.items():
            self._require(self.calls[name] == moment.calls, name)
        for moment in {id(moment): moment for moment in self.moments.values()}.values():
            moment.total.div_(max(moment.count, 1))
        return [(name, COVARIANCE, moment.total) for name, moment in self.moments.items() if moment.count]

    def _reader(self, name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._see(name, next(iter((*args, *kwargs.values()))))

        return read

    def _see(self, name: str, x: Tensor) -> None:
        moment = self.moments.get(name)
        if moment is None:
            # shared with a layer that has read this one input and no other
            fresh = (m for m in self.moments.values() if m.calls == 1 and m.holds(x))
            moment = self.moments[name] = next(fresh, None) or _Moment()
        missing = moment.calls - self.calls[name]
        self._require(missing == 0 or (missing == 1 and moment.holds(x)), name)
        if not missing:
            moment.add(x, *self._squared(name, x))
        self.calls[name] += 1

    def _require(self, in_step: bool, name: str) -> None:
        if not in_step:
            others = [other for other, moment in self.moments.items() if moment is self.moments[name] and other != name]
            raise RuntimeError(
                f"layer '{name}' read the same input as {', '.join(others)} in the first batch and another one later; "
                "calibrate them in calls of their own (target_modules)"
            )

    @torch.no_grad()
    def _squared(self, name: str, x: Tensor) -> tuple[Tensor, int]:
        """Σ x xᵀ of one call's input, and what it counts for."""
        kept = self._kept(name, x)
        values = x.detach().to(self.dtype)
        if self.normalise and x.numel():
            values = values / _largest(values, kept)
        rows = values.reshape(-1, x.shape[-1]) if kept is None else values[kept]
        with torch.autocast(x.device.type, enabled=False):
            square = (rows.T @ rows).to(self.device or rows.device)
        return square, (_sequences(x) if self.normalise else len(rows))

    def _kept(self, name: str, x: Tensor) -> Tensor | None:
        """Which of the input's positions are no padding; None for all of them."""
        masks = self.context.masks
        if all(mask.all() for mask in masks):
            return None
        fitting = [mask for mask in masks if mask.shape == x.shape[:-1]]
        if x.dim() == 2:
            # tokens that a router flattened
            fitting += [mask.reshape(-1) for mask in masks if mask.numel() == x.shape[0]]
        # an encoder's mask and a decoder's may have one shape, and say different things
        if fitting and all(torch.equal(mask, fitting[0]) for mask in fitting):
            return fitting[0].to(x.device).bool()
        if not fitting and x.dim() == 2 and x.shape[0] == masks[0].shape[0]:
            # one vector a row of the batch, such as a pooled sentence
            return None
        raise ValueError(
            f"layer '{name}' reads an input of shape {list(x.shape)}, and it cannot be told which of it is padding; "
            "calibrate on batches without padding (one example each, for instance), or give the decoder's attention "
            "mask too"
        )


class _Gradients(contextlib.AbstractContextManager):
    """The sums of gradients and of their squares, while it is entered."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        wanted: frozenset[str],
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.layers, self.dtype, self.device = layers, dtype, device
        self.kinds = [kind for kind in (GRADIENT, FISHER) if kind in wanted]
        self.sums: dict[int, dict[str, Tensor]] = {}
        weights = {id(base.weight): base.weight for base in layers.values()}
        for weight in weights.values():
            weight.requires_grad_(True)
        self.handles = [weight.register_post_accumulate_grad_hook(self._take) for weight in weights.values()]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def results(self, batches: int) -> list[tuple[str, str, Tensor]]:
        """(layer, kind, mean over the batches)."""
        means = {key: {kind: total.div_(batches) for kind, total in sums.items()} for key, sums in self.sums.items()}
        return [
            (name, kind, kind_of(base, name).from_layout(mean).contiguous())
            for name, base in self.layers.items()
            for kind, mean in means.get(id(base.weight), {}).items()
        ]

    @torch.no_grad()
    def _take(self, weight: nn.Parameter) -> None:
        gradient = weight.grad.to(self.device or weight.device, self.dtype)
        weight.grad = None
        parts = {GRADIENT: gradient, FISHER: gradient.square() if FISHER in self.kinds else None}
        sums = self.sums.setdefault(id(weight), {})
        for kind in self.kinds:
            sums[kind] = sums[kind].add_(parts[kind]) if kind in sums else parts[kind]


def _sequences(x: Tensor) -> int:
    """How many sequences an input holds: [batch, positions, width], or vectors of a single one."""
    return x.shape[0] if x.dim() > 2 else 1


def _largest(values: Tensor, kept: Tensor | None) -> Tensor:
    """The magnitude of each sequence's largest entry, signs counted, as CorDA's authors take it; 1 in place of 0."""
    if kept is not None:
        values = values.masked_fill(~kept.unsqueeze(-1), -torch.inf)
    over = tuple(range(1 if values.dim() > 2 else 0, values.dim()))
    largest = values.amax(over, keepdim=True).abs()
    # -inf: the whole sequence is padding
    return torch.where((largest == 0) | largest.isinf(), 1, largest)


def _checked_want(want: Collection[str] | str) -> frozenset[str]:
    wanted = frozenset([want] if isinstance(want, str) else want)
    unknown = sorted(wanted - set(KINDS))
    if unknown or not wanted:
        what = f"no statistics are called {', '.join(unknown)}" if unknown else "want names no statistics"
        raise ValueError(f"{what}; there are {', '.join(KINDS)}")
    return wanted


def _layers(
    model: nn.Module, wanted: frozenset[str], target_modules: AdapterConfig | list[str] | str | None
) -> dict[str, nn.Module]:
    """The chosen layers by name, after checking that the wanted statistics of each can be had."""
    if next(layers_of(model), None) is not None:
        raise ValueError("the model carries Folklora adapters already; calibrate it before get_peft_model")
    chosen = isinstance(target_modules, AdapterConfig)
    # a copy, whose target_modules become explicit
    config = copy.copy(target_modules) if chosen else LoRA(r=1, target_modules=target_modules)
    layers = FolkloraModel.targets(model, config)
    problems = []
    for name, base in layers.items():
        if not kind_of(base, name).has_matrix:
            kind = kind_of(base, name).name
            problems.append(f"'{name}' holds {kind}, which calibration does not see weight by weight; leave it out")
            continue
        if COVARIANCE in wanted and kind_of(base, name).name != "linear":
            problems.append(f"'{name}' is a {type(base).__name__}; the covariance is that of linear layers")
        if not wanted.isdisjoint((GRADIENT, FISHER)):
            if is_quantised(base):
                problems.append(f"'{name}' is quantised, so its weight has no gradient: load the model unquantised")
            elif not (isinstance(base.weight, nn.Parameter) and base.weight.is_leaf):
                problems.append(
                    f"the weight of '{name}' is computed from other parameters and has no gradient of its own"
                )
    if problems:
        raise ValueError("\n".join(problems))
    return layers


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; modes, `requires_grad` and gradients as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, wanted, _ in states:
            parameter.grad = None
            if wanted:
                parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted, gradient in states:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _watched(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress or importlib.util.find_spec("rich") is None:
        return batches
    from rich.progress import track

    return track(batches, "calibrating", total=len(batches) if isinstance(batches, Sized) else None, transient=True)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) else model(batch)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    value = getattr(_call(model, batch), "loss", None)
    if value is None:
        raise ValueError("the model gave no loss, and gradients need one: put labels into the batches, or give loss=")
    return value


def _checked_loss(value: Tensor, batch: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"the loss of batch {batch} must be one number in a tensor, not {value!r}")
    if not value.requires_grad:
        raise ValueError(f"the loss of batch {batch} does not depend on the weight of any chosen layer")
    if not torch.isfinite(value).all():
        raise ValueError(f"the loss of batch {batch} is {value.item()}")
    return value


def _check_found(found: Mapping[str, Mapping[str, Tensor]], wanted: frozenset[str]) -> None:
    missed = [name for name, kinds in found.items() if wanted - set(kinds)]
    if missed:
        raise ValueError(f"no batch reached {', '.join(missed)}; exclude these layers, or give batches that reach them")
    broken = [f"{kind} of '{n}'" for n, kinds in found.items() for kind, v in kinds.items() if not v.isfinite().all()]
    if broken:
        raise ValueError(f"not finite: {', '.join(broken[:8])}{' and more' if len(broken) > 8 else ''}")
