"""Options by name: which belong to training, to a method, or to its adapter; each is declared once, as a field."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any

from peft import PeftConfig

from folklora.adapters.base import AdapterConfig
from folklora.adapters.lora import LoRA
from folklora.continual.base import ContinualMethod
from folklora.methods import adapter_class, find, methods
from folklora.stream.peft_types import PREFIX, adapter_name, check_trainable, peft_config_class
from folklora.stream.train import TrainSettings

_HIDDEN = {field.name for field in dataclasses.fields(PeftConfig)} | {"method", "tasks"}


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as options; values are read as JSON where they are JSON, as text otherwise.

    Raises:
        ValueError: A word has no `=`.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key:
            raise ValueError(f"'{pair}' is not of the form option=value")
        options[key.strip()] = parse_value(value)
    return options


def parse_value(text: str) -> Any:
    """An option's value: read as JSON where it is JSON, as text otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def split_options(
    chosen: Sequence[str | ContinualMethod], options: dict[str, Any]
) -> tuple[TrainSettings, dict[str, Any]]:
    """Training settings, and what is left for the methods.

    Args:
        chosen: The methods of the run.
        options: By name.

    Returns:
        The settings and the methods' options, checked: each is known to at least one of the methods.

    Raises:
        ValueError: Options that neither training nor any of the methods knows, each with the nearest names.
    """
    if options.get("adapter") is not None:
        _check_adapter_taken(chosen)
    training = {field.name for field in dataclasses.fields(TrainSettings)}
    known = training | {"adapter"} | {name for one in chosen for name in method_options(one, options.get("adapter"))}
    problems = []
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            problems.append(f"there is no option '{name}'{hint}")
    if problems:
        raise ValueError("\n".join([*problems, f"options: {', '.join(sorted(known))}"]))
    given = {name: _as_declared(TrainSettings, name, value) for name, value in options.items() if name in training}
    return TrainSettings(**given), {name: value for name, value in options.items() if name not in training}


def method_options(one: str | ContinualMethod, adapter: str | PeftConfig | None = None) -> set[str]:
    """The names of a method's own options and of its adapter's."""
    factory = _factory(one) if isinstance(one, str) else type(one)
    config = _adapter_type(one, factory, adapter)
    own = {field.name for field in dataclasses.fields(factory)} - {"adapter"}
    return own | ({field.name for field in dataclasses.fields(config)} - _HIDDEN)


def build_method(one: str | ContinualMethod, options: dict[str, Any]) -> ContinualMethod:
    """A method with its options set; options that belong to other methods of the run are passed over.

    Args:
        one: A method's name, or an object, which is taken as it is where no option names a field of it.
        options: By name; "adapter" is what a continual method is to train: an adapter method's name, `peft:` and the
            name of one of PEFT's own types, or a `peft.PeftConfig`.

    Raises:
        ValueError: The method or adapter is unknown, or refuses a value, or cannot be trained in a stream.
    """
    factory = _factory(one) if isinstance(one, str) else type(one)
    adapter = options.get("adapter")
    config_type = _adapter_type(one, factory, adapter)
    own = {f.name for f in dataclasses.fields(factory)} - {"adapter"}
    inner = {f.name for f in dataclasses.fields(config_type)} - _HIDDEN
    method_values = {k: _as_declared(factory, k, v) for k, v in options.items() if k in own}
    adapter_values = {k: _as_declared(config_type, k, v) for k, v in options.items() if k in inner}
    if isinstance(one, ContinualMethod):
        config = _changed(one.adapter, adapter_values)
    elif isinstance(adapter, config_type):
        config = _changed(adapter, adapter_values)
    else:
        config = config_type(**adapter_values)
    check_trainable(config)
    if isinstance(one, ContinualMethod):
        return dataclasses.replace(one, adapter=config, **method_values)
    return factory(adapter=config, **method_values)


def _changed(config: PeftConfig, values: dict[str, Any]) -> PeftConfig:
    if not values:
        return config
    # ours may carry statistics besides its options
    return config.changed(**values) if isinstance(config, AdapterConfig) else dataclasses.replace(config, **values)


def describe(method: ContinualMethod) -> dict[str, Any]:
    """A method's options and its adapter's as plain values."""
    own = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name != "adapter"}
    config = method.adapter
    inner = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _HIDDEN}
    return json.loads(json.dumps({**own, "adapter": adapter_name(config), **inner}, default=_plain))


def _plain(value: Any) -> Any:
    # PEFT's configurations hold sets, and configurations of their parts
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else sorted(value)


def _factory(name: str) -> type[ContinualMethod]:
    """The class of a continual method; an adapter's name stands for SeqLoRA over it."""
    known = {m.name for m in methods("continual")}
    if name not in known and name in {m.name for m in methods("adapters")}:
        raise ValueError(
            f"'{name}' is an adapter; choose how the stream is learnt, for instance "
            f"--method seq-lora --set adapter={name}. Continual methods: {', '.join(sorted(known))}"
        )
    return find(name, "continual").factory


def _adapter_type(one: str | ContinualMethod, factory: type, adapter: str | PeftConfig | None) -> type[PeftConfig]:
    if isinstance(one, ContinualMethod):
        return type(one.adapter)
    default = _default_adapter(factory)
    if adapter is None or _brings_its_own(factory):
        return type(default)
    if isinstance(adapter, PeftConfig):
        return type(adapter)
    if not isinstance(adapter, str):
        raise ValueError(f"adapter must be a name or a peft.PeftConfig, not {adapter!r}")
    return peft_config_class(adapter) if adapter.startswith(PREFIX) else adapter_class(adapter)


def _default_adapter(factory: type[ContinualMethod]) -> PeftConfig:
    return next(f for f in dataclasses.fields(factory) if f.name == "adapter").default_factory()


def _brings_its_own(factory: type[ContinualMethod]) -> bool:
    return not isinstance(_default_adapter(factory), LoRA)


def _check_adapter_taken(chosen: Sequence[str | ContinualMethod]) -> None:
    if all(isinstance(one, ContinualMethod) or _brings_its_own(_factory(one)) for one in chosen):
        names = ", ".join(one if isinstance(one, str) else one.method for one in chosen)
        raise ValueError(f"adapter chooses what a method like seq-lora trains; {names} has an adapter of its own")


def _as_declared(owner: type, name: str, value: Any) -> Any:
    kind = next(f for f in dataclasses.fields(owner) if f.name == name).type
    declared = kind.__name__ if isinstance(kind, type) else str(kind)
    if isinstance(value, bool) and "bool" not in declared and ("int" in declared or "float" in declared):
        raise ValueError(f"{name} must be a number, not {value}")
    if isinstance(value, int) and not isinstance(value, bool) and "float" in declared and "int" not in declared:
        return float(value)
    simple = {"int": int, "float": float, "bool": bool, "str": str}.get(declared)
    if simple is not None and not isinstance(value, simple):
        raise ValueError(f"{name} must be {declared}, not {value!r}")
    return value
