"""Which methods there are: whatever the rooms export, and what other packages add by entry point."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from folklora.adapters.base import AdapterConfig

_ROOMS = ("adapters", "continual", "merge")


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Args:
        name: What the command line and `folklora.methods()` call it.
        room: Where it lives.
        paper: Its source.
        trains: What it trains.
        factory: The class that holds its options, or the function whose signature they are.
    """

    name: str
    room: str
    paper: str
    trains: str
    factory: type | Callable[..., Any]


def methods(room: str | None = None) -> list[Method]:
    """Every method that is installed, by room and name.

    A method is a class with `method`, `paper` and `trains`, or a function with `paper` and `trains` (merging), that
    its room's package exports, or that an installed package names in the entry point group `folklora.methods`.

    Args:
        room: Only this room's.
    """
    found: list[Method] = []
    for name in _ROOMS:
        module = importlib.import_module(f"folklora.{name}")
        found += [_row(getattr(module, key), name) for key in module.__all__ if _is_method(getattr(module, key))]
    for entry in importlib.metadata.entry_points(group="folklora.methods"):
        factory = entry.load()
        found.append(_row(factory, _room(factory)))
    return sorted((m for m in found if room in (None, m.room)), key=lambda m: (_order(m.room), m.name))


def adapter_class(name: str) -> type[AdapterConfig]:
    """The configuration class of the adapter method `name`.

    Raises:
        ValueError: There is none; the message gives the nearest names.
    """
    return find(name, "adapters").factory


def find(name: str, room: str | None = None) -> Method:
    """The method called `name`.

    Raises:
        ValueError: There is none; the message gives the nearest names.
    """
    known = {m.name: m for m in methods(room)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"there is no method '{name}'{hint}. All of them: {', '.join(known)}")
    return known[name]


def _is_method(candidate: Any) -> bool:
    kind = isinstance(candidate, type) or inspect.isfunction(candidate)
    return kind and bool(getattr(candidate, "paper", "")) and bool(_name(candidate))


def _name(factory: Any) -> str:
    if inspect.isfunction(factory):
        return factory.__name__.replace("_", "-")
    return getattr(factory, "method", "") or ""


def _room(factory: Any) -> str:
    if inspect.isfunction(factory):
        return "merge"
    return "adapters" if issubclass(factory, AdapterConfig) else "continual"


def _row(factory: Any, room: str) -> Method:
    return Method(_name(factory), room, factory.paper, factory.trains, factory)


def _order(room: str) -> int:
    return _ROOMS.index(room)
