"""A merging method's signature as the schema of its options, and the options of one tensor."""

from __future__ import annotations

import difflib
import functools
import importlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from folklora.merge.contract import PerTask
from folklora.merge.engine.config import Setting

# mergekit's names for methods that are called otherwise here
_ALIASES = {"linear": "average"}
# mergekit's options that change how it computes and not what
_WITHOUT_EFFECT = {"int8_mask"}
_FIXED = ("models", "base")


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Args:
        kind: Its type.
        default: Its default; `Parameter.empty` where it has to be given.
    """

    kind: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is Parameter.empty


@dataclass(frozen=True)
class Schema:
    """What a method takes.

    Args:
        name: The method's name.
        function: The method.
        base: "needed", "used" or "unread".
        each: Options with one value a model.
        whole: Options with one value for the merge.
        statistics: Options that are tensors from a file which each model brings.
        generator: The argument that takes a random generator a model.
        result: What it gives: a tensor, or a class of `PerTask`.
    """

    name: str
    function: Callable[..., Any]
    base: str
    each: Mapping[str, Option]
    whole: Mapping[str, Option]
    statistics: Mapping[str, Option]
    generator: str | None
    result: type = Tensor

    @property
    def per_task(self) -> bool:
        """Whether it gives a tensor for each task."""
        return issubclass(self.result, PerTask)

    def probe(self, options: Mapping[str, Any], models: int, based: bool) -> None:
        """Call the method with small tensors, so that it says at once what it has against options or how many models.

        Raises:
            ValueError: What it says.
        """
        tensors = [torch.eye(2) * (1 + i) + i for i in range(models)]
        arguments = {**options, **{name: [torch.eye(2)] * models for name in self.statistics}}
        if self.generator is not None:
            arguments[self.generator] = [torch.Generator() for _ in tensors]
        self.function(tensors, torch.eye(2) if based else None, **arguments)

    def written(self) -> list[str]:
        """Every option as YAML calls it."""
        return sorted(yaml_name(name) for name in (*self.each, *self.whole, *self.statistics))

    def check_names(self, parameters: Mapping[str, Setting], where: str, of_model: bool) -> None:
        """Refuse options that the method does not have, or that cannot be given here.

        Raises:
            ValueError: With the valid ones.
        """
        for name in parameters:
            if name in _WITHOUT_EFFECT:
                continue
            if name not in self.written():
                near = difflib.get_close_matches(str(name), self.written(), n=1)
                hint = f"; did you mean '{near[0]}'?" if near else "."
                known = ", ".join(self.written()) or "none"
                raise ValueError(f"{where}: {self.name} has no option '{name}'{hint} Its options: {known}")
            if of_model and argument_name(name) in self.whole:
                raise ValueError(f"{where}: '{name}' holds for the whole merge; write it under the merge's parameters")
            if not of_model and argument_name(name) in self.statistics:
                raise ValueError(f"{where}: '{name}' is a file that each model brings; write it under each model")


def yaml_name(name: str) -> str:
    """What an argument is called in YAML: `lambda_` is `lambda`."""
    return name.removesuffix("_")


def argument_name(name: str) -> str:
    """What a YAML option is called as an argument."""
    return "lambda_" if name == "lambda" else name


def method_names() -> list[str]:
    """The names of all merging methods."""
    return sorted(name for name, found in _exported().items() if hasattr(found, "paper"))


@functools.cache
def schema_of(name: str) -> Schema:
    """The schema of the method `name`, by its own or mergekit's name, with hyphens or underscores.

    Raises:
        ValueError: There is no such method.
    """
    plain = name.replace("-", "_")
    plain = _ALIASES.get(plain, plain)
    if plain not in method_names():
        near = difflib.get_close_matches(plain, [*_ALIASES, *method_names()], n=3, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"there is no merging method '{name}'{hint}. All of them: {', '.join(method_names())}")
    return read_schema(_exported()[plain])


def read_schema(function: Callable[..., Any]) -> Schema:
    """The schema of a merging method.

    Raises:
        TypeError: The function is no merging method.
    """
    kinds = typing.get_type_hints(function)
    each: dict[str, Option] = {}
    whole: dict[str, Option] = {}
    statistics: dict[str, Option] = {}
    generator = None
    for name, parameter in signature(function).parameters.items():
        kind = kinds.get(name)
        if name in _FIXED:
            continue
        if kind is None:
            raise TypeError(f"the argument '{name}' of {function.__name__} has no type, which says where it comes from")
        if kind == Sequence[torch.Generator]:
            generator = name
        elif kind in (Sequence[Tensor], Sequence[Tensor] | None):
            statistics[name] = Option(Path, parameter.default)
        elif typing.get_origin(kind) is Sequence:
            each[name] = Option(typing.get_args(kind)[0], _single(parameter.default))
        else:
            whole[name] = Option(kind, parameter.default)
    base = kinds.get("base", type(None))
    reads = "needed" if base is Tensor else "used" if Tensor in typing.get_args(base) else "unread"
    result = kinds.get("return", Tensor)
    return Schema(function.__name__, function, reads, each, whole, statistics, generator, result)


def evaluate(setting: Setting, name: str, t: float) -> Any:
    """A setting's value for one tensor; None where no filter matches.

    Args:
        setting: A value; a list of numbers, interpolated linearly; a list of {filter, value}, the first of which that
            is part of the tensor's name counts.
        name: The tensor's name.
        t: Where its layer is among the layers, from 0 to 1.

    Raises:
        ValueError: It is nothing of that kind.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not setting:
        raise ValueError("an empty list is no value")
    if all(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            if "value" not in entry or set(entry) - {"filter", "value"}:
                raise ValueError(f"a condition is {{filter: part of a tensor's name, value: ...}}, not {entry!r}")
            if entry.get("filter") in (None, "*") or entry["filter"] in name:
                return evaluate(entry["value"], name, t)
        return None
    if all(isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in setting):
        place = t * (len(setting) - 1)
        below = int(place)
        above = min(below + 1, len(setting) - 1)
        return (1 - (place - below)) * setting[below] + (place - below) * setting[above]
    if any(isinstance(entry, (Mapping, list)) for entry in setting):
        raise ValueError(f"a list holds values for the layers, or conditions, not both: {setting!r}")
    return setting[int(t * (len(setting) - 1))]


def checked(value: Any, option: Option, name: str, where: str) -> Any:
    """A value in its option's type.

    Raises:
        ValueError: It is of another type.
    """
    kinds = typing.get_args(option.kind) if _is_union(option.kind) else (option.kind,)
    for kind in kinds:
        if kind is types.NoneType and value is None:
            return None
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind is float and isinstance(value, str) and _is_number(value):
            return float(value)
        if kind in (int, bool, str) and type(value) is kind:
            return value
        if kind is Path and isinstance(value, str):
            return value
    raise ValueError(f"{where}: {yaml_name(name)} is {_words(kinds)}, not {value!r}")


def _is_number(text: str) -> bool:
    # YAML reads 1e-3 as text
    try:
        float(text)
    except ValueError:
        return False
    return True


def _words(kinds: Sequence[Any]) -> str:
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", types.NoneType: "null"}
    found = [
        ", ".join(map(repr, typing.get_args(kind))) if typing.get_origin(kind) is Literal else words.get(kind, "a file")
        for kind in kinds
    ]
    return " or ".join(found)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _single(default: Any) -> Any:
    # one value stands for every model
    return default[0] if isinstance(default, Sequence) and len(default) == 1 else default


def _exported() -> dict[str, Any]:
    room = importlib.import_module("folklora.merge")
    return {name: getattr(room, name) for name in room.__all__}
