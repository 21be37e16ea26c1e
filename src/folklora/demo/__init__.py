"""The embedded example: a small made-up world, a small model that has read about it, five tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def model_folder() -> Path:
    """The folder of the small model that ships with the package.

    Raises:
        FileNotFoundError: The installation lacks it.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"the demo's model is missing from {folder}: the installation is incomplete")
    return folder


def demo_options() -> dict[str, Any]:
    """How the demo's tasks are trained: a few seconds each on two cores."""
    return {
        "r": 8,
        "alpha": 32.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "learning_rate": 3e-3,
        "epochs": 1.5,
        "batch_size": 16,
        "max_length": 96,
        "schedule": "linear",
        "warmup": 0.05,
        "eval_batch_size": 60,
    }
