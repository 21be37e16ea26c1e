"""What there is to say about each method, read from its class or function: docstring, options, paper, exceptions."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import folklora
from folklora.adapters.base import AdapterConfig
from folklora.check import CHECKS, EXCEPTIONS
from folklora.methods import Method, methods

SECTIONS = ("Source", "When to choose", "Equation", "Example", "Args")
_HEADER = re.compile(rf"^({'|'.join(SECTIONS)}):[ ]*(.*)$")
_ENTRY = re.compile(r"^(\w+): (.*)$")
Factory = type | Callable[..., Any]


@dataclass(frozen=True)
class Option:
    """One row of a table of options.

    Args:
        name: The field's name.
        default: Its default, as Python writes it.
        meaning: What the docstring says of it.
    """

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Limit:
    """Something that a method cannot do.

    Args:
        checks: Names of the checks that it does not pass, with what each asks for.
        reason: Why not.
    """

    checks: dict[str, str]
    reason: str


def own_methods() -> list[Method]:
    """The methods of Folklora itself, without those that other packages add."""
    return [method for method in methods() if method.factory.__module__.startswith("folklora.")]


def sections(factory: Factory) -> dict[str, str]:
    """A docstring's parts: "summary" (its first paragraph), "body", and those of `SECTIONS`, without indentation.

    Raises:
        ValueError: One is missing, empty, or not in its place; without options, `Args:` is empty.
    """
    summary, _, rest = inspect.cleandoc(factory.__doc__ or "").partition("\n\n")
    parts: dict[str, list[str]] = {"body": []}
    here = "body"
    for line in rest.splitlines():
        header = _HEADER.match(line)
        if header:
            here, line = header.groups()
            parts[here] = []
        parts[here].append(line)
    found = {"summary": summary} | {name: inspect.cleandoc("\n".join(lines)) for name, lines in parts.items()}
    if [*found] != ["summary", "body", *SECTIONS] or not all(found[name] for name in _filled(factory)):
        there = ", ".join(name for name in found if found[name])
        raise ValueError(
            f"the docstring of {factory.__name__} must have a summary, a body and then {', '.join(SECTIONS)}, in "
            f"this order and none of them empty; it has {there}"
        )
    return found


def arguments(docstring: str | None) -> dict[str, str]:
    """The meaning of each argument in the section `Args:` at the end of a docstring."""
    _, _, text = inspect.cleandoc(docstring or "").partition("\nArgs:\n")
    found: dict[str, str] = {}
    for line in inspect.cleandoc(text).splitlines():
        entry = _ENTRY.match(line)
        if entry:
            name, found[entry[1]] = entry[1], entry[2]
        else:
            found[name] += " " + line.strip()
    return found


def own_fields(factory: Factory) -> list[str]:
    """The options that a class declares itself or inherits from another method: not those that all adapters share.

    A shared one that the class gives another default is its own. A function's are its keyword-only arguments.
    """
    if inspect.isfunction(factory):
        return list(_defaults(factory))
    shared = set(AdapterConfig.__mro__) if issubclass(factory, AdapterConfig) else set()
    declared = {name for owner in factory.__mro__ if owner not in shared for name in inspect.get_annotations(owner)}
    return [field.name for field in dataclasses.fields(factory) if field.name in declared - {"method"}]


def options(factory: Factory) -> list[Option]:
    """The class's own options, in the order of its `Args:`."""
    return [_option(factory, name, meaning) for name, meaning in arguments(factory.__doc__).items()]


def shared_options() -> list[Option]:
    """The options that every adapter has."""
    found = arguments(AdapterConfig.__doc__)
    return [_option(AdapterConfig, name, meaning) for name, meaning in found.items() if name != "method"]


def limits(method: Method) -> list[Limit]:
    """What the method cannot do of what `folklora.check_method` asks for; one entry a reason."""
    found: dict[str, dict[str, str]] = {}
    if method.room == "adapters":
        for check, ask in CHECKS.items():
            reason = EXCEPTIONS.get((method.name, check))
            if reason:
                found.setdefault(reason, {})[check] = inspect.getdoc(ask).splitlines()[0]
    return [Limit(checks, reason) for reason, checks in found.items()]


def import_name(factory: Factory) -> str:
    """The shortest dotted name that imports the class."""
    top = getattr(folklora, factory.__name__, None) is factory
    package = "folklora" if top else factory.__module__.rpartition(".")[0]
    return f"{package}.{factory.__name__}"


def link_papers(text: str) -> str:
    """Markdown in which every arXiv number is a link."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"arXiv [\1](https://arxiv.org/abs/\1)", text)


def table(link: str = "`{name}`") -> str:
    """The table of methods in Markdown, the rows of `folklora methods`.

    Args:
        link: How a method's name is written; {name} and {room} are put in.
    """
    rows = [
        f"| {link.format(name=method.name, room=method.room)} | {method.room} | {method.trains} "
        f"| {link_papers(method.paper)} |"
        for method in own_methods()
    ]
    return "\n".join(["| name | room | what is trained | paper |", "| --- | --- | --- | --- |", *rows])


def _filled(factory: Factory) -> list[str]:
    """The sections that must say something."""
    return [name for name in SECTIONS if name != "Args" or own_fields(factory)]


def _option(factory: Factory, name: str, meaning: str) -> Option:
    known = _defaults(factory)
    if name not in known:
        raise ValueError(f"the docstring of {factory.__name__} explains '{name}', which is none of its options")
    return Option(name, known[name], meaning)


def _defaults(factory: Factory) -> dict[str, str]:
    """Each option's default, as Python writes it."""
    if inspect.isfunction(factory):
        found = inspect.signature(factory).parameters.values()
        return {p.name: _written(p.default) for p in found if p.kind is p.KEYWORD_ONLY}
    return {field.name: _written(_default(field)) for field in dataclasses.fields(factory)}


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _written(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)
