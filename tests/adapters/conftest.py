"""A group of one process, saved adapters that ScaLearn and AdapterFusion compose, and what each computes, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from folklora import LoRA, VLAdapter, tiny

Outputs = Callable[[str, str, Tensor, Tensor], Tensor]


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of processes, which FSDP asks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def bottlenecks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three relu bottlenecks of a tiny Llama, of other widths and forms; the last is on half of the layers."""
    own = {"activation": "relu", "start": "normal"}
    both = ["o_proj", "down_proj"]
    return _saved(
        tmp_path_factory.mktemp("bottlenecks"),
        {
            "art": VLAdapter(**own, target_modules=both),
            "bar": VLAdapter(**own, form="compacter", factor_rank=1, reduction_factor=4, target_modules=both),
            "cow": VLAdapter(**own, bottleneck_size=3, target_modules=["down_proj"]),
        },
    )


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A LoRA of PEFT and one of Folklora."""
    stock = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    own = LoRA(r=2, alpha=5, target_modules=["down_proj"])
    return _saved(tmp_path_factory.mktemp("loras"), {"own": own, "stock": stock})


def _saved(folder: Path, configs: dict[str, peft.PeftConfig]) -> dict[str, str]:
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = get_peft_model(tiny.llama(), config)
        with torch.no_grad():
            for value in model.parameters():
                value += 0.1 * torch.randn_like(value) * value.requires_grad
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


@pytest.fixture(scope="session")
def output_of() -> Outputs:
    """`output_of(folder, layer, x, y)`: a bottleneck's o_t from its file alone, in float64; 0 where it has none."""

    def output(folder: str, layer: str, x: Tensor, y: Tensor) -> Tensor:
        prefix = f"base_model.model.{layer}.folklora_updates."
        saved = load_file(f"{folder}/adapter_model.safetensors")
        own = {key.removeprefix(prefix): value.double() for key, value in saved.items() if key.startswith(prefix)}
        if not own:
            return torch.zeros_like(y)
        weights = [_matrix(own, side) for side in ("down.0", "up.0")]
        z = torch.relu(F.linear(y, weights[0], own["down.0.bias"]))
        return F.linear(z, weights[1], own["up.0.bias"])

    return output


def _matrix(own: dict[str, Tensor], side: str) -> Tensor:
    if f"{side}.weight" in own:
        return own[f"{side}.weight"]
    W = own[f"{side}.W.0"] @ own[f"{side}.W.1"]
    return sum(torch.kron(C, term) for C, term in zip(own[f"{side}.C"], W, strict=True)).T


@pytest.fixture(scope="session")
def by_hand() -> Callable[[Callable[[str, Tensor, Tensor], Tensor], list[str]], Tensor]:
    """`by_hand(added, layers)`: logits of a Llama in float64 whose layers' outputs y become y + added(name, x, y)."""

    def logits(added: Callable[[str, Tensor, Tensor], Tensor], layers: list[str]) -> Tensor:
        base = tiny.llama(dtype=torch.float64)
        for name in layers:
            base.get_submodule(name).register_forward_hook(_Adds(name, added))
        return tiny.logits(base)

    return logits


class _Adds:
    def __init__(self, name: str, added: Callable[[str, Tensor, Tensor], Tensor]) -> None:
        self.name, self.added = name, added

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        return y + self.added(self.name, args[0], y)
