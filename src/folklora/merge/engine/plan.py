"""What is merged with what: each tensor of the merged model, where it comes from, and with which options.

Nothing is read here but types and shapes, so that all that is wrong with them is said before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from folklora.merge.engine.checkpoints import Form, Shard, code_of, split
from folklora.merge.engine.config import MergeConfig, Reference, Slice, Source
from folklora.merge.engine.models import Architecture, Layout
from folklora.merge.engine.schema import Option, Schema, checked, evaluate, yaml_name

_SHOWN = 3


@dataclass(frozen=True)
class Take:
    """A tensor of a model.

    Args:
        model: Which model.
        key: The tensor's key in it.
    """

    model: Reference
    key: str


@dataclass(frozen=True)
class Step:
    """One tensor of the merged model.

    Args:
        name: The name that it is stored under.
        form: Its type and shape.
        models: What is merged.
        base: The base's tensor, where the method takes one.
        options: The method's arguments.
        statistics: Argument → the models' files.
        copied: It is the first model's as it is: no floating-point numbers.
        by_token: It has a row for each token, to be brought into one order first.
    """

    name: str
    form: Form
    models: tuple[Take, ...]
    base: Take | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    copied: bool = False
    by_token: bool = False

    def takes(self) -> tuple[Take, ...]:
        """Every tensor that is read for it."""
        return (*self.models, *(() if self.base is None else (self.base,)))


@dataclass(frozen=True)
class Plan:
    """A merge in all its steps.

    Args:
        steps: The merged model's tensors.
        shards: The files that hold them.
        donor: The model that configuration and tokenizer come from.
        layers: How many layers the merged model has, where they were chosen.
        left_out: Stored tensors that the model's class does not know and not all models have.
    """

    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    donor: Reference
    layers: int | None = None
    left_out: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """What the merged tensors take."""
        return sum(step.form.bytes for step in self.steps)

    def share(self, done: set[str], rank: int, processes: int) -> list[Step]:
        """The steps that one of several processes does, about as much for each, in the files' order."""
        loads = [0] * processes
        mine: set[str] = set()
        for step in sorted(self.steps, key=lambda step: (-step.form.bytes, step.name)):
            if step.name not in done:
                least = loads.index(min(loads))
                loads[least] += step.form.bytes
                if least == rank:
                    mine.add(step.name)
        return [step for step in self.steps if step.name in mine]


@dataclass(frozen=True)
class _Planner:
    config: MergeConfig
    schema: Schema
    layouts: Mapping[Reference, Layout]
    architecture: Architecture
    rows: int | None

    @property
    def donor(self) -> Reference:
        return self.config.base or self.config.slices[0].sources[0].model

    def steps(self) -> tuple[list[Step], list[str]]:
        if self.config.sliced:
            return list(self._sliced()), []
        part = self.config.slices[0]
        keys, left_out = self._common_keys(part)
        layers = _layer_counts(keys)
        return [self._step(key, part, 0, _place(key, layers)) for key in keys], left_out

    def _common_keys(self, part: Slice) -> tuple[list[str], list[str]]:
        used = dict.fromkeys([self.donor, *(source.model for source in part.sources)])
        known = set(self.architecture.keys)
        all_keys = dict.fromkeys(key for model in used for key in self.layouts[model].forms)
        incomplete = [key for key in all_keys if any(key not in self.layouts[model].forms for model in used)]
        wanted = [key for key in incomplete if not known or key in known]
        if wanted:
            raise ValueError(_missing(wanted, {model: self.layouts[model] for model in used}))
        return [key for key in all_keys if key not in incomplete], incomplete

    def _sliced(self) -> Iterator[Step]:
        stack = self._stack()
        first, last = self.config.slices[0], self.config.slices[-1]
        outside = [key for key in self.layouts[self.donor].forms if _split(key)[0] != stack]
        order = [key for key in self.architecture.keys if key in outside or _split(key)[0] == stack]
        start = next(i for i, key in enumerate(order) if _split(key)[0] == stack)
        for key in outside:
            part = last if key in order[start:] else first
            yield self._step(key, part, 0, 0.0)
        out = 0
        for part in self.config.slices:
            begin, end = part.sources[0].layers
            for layer in range(begin, end):
                t = (layer - begin) / (end - begin - 1) if end - begin > 1 else 1.0
                keys = [key for key in self.layouts[part.sources[0].model].forms if _split(key)[:2] == (stack, layer)]
                for key in keys:
                    yield self._step(key, part, out, t, offset=layer - begin)
                out += 1

    def _stack(self) -> str:
        stacks = list(_layer_counts(self.layouts[self.donor].forms))
        if not self.architecture.keys:
            raise ValueError("slices need a model class that transformers knows, to tell what lies before the layers")
        if len(stacks) != 1:
            raise ValueError(
                f"slices need a model with one stack of layers; this one has {', '.join(stacks) or 'none'}"
            )
        for source in (source for part in self.config.slices for source in part.sources):
            count = _layer_counts(self.layouts[source.model].forms).get(stacks[0], 0)
            if source.layers[1] > count:
                raise ValueError(f"{source.model} has {count} layers; layer_range {list(source.layers)} goes beyond")
        return stacks[0]

    def _step(self, key: str, part: Slice, out: int, t: float, offset: int | None = None) -> Step:
        """The merged tensor of `key` in the first source (layer `offset` of the slice, which becomes layer `out`)."""
        takes = [Take(source.model, _moved(key, source, offset)) for source in part.sources]
        for take in takes:
            if take.key not in self.layouts[take.model].forms:
                raise ValueError(_missing([take.key], {take.model: self.layouts[take.model]}))
        base = self._base(part, key, takes)
        name = self._name(key, part, out if offset is not None else None)
        donor = Take(self.donor, key) if key in self.layouts[self.donor].forms and offset is None else takes[0]
        form = self.layouts[donor.model].forms[donor.key]
        by_token = self.rows is not None and key in self.architecture.embeddings
        if not form.is_float:
            return Step(name, form, (donor,), copied=True)
        pairs = self._merged(part, takes)
        form = Form(code_of(self.config.dtype) if self.config.dtype else form.dtype, form.shape)
        if by_token:
            form = replace(form, shape=(self.rows, *form.shape[1:]))
        sources = [source for source, _ in pairs]
        options, statistics = self._options(part, sources, [take.key for _, take in pairs], name, t)
        return Step(name, form, tuple(take for _, take in pairs), base, options, statistics, by_token=by_token)

    def _base(self, part: Slice, key: str, takes: Sequence[Take]) -> Take | None:
        base = part.base or self.config.base
        if self.schema.base == "unread" or base is None:
            return None
        # a slice may take other layers of the base than of the first model
        own = next((take for take in takes if take.model == base), None)
        if own is None and key not in self.layouts[base].forms:
            raise ValueError(_missing([key], {base: self.layouts[base]}))
        return own or Take(base, key)

    def _merged(self, part: Slice, takes: Sequence[Take]) -> list[tuple[Source, Take]]:
        base = part.base or self.config.base
        pairs = list(zip(part.sources, takes, strict=True))
        if self.schema.base != "unread" and base is not None:
            pairs = [(source, take) for source, take in pairs if take.model != base]
        if not pairs:
            raise ValueError(f"{self.schema.name} needs a model besides the base {base}")
        return pairs

    def _name(self, key: str, part: Slice, out: int | None) -> str:
        owner = self.donor if key in self.layouts[self.donor].names else part.sources[0].model
        stored = self.layouts[owner].names[key]
        if out is None or not stored.endswith(key):
            return stored
        stack, _, rest = _split(key)
        return stored.removesuffix(key) + f"{stack}.{out}.{rest}"

    def _options(
        self, part: Slice, sources: Sequence[Source], keys: Sequence[str], name: str, t: float
    ) -> tuple[dict[str, Any], dict[str, tuple[str | None, ...]]]:
        levels = [part.parameters, self.config.parameters]
        names = [self.layouts[source.model].names[key] for source, key in zip(sources, keys, strict=True)]
        options: dict[str, Any] = {}
        for argument, option in self.schema.whole.items():
            options[argument] = _value(argument, option, levels, name, t, self.schema.name)
        for argument, option in self.schema.each.items():
            options[argument] = [
                _value(argument, option, [source.parameters, *levels], own, t, f"{source.model}: {own}")
                for source, own in zip(sources, names, strict=True)
            ]
        statistics = {
            argument: tuple(
                _value(argument, option, [source.parameters], own, t, str(source.model))
                for source, own in zip(sources, names, strict=True)
            )
            for argument, option in self.schema.statistics.items()
        }
        return options, statistics


def make_plan(
    config: MergeConfig,
    schema: Schema,
    layouts: Mapping[Reference, Layout],
    architecture: Architecture,
    *,
    rows: int | None = None,
    largest: int = 5 * 10**9,
) -> Plan:
    """Plan a merge from what its models' headers say.

    Args:
        config: What was asked for.
        schema: The method's options.
        layouts: The models' tensors.
        architecture: Of the model class that they share.
        rows: How many tokens the merged vocabulary has, where it is not the models' own.
        largest: The most bytes that one file may have.

    Raises:
        ValueError: An option is unknown, missing or of another type; tensors are missing or differ in shape; a base
            is missing; or the method refuses the options or the number of models.
    """
    _check_options(config, schema)
    planner = _Planner(config, schema, layouts, architecture, rows)
    if schema.base == "needed" and not all(part.base or config.base for part in config.slices):
        raise ValueError(f"{schema.name} merges what the models changed in their base: give base_model")
    if schema.per_task and config.sliced:
        raise ValueError(f"{schema.name} gives a model for each task, which slices cannot be cut from; write models")
    steps, left_out = planner.steps()
    _check_shapes(steps, layouts, architecture)
    _check_calls(steps, schema)
    chosen = [source.layers for source in (part.sources[0] for part in config.slices) if source.layers is not None]
    layers = sum(end - begin for begin, end in chosen) if chosen else None
    forms = {step.name: step.form for step in steps}
    return Plan(tuple(steps), tuple(split(forms, largest)), planner.donor, layers, tuple(left_out))


def _check_options(config: MergeConfig, schema: Schema) -> None:
    schema.check_names(config.parameters, "parameters", of_model=False)
    for part in config.slices:
        schema.check_names(part.parameters, "the slice's parameters", of_model=False)
        for source in part.sources:
            schema.check_names(source.parameters, str(source.model), of_model=True)


def _value(argument: str, option: Option, levels: Iterable[Mapping[str, Any]], name: str, t: float, where: str) -> Any:
    """An option's value for the tensor `name`: of the first level that has one."""
    written = yaml_name(argument)
    for level in levels:
        if written in level:
            value = evaluate(level[written], name, t)
            if value is not None:
                return checked(value, option, argument, where)
    if option.required:
        raise ValueError(f"{where}: '{written}' is missing")
    return option.default


def _check_shapes(steps: Iterable[Step], layouts: Mapping[Reference, Layout], architecture: Architecture) -> None:
    problems = []
    by_rows = False
    for step in steps:
        forms = [(take, layouts[take.model].forms[take.key]) for take in step.takes()]
        shapes = {form.shape[1:] if step.by_token else form.shape for _, form in forms}
        if len(shapes) > 1 or len({form.is_float for _, form in forms}) > 1:
            problems.append(f"{step.name} is " + ", ".join(f"{f.dtype} {list(f.shape)} in {t.model}" for t, f in forms))
            by_rows |= not step.by_token and any(take.key in architecture.embeddings for take, _ in forms)
    if problems:
        hint = "\nthe vocabularies differ in size; tokenizer_source: union or base brings them into one" * by_rows
        more = f"\n... and {len(problems) - _SHOWN} more" * (len(problems) > _SHOWN)
        raise ValueError("the models have tensors of different shapes:\n" + "\n".join(problems[:_SHOWN]) + more + hint)


def _check_calls(steps: Iterable[Step], schema: Schema) -> None:
    probed: set[str] = set()
    for step in steps:
        call = repr((step.options, len(step.models), step.base is None))
        if step.copied or call in probed:
            continue
        try:
            schema.probe(step.options, len(step.models), step.base is not None)
        except ValueError as error:
            raise ValueError(f"{step.name}: {error}") from error
        probed.add(call)


def _missing(keys: Sequence[str], layouts: Mapping[Reference, Layout]) -> str:
    lines = [
        f"{key} is missing in {', '.join(str(model) for model, own in layouts.items() if key not in own.forms)}"
        for key in keys[:_SHOWN]
    ]
    more = [f"... and {len(keys) - _SHOWN} more"] * (len(keys) > _SHOWN)
    return "\n".join(["the models do not hold the same tensors:", *lines, *more])


def _split(key: str) -> tuple[str | None, int, str]:
    """(stack, layer, rest) of a key: a stack is what stands before the first number; None where there is none."""
    parts = key.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if not at:
        return None, 0, key
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def _layer_counts(keys: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has."""
    counts: dict[str, int] = {}
    for stack, layer, _ in map(_split, keys):
        if stack is not None:
            counts[stack] = max(counts.get(stack, 0), layer + 1)
    return counts


def _place(key: str, layers: Mapping[str, int]) -> float:
    """Where a tensor's layer is in its stack, from 0 to 1; 0 outside of stacks, as mergekit has it."""
    stack, layer, _ = _split(key)
    if stack is None:
        return 0.0
    return layer / (layers[stack] - 1) if layers[stack] > 1 else 1.0


def _moved(key: str, source: Source, offset: int | None) -> str:
    """The key in another source of a slice, whose layers may begin elsewhere."""
    if offset is None:
        return key
    stack, _, rest = _split(key)
    return f"{stack}.{source.layers[0] + offset}.{rest}"
