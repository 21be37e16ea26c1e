"""A check of options that are each one of a few words."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from folklora.adapters.base import AdapterConfig


def check_choices(config: AdapterConfig, choices: Mapping[str, Collection[str]]) -> None:
    """Refuse an option that is none of its choices.

    Args:
        config: The options.
        choices: What each of these options may be, by its name.

    Raises:
        ValueError: Naming the first such option, what it may be and what it is.
    """
    for name, valid in choices.items():
        value = getattr(config, name)
        if value not in valid:
            raise ValueError(f"{name} must be one of {', '.join(valid)}, not {value!r}")
