"""Other models near a tiny one, for methods that start from what such have learnt; they last as long as the process."""

from __future__ import annotations

import copy
import functools
import hashlib
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from folklora.adapters.lora import LoRA

_NOISE = 0.05


def task_vectors(model: nn.Module) -> dict[str, str]:
    """Checkpoints of two models near this one, for a method that composes such."""
    found = {task: _place(model, task, ".safetensors") for task in ("art", "law")}
    for seed, file in enumerate(found.values()):
        if not file.exists():
            generator = torch.Generator().manual_seed(seed)
            tuned = {}
            for name, value in model.state_dict().items():
                tuned[name] = value.float() + _NOISE * torch.randn(value.shape, generator=generator)
            save_file(tuned, file)
    return {task: str(file) for task, file in found.items()}


def trained_adapters(model: nn.Module, target_modules: list[str] | str) -> dict[str, str]:
    """Folders of three LoRAs of this model, for a method that starts from such.

    Args:
        model: The base; it is left as it is.
        target_modules: What they adapt.
    """
    found = {task: _place(model, f"{task} {target_modules}", "") for task in ("art", "law", "music")}
    for seed, folder in enumerate(found.values()):
        if not folder.exists():
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                tuned = get_peft_model(copy.deepcopy(model), LoRA(r=2, target_modules=target_modules))
                for value in tuned.parameters():
                    if value.requires_grad:
                        value += 2 * _NOISE * torch.randn_like(value)
            tuned.save_pretrained(folder)
    return {task: str(folder) for task, folder in found.items()}


def _place(model: nn.Module, what: str, ending: str) -> Path:
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    return Path(_folder().name, hashlib.sha256(f"{shapes} {what}".encode()).hexdigest()[:16] + ending)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="folklora-tiny-")
