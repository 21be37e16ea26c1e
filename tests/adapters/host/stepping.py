"""What the tests of optimizer steps share, in one process and in two; run as a script it is one of the two.

python -m torch.distributed.run --nproc_per_node=2 stepping.py RESULTS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from folklora import KaSA, LoRA, methods, tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.layer import layers_of
from folklora.adapters.lora import LoRAUpdate

PENALISED = KaSA(r=4, target_modules=tiny.TARGETS, beta=0.05, gamma=0.02)


@dataclass
class Normed(LoRA):
    """LoRA whose A and B have norm 1 after each step: what it does needs the whole matrix."""

    method: str = "normed"

    def update(self, weight: Tensor) -> NormedUpdate:
        plain = super().update(weight)
        return NormedUpdate(plain.A, plain.B, plain.scale)


class NormedUpdate(LoRAUpdate):
    calls = 0

    def after_step(self) -> None:
        self.calls += 1
        self.A /= self.A.norm()
        self.B /= self.B.norm().clamp_min(1e-6)


def same_rows(processes: int) -> Tensor:
    """Four rows a process, all alike, so that the task's gradient is the same however they are split."""
    return tiny.batch()["input_ids"][:1].expand(tiny.ROWS * processes, -1)


def trained_values(model: PeftModel) -> dict[str, Tensor]:
    """The trained parameters, whole where they are sharded."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def calls_by_layer(model: PeftModel) -> list[int]:
    """How often `after_step` ran on each layer of a model with `Normed`."""
    return [layer.folklora_updates["default"].calls for layer in layers_of(model)]


def two_steps(config: AdapterConfig, shard: Callable[[PeftModel], None] | None = None) -> dict[str, Tensor]:
    """The trained parameters after two steps of SGD, over a model that `shard` has split."""
    model = tiny.moved(tiny.adapted(config)).train()
    if shard is not None:
        shard(model)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.3)
    for _ in range(2):
        torch.manual_seed(23)
        tiny.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained_values(model)


def sharded_methods() -> dict[str, AdapterConfig]:
    """Every installed method, one with penalties that count, and one with work after each step."""
    every = {method.name: method.factory(r=4, target_modules=tiny.TARGETS) for method in methods("adapters")}
    return {**every, "penalised": PENALISED, "normed": Normed(r=4, target_modules=tiny.TARGETS)}


def _fully_shard(model: PeftModel) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _main(results: Path) -> None:
    found: dict[str, object] = {}
    for accumulation in (1, 4):
        for penalised in (True, False):
            model = tiny.trainer_step(PENALISED, accumulation, penalised, same_rows(2))
            found[f"trainer {accumulation} {penalised}"] = trained_values(model)
        model = tiny.trainer_step(Normed(r=4, target_modules=tiny.TARGETS), accumulation, rows=same_rows(2))
        found[f"calls {accumulation}"] = calls_by_layer(model)
    for name, config in sharded_methods().items():
        try:
            found[f"sharded {name}"] = two_steps(config, _fully_shard)
        except Exception as error:
            found[f"sharded {name}"] = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        torch.save(found, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
