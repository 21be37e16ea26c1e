"""What a merge is asked to do: mergekit's YAML, read and checked for its form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DTYPES = ("float32", "bfloat16", "float16", "float64")
_KEYS = {
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
}  # fmt: skip
Setting = Any
"""A value, a list that is interpolated over the layers, or a list of {filter, value}."""


@dataclass(frozen=True)
class Reference:
    """A model: a folder or hub name, with an adapter written over it or without.

    Args:
        path: A folder, or a name on the hub.
        revision: The hub's branch, tag or commit.
        adapter: Folder or hub name of an adapter over it.
        adapter_revision: The adapter's branch, tag or commit.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def parse(cls, written: Any) -> Reference:
        """`path[@revision][+adapter[@revision]]`; a folder of that very name is taken as it is.

        Raises:
            ValueError: It is not of that form.
        """
        if isinstance(written, Mapping):
            return cls._of_parts(written)
        if not isinstance(written, str) or not written:
            raise ValueError(f"a model is written path[@revision][+adapter[@revision]], not {written!r}")
        if Path(written).is_dir():
            return cls(written)
        parts = [_path_and_revision(part, written) for part in written.split("+")]
        if len(parts) > 2:
            raise ValueError(f"'{written}' names more than one adapter; list each as a model of its own")
        return cls(*parts[0], *(parts[1] if len(parts) == 2 else ()))

    @classmethod
    def _of_parts(cls, written: Mapping[str, Any]) -> Reference:
        """mergekit's long form: {model: {path, revision}, lora: {path, revision}}."""
        found: list[str | None] = []
        for key in ("model", "lora"):
            part = written.get(key)
            found += [part.get("path"), part.get("revision")] if isinstance(part, Mapping) else [part, None]
        if set(written) - {"model", "lora"} or not isinstance(found[0], str):
            raise ValueError(f"a model in its long form is {{model: {{path, revision}}, lora: ...}}, not {written!r}")
        return cls(*found)

    def __str__(self) -> str:
        parts = ((self.path, self.revision), (self.adapter, self.adapter_revision))
        return "+".join(f"{path}@{revision}" if revision else path for path, revision in parts if path)


@dataclass(frozen=True)
class Source:
    """A model's part in a merge, or in a slice of it.

    Args:
        model: Which model.
        layers: Its layers [from, to); None takes all.
        parameters: What holds for it alone.
    """

    model: Reference
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Some layers of the merged model, or all of them.

    Args:
        sources: The models that they are made of.
        base: Their base, where it is not the whole merge's.
        parameters: What holds for these layers.
    """

    sources: tuple[Source, ...]
    base: Reference | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeConfig:
    """A merge as it was asked for.

    Args:
        method: The method's name.
        slices: The merged model's layers, in order; one slice without ranges where whole models are merged.
        base: The model that the others were tuned from.
        parameters: The method's options for the whole merge.
        dtype: What the merged weights are stored in; None keeps the base's.
        tokenizer: "base", "union", a model, or None: all inputs must have the same tokenizer then.
        pad_to_multiple_of: The vocabulary's rows are filled up to a multiple of it.
        chat_template: A Jinja template for the merged model's tokenizer.
        text: The YAML itself.
    """

    method: str
    slices: tuple[Slice, ...]
    base: Reference | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    tokenizer: str | Reference | None = None
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    text: str = ""

    @property
    def sliced(self) -> bool:
        """Whether layers of the inputs were chosen."""
        return self.slices[0].sources[0].layers is not None

    def models(self) -> list[Reference]:
        """Every model that is named, the base first, each once."""
        named = [self.base, *(part.base for part in self.slices)]
        named += [source.model for part in self.slices for source in part.sources]
        if isinstance(self.tokenizer, Reference):
            named.append(self.tokenizer)
        return list(dict.fromkeys(model for model in named if model is not None))


def read_config(config: str | Path | Mapping[str, Any]) -> MergeConfig:
    """Read a merge from a YAML file, or from its content as a mapping.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of mergekit's form; the message names the key.
    """
    if isinstance(config, Mapping):
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        return parse(config, "the configuration", text)
    text = Path(config).read_text(encoding="utf-8")
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{config}: not valid YAML: {error}") from error
    return parse(read, str(config), text)


def parse(read: Any, where: str, text: str) -> MergeConfig:
    """A merge from what a YAML file held.

    Args:
        read: The content.
        where: What it is called in messages.
        text: The YAML, for the model card.

    Raises:
        ValueError: See `read_config`.
    """
    if not isinstance(read, Mapping):
        raise ValueError(f"{where}: expected merge_method, models and so on, found {type(read).__name__}")
    unknown = sorted(map(str, set(read) - _KEYS))
    if "modules" in unknown:
        raise ValueError(f"{where}: 'modules' is not supported; write models or slices")
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(_KEYS))}")
    if not isinstance(read.get("merge_method"), str):
        raise ValueError(f"{where}: merge_method is missing, such as merge_method: average")
    if bool(read.get("models")) == bool(read.get("slices")):
        raise ValueError(f"{where}: give either models (whole models) or slices (layers of them)")
    source, pad = _tokenizer(read, where)
    base = read.get("base_model")
    return MergeConfig(
        method=read["merge_method"],
        slices=_slices(read, where),
        base=None if base is None else Reference.parse(base),
        parameters=_parameters(read, where),
        dtype=_dtype(read, where),
        tokenizer=source,
        pad_to_multiple_of=pad,
        chat_template=_chat_template(read, where),
        text=text,
    )


def _path_and_revision(part: str, written: str) -> tuple[str, str | None]:
    path, at, revision = part.partition("@")
    if not path or "@" in revision or (at and not revision):
        raise ValueError(f"'{written}' is not of the form path[@revision][+adapter[@revision]]")
    return path, revision or None


def _slices(read: Mapping[str, Any], where: str) -> tuple[Slice, ...]:
    if read.get("models"):
        return (Slice(_sources(read["models"], f"{where}: models", ranges=False)),)
    found = []
    for index, part in enumerate(_list(read["slices"], f"{where}: slices")):
        name = f"{where}: slice {index + 1}"
        _only(part, {"sources", "base_model", "parameters", "residual_weight"}, name)
        sources = _sources(part.get("sources"), name, ranges=True)
        lengths = {source.layers[1] - source.layers[0] for source in sources}
        if len(lengths) > 1:
            raise ValueError(f"{name}: its sources have {' and '.join(map(str, sorted(lengths)))} layers; all need one")
        base = part.get("base_model")
        found.append(Slice(sources, None if base is None else Reference.parse(base), _parameters(part, name)))
    return tuple(found)


def _sources(read: Any, where: str, ranges: bool) -> tuple[Source, ...]:
    found = []
    for entry in _list(read, where):
        _only(entry, {"model", "parameters", "layer_range"} if ranges else {"model", "parameters"}, where)
        if "model" not in entry:
            raise ValueError(f"{where}: an entry names no model: {entry!r}")
        layers = _layers(entry, where) if ranges else None
        found.append(Source(Reference.parse(entry["model"]), layers, _parameters(entry, where)))
    return tuple(found)


def _layers(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    chosen = entry.get("layer_range")
    whole = isinstance(chosen, list) and len(chosen) == 2 and all(type(bound) is int for bound in chosen)
    if not whole or not 0 <= chosen[0] < chosen[1]:
        raise ValueError(f"{where}: layer_range is [from, to) with 0 <= from < to, not {chosen!r}")
    return chosen[0], chosen[1]


def _parameters(read: Mapping[str, Any], where: str) -> dict[str, Setting]:
    found = read.get("parameters") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: parameters are name: value pairs, not {found!r}")
    return dict(found)


def _dtype(read: Mapping[str, Any], where: str) -> str | None:
    # everything is computed in float32, so that `dtype` only says what is stored where `out_dtype` does not
    for key in ("dtype", "out_dtype"):
        value = str(read.get(key) or DTYPES[0]).removeprefix("torch.")
        if value not in DTYPES:
            raise ValueError(f"{where}: {key} is one of {', '.join(DTYPES)}, not {read[key]!r}")
    chosen = read.get("out_dtype") or read.get("dtype")
    return None if chosen is None else str(chosen).removeprefix("torch.")


def _tokenizer(read: Mapping[str, Any], where: str) -> tuple[str | Reference | None, int | None]:
    source, pad = read.get("tokenizer_source"), None
    if read.get("tokenizer") is not None:
        if source is not None:
            raise ValueError(f"{where}: give tokenizer_source or tokenizer, not both")
        _only(read["tokenizer"], {"source", "pad_to_multiple_of"}, f"{where}: tokenizer")
        source, pad = read["tokenizer"].get("source", "union"), read["tokenizer"].get("pad_to_multiple_of")
    if pad is not None and (type(pad) is not int or pad < 1):
        raise ValueError(f"{where}: pad_to_multiple_of is a whole number of at least 1, not {pad!r}")
    return (source if source in (None, "base", "union") else Reference.parse(source)), pad


def _chat_template(read: Mapping[str, Any], where: str) -> str | None:
    template = read.get("chat_template")
    if template is not None and (not isinstance(template, str) or "{" not in template):
        raise ValueError(f"{where}: chat_template is a Jinja template itself, not {template!r}")
    return template


def _list(read: Any, where: str) -> list[Any]:
    if not isinstance(read, list) or not read:
        raise ValueError(f"{where}: expected a list, found {read!r}")
    return read


def _only(read: Any, allowed: set[str], where: str) -> None:
    if not isinstance(read, Mapping):
        raise ValueError(f"{where}: expected {', '.join(sorted(allowed))}, found {read!r}")
    unknown = sorted(map(str, set(read) - allowed))
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(allowed))}")
