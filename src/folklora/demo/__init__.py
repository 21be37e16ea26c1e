"""The embedded example: a small made-up world, a small model that has read about it, five tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TRAINING = {
    "learning_rate": 3e-3,
    "epochs": 1.5,
    "batch_size": 16,
    "max_length": 96,
    "schedule": "linear",
    "warmup": 0.05,
    "eval_batch_size": 60,
}
_ADAPTER = {"r": 8, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"}
# prompts take more steps than weights, and larger ones
_PROMPTS = {"place": "answer", "learning_rate": 0.03, "batch_size": 8, "epochs": 12.0}
# what a method needs besides or in their place; None leaves an option out
_OWN: dict[str, dict[str, Any]] = {
    "osft": {"r": None},
    "progprompt": {**_PROMPTS, "prompt_length": 10},
    "l2p": {**_PROMPTS, "prompt_length": 10, "top_k": 1},
}


def model_folder() -> Path:
    """The folder of the small model that ships with the package.

    Raises:
        FileNotFoundError: The installation lacks it.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"the demo's model is missing from {folder}: the installation is incomplete")
    return folder


def demo_options(
    methods: Sequence[str] = ("seq-lora", "am-lora"), options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """How the demo's tasks are trained: a few seconds each on two cores, and some minutes where prompts are.

    Args:
        methods: Names of the continual methods that learn them in one run, and so with the same settings.
        options: Those that are set already, by name.

    Returns:
        Settings of training, and of the adapters what at least one of the methods knows, with `options` over them.

    Raises:
        ValueError: The methods need different settings, so that they cannot share a run.
    """
    from folklora.stream.options import method_options

    given = options or {}
    found: dict[str, set[Any]] = {}
    for name in methods:
        known = method_options(name, given.get("adapter"))
        adapter = {key: value for key, value in _ADAPTER.items() if key in known}
        for key, value in {**_TRAINING, **adapter, **_OWN.get(name, {})}.items():
            found.setdefault(key, set()).add(value)
    differ = sorted(key for key, values in found.items() if len(values) > 1 and key not in given)
    if differ:
        raise ValueError(
            f"the demo trains {', '.join(methods)} with different {', '.join(differ)}: give each a run of its own and "
            f"put them side by side with `folklora compare`, or set {', '.join(differ)}"
        )
    chosen = {key: values.pop() for key, values in found.items() if key not in given}
    return {**{key: value for key, value in chosen.items() if value is not None}, **given}
