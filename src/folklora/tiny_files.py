"""Files of what a method composes, beside the tiny models of `folklora.tiny`: other models of theirs, and adapters."""

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
from folklora.adapters.task_vectors import layers_by_name
from folklora.adapters.vl_adapter import VLAdapter


def task_vectors(model: nn.Module) -> dict[str, str]:
    """Checkpoints of two models near this one, for a method that composes such; they last as long as the process."""
    found = {}
    for seed, task in enumerate(("art", "law")):
        file = _place(model, f"{task}.safetensors")
        found[task] = str(file)
        if not file.exists():
            generator = torch.Generator().manual_seed(seed)
            tuned = {}
            for name, value in model.state_dict().items():
                tuned[name] = value.float().cpu() + 0.05 * torch.randn(value.shape, generator=generator)
            save_file(tuned, file)
    return found


def source_adapters(model: nn.Module, targets: list[str] | str | None) -> dict[str, str]:
    """Folders of two bottleneck adapters of this model, for a method that composes such; they last as long."""
    found = {task: _place(model, task, repr(targets)) for task in ("art", "law")}
    for seed, folder in enumerate(found.values()):
        if not folder.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                # a width of its own, which fits layers of any
                stage = VLAdapter(bottleneck_size=4, activation="relu", start="linear", target_modules=targets)
                get_peft_model(copy.deepcopy(model), stage).save_pretrained(folder)
    return {task: str(folder) for task, folder in found.items()}


def trained_adapters(model: nn.Module, targets: list[str] | str) -> dict[str, str]:
    """Folders of three LoRAs of this model, for a method that starts from such; they last as long."""
    found = {task: _place(model, task, f"lora {targets!r}") for task in ("art", "law", "music")}
    known = {name: kind.shape(base) for name, (kind, base) in layers_by_name(model).items() if kind.has_matrix}
    narrow = {name: 1 for name, shape in known.items() if min(shape) == 1}
    for seed, folder in enumerate(found.values()):
        if not folder.exists():
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                tuned = get_peft_model(copy.deepcopy(model), LoRA(r=2, rank_pattern=narrow, target_modules=targets))
                for value in tuned.parameters():
                    if value.requires_grad:
                        value += 0.1 * torch.randn_like(value)
            tuned.save_pretrained(folder)
    return {task: str(folder) for task, folder in found.items()}


def _place(model: nn.Module, name: str, more: str = "") -> Path:
    """A path of its own for models with these weights, in a folder that lasts as long as the process."""
    digest = hashlib.sha256(more.encode())
    for key, value in model.state_dict().items():
        digest.update(f"{key} {list(value.shape)}".encode())
        # sources of a model are refused on another one of the same shapes
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return Path(_models().name) / f"{digest.hexdigest()[:16]}-{name}"


@functools.cache
def _models() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="folklora-tiny-")
