"""What a merging method is: a function of tensors whose signature is its schema in YAML and on the command line.

    method(models, base, *, option, ...) -> Tensor, or PerTask

models: `Sequence[Tensor]`, the tensors of one name, one a model, all of one shape. base: the base model's tensor.
Its type says what the method does with it:

- `Tensor`: needed. A base that is listed among the models as well is no model of its own then.
- `Tensor | None`: used where it is given, as above.
- `None`: never read. A base that is listed among the models is a model like the others.

Options are keyword-only. Their types say where their values come from:

- `Sequence[float]`: one value a model. A single value, such as the default `(1.0,)`, stands for every model.
- `Sequence[Tensor]`: a statistic that each model brings along for this tensor, read from a file (`fisher`, `gram`).
  With `| None`, tensors for which no model has one are merged without it.
- `Sequence[torch.Generator]`: one a model, which the caller seeds from (seed, tensor name, model), so that a random
  mask depends neither on the order of the models nor on how tensors are split over files. Never in YAML.
- anything else (`float`, `int`, `bool`, `Literal`, or one of these and `None`): one value for the merge. Python's
  `lambda_` is YAML's `lambda`.

Inputs may have any floating dtype. A method computes in float32, or in float64 if one of its tensors is float64, and
returns that; the caller casts. Integer tensors (position ids, counters) are not merged: copy them from the base.
The return type is `Tensor`; or a class of `PerTask` where a method gives each task a tensor of its own; or `Rows`,
which is a tensor to whoever calls the method: such a method reads the tensors through `Blocks` alone, some rows at a
time, and so does one that is marked `by_entry`.
"""

from __future__ import annotations

import functools
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from folklora.merge.blocks import Blocks, Rows
from folklora.merge.deltas import Lazy

Merge = TypeVar("Merge", bound=Callable[..., Any])
_FIXED = ("models", "base")


@dataclass(frozen=True, eq=False)
class PerTask(ABC):
    """What a method returns that gives another tensor for each task: parts common to the tasks, and parts of each.

    To serve one task, call `for_task`. To store all of them, write `state()` beside the base under the tensor's name;
    `of_state` reads it again. `summed` names those of a state's tensors that count as their sum over all of a model's
    tensors, once all of these are there.

    Args:
        base: The base's tensor, or what a method puts in its place for all tasks.
    """

    summed: ClassVar[tuple[str, ...]] = ()

    base: Tensor

    @abstractmethod
    def delta(self, task: int) -> Tensor:
        """What is added to the base for one task, in the base's shape."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors to store, by a name for each, without the base."""

    @classmethod
    @abstractmethod
    def of_state(cls, base: Tensor, state: dict[str, Tensor]) -> PerTask:
        """The same again from the base and what `state` gave."""

    def for_task(self, task: int) -> Tensor:
        """The weight for one task, counted from 0 in the order of the models."""
        return self.base + self.delta(task)


def merging(paper: str, trains: str, by_entry: bool = False) -> Callable[[Merge], Merge]:
    """Make a function a merging method: give it its source, and check and cast what it is called with.

    Its `by_rows` says whether it goes through the tensors some rows at a time. If so, its `rows` takes the same
    arguments and gives `Rows`; there, models and base may be anything `Readable`, such as tensors on the disk.

    Args:
        paper: Its source, in one line.
        trains: What of the models goes into the merged one, in a few words.
        by_entry: Whether each entry of the result depends on that entry of the models alone.
    """

    def decorate(function: Merge) -> Merge:
        signature = inspect.signature(function)
        by_rows = by_entry or signature.return_annotation in (Rows, Rows.__name__)

        @torch.no_grad()
        def call(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            given = bound.arguments
            kinds = _kinds(function)
            _check(function.__name__, given, kinds)
            count, dtype = len(given["models"]), _precision(given, kinds)
            _check_choices(function.__name__, given, kinds)
            for name, kind in kinds.items():
                if not (by_rows and name in _FIXED):
                    given[name] = _cast(function.__name__, name, given[name], kind, count, dtype)
            if by_entry:
                return _by_entry(function, given, kinds)
            return function(*bound.args, **bound.kwargs)

        @functools.wraps(function)
        @torch.no_grad()
        def method(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            return result.whole() if by_rows else result

        if by_rows:
            method.rows = call
            method.__signature__ = signature.replace(return_annotation=Tensor)
            method.__annotations__ = {**method.__annotations__, "return": Tensor}
        method.paper, method.trains, method.by_rows = paper, trains, by_rows
        return method

    return decorate


def _by_entry(function: Callable[..., Tensor], given: dict[str, Any], kinds: dict[str, Any]) -> Rows:
    blocks = Blocks.of(given["models"], given["base"] if Tensor in _choices(kinds["base"]) else None)
    options = {name: value for name, value in given.items() if name not in _FIXED}
    return blocks.merged(lambda models, base: function(models, base, **options))


@functools.cache
def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each argument."""
    hints = {name: kind for name, kind in typing.get_type_hints(function).items() if name != "return"}
    return hints | {name: Sequence[Tensor] for name, kind in hints.items() if kind == Sequence[Tensor] | None}


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) or (kind,)


def _check(method: str, given: dict[str, Any], kinds: dict[str, Any]) -> None:
    models, base = given["models"], given["base"]
    if not models:
        raise ValueError(f"{method} needs at least one model to merge")
    if kinds["base"] is Tensor and base is None:
        raise ValueError(f"{method} merges what the models changed in their base: give it the base")
    everything = [*models, *([base] if base is not None else [])]
    shapes = {tuple(tensor.shape) for tensor in everything}
    if len(shapes) > 1:
        raise ValueError(f"{method} needs tensors of one shape, but they have {', '.join(map(str, sorted(shapes)))}")
    for tensor in everything:
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{method} merges floating-point tensors, not {tensor.dtype}: copy it from the base")


def _check_choices(method: str, given: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        if typing.get_origin(kind) is Literal and given[name] not in typing.get_args(kind):
            choices = ", ".join(map(repr, typing.get_args(kind)))
            raise ValueError(f"{method}: {name} is one of {choices}, not {given[name]!r}")


def _precision(given: dict[str, Any], kinds: dict[str, Any]) -> torch.dtype:
    tensors = [tensor for name, kind in kinds.items() if kind == Sequence[Tensor] for tensor in given[name] or ()]
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _cast(method: str, name: str, value: Any, kind: Any, count: int, dtype: torch.dtype) -> Any:
    """One argument in the precision of the computation, with one value a model where its type is a sequence."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if typing.get_origin(kind) is not Sequence or value is None:
        return value
    values = list(value)
    if len(values) == 1 and kind == Sequence[float]:
        values *= count
    if len(values) != count:
        raise ValueError(f"{method} needs one {name} a model: there are {count} models, but {len(values)} values")
    return Lazy(lambda index: values[index].to(dtype), count) if kind == Sequence[Tensor] else values
