"""Penalties and after-step work count exactly once a step, in every way to split it.

Run as a script (torchrun --nproc_per_node=2 test_steps.py RESULTS) this file is one of the two processes.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor

import folklora
from folklora import DiffoRA, KaSA, LoRA, SMoRA, methods, tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.diffora import Search, gates
from folklora.adapters.host.aside import others_aside
from folklora.adapters.host.layer import layers_of, updates_of
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


def balances(rows: Tensor) -> list[Tensor]:
    """How SMoRA's balances moved in a step that saw these rows, by layer."""
    model = tiny.adapted(SMoRA(r=8, k=3, balance_rate=1.0, target_modules=tiny.TARGETS)).train()
    model(input_ids=rows, labels=rows).loss.backward()
    torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.0).step()
    return [update.balance.detach() for _, update in updates_of(model, "default")]


def sharded_methods() -> dict[str, AdapterConfig]:
    """Every installed method, one whose layers share trained parameters, one with penalties, one with after-steps."""
    factories = [method.factory for method in methods("adapters")]
    every = {own.method: tiny.sized(own, target_modules=tiny.targets_of(own)) for own in factories}
    every["shared pairs"] = DiffoRA(r=4, target_modules=tiny.TARGETS, selected=["model.layers.0.self_attn.q_proj"])
    return {**every, "penalised": PENALISED, "normed": Normed(r=4, target_modules=tiny.TARGETS)}


def _fully_shard(model: PeftModel) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes of one gloo group found; see py."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    results = tmp_path_factory.mktemp("pair") / "results.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, __file__, str(results)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(results)


@pytest.fixture(scope="module")
def formula() -> dict[str, Tensor]:
    return tiny.penalty_gradients(tiny.precise(PENALISED))


def _one_process(accumulation: int, penalised: bool) -> dict[str, Tensor]:
    model = tiny.trainer_step(PENALISED, accumulation, penalised, same_rows(1))
    return trained_values(model)


@pytest.fixture(scope="module")
def steps(pair: dict[str, Any]) -> dict[tuple[int, int], tuple[dict, dict]]:
    """(accumulation, processes) -> the parameters after a step with penalties, and without."""
    found = {(n, 1): (_one_process(n, True), _one_process(n, False)) for n in (1, 4)}
    return found | {(n, 2): (pair[f"trainer {n} True"], pair[f"trainer {n} False"]) for n in (1, 4)}


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_the_penalty_enters_once_a_step(
    steps: dict, formula: dict[str, Tensor], accumulation: int, processes: int
) -> None:
    penalised, free = steps[accumulation, processes]
    assert set(penalised) == set(formula)
    for name, gradient in formula.items():
        # the rate is 1, and float64 leaves some twelve digits of the difference
        assert torch.allclose(free[name] - penalised[name], gradient, rtol=1e-6, atol=1e-10), name
        assert torch.allclose(penalised[name], steps[1, 1][0][name], rtol=0, atol=1e-10), name


def test_the_formula_of_the_simplest_penalty(formula: dict[str, Tensor]) -> None:
    model = tiny.precise(PENALISED)
    count = len(list(layers_of(model)))
    for name, value in model.named_parameters():
        if name.endswith(".d"):
            assert torch.allclose(formula[name], 2 * PENALISED.beta * value / count)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_after_step_runs_once_a_step(pair: dict[str, Any], accumulation: int) -> None:
    model = tiny.trainer_step(Normed(r=4, target_modules=tiny.TARGETS), accumulation)
    assert calls_by_layer(model) == [1] * 6
    assert pair[f"calls {accumulation}"] == [1] * 6
    for layer in layers_of(model):
        assert float(layer.folklora_updates["default"].A.norm()) == pytest.approx(1)


def test_the_load_of_smoras_ranks_is_that_of_all_processes(pair: dict[str, Any]) -> None:
    rows = tiny.batch()["input_ids"]
    together, half = balances(rows), balances(rows[:2])
    assert not all(torch.equal(*both) for both in zip(half, together, strict=True))
    for found in pair["balances"]:
        assert all(torch.equal(*both) for both in zip(found, together, strict=True))


@pytest.mark.parametrize("name", sharded_methods())
def test_sharded_by_fsdp2_a_method_trains_as_whole(pair: dict[str, Any], name: str) -> None:
    sharded = pair[f"sharded {name}"]
    assert not isinstance(sharded, str), sharded
    whole = two_steps(sharded_methods()[name])
    assert set(sharded) == set(whole)
    for key, value in whole.items():
        assert torch.allclose(sharded[key], value, rtol=1e-5, atol=1e-6), key


def test_a_loop_by_hand_needs_no_call() -> None:
    model = tiny.precise(PENALISED)
    expected = tiny.penalty_gradients(model)
    before = trained_values(model)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    for name, value in trained_values(model).items():
        assert torch.allclose(before[name] - value, 0.5 * expected[name]), name


def test_an_optimizer_is_given_the_penalties_of_what_it_holds_alone() -> None:
    model, other = tiny.precise(PENALISED), tiny.precise(PENALISED)
    before = trained_values(model)
    held = {name: value for name, value in model.named_parameters() if name.endswith(".d")}
    torch.optim.SGD(other.parameters(), lr=0.5).step()
    torch.optim.SGD(held.values(), lr=0.5).step()
    moved = {name for name, value in trained_values(model).items() if not torch.equal(value, before[name])}
    assert moved == set(held)


def test_an_adapter_that_is_not_trained_is_not_regularised() -> None:
    model = tiny.precise(PENALISED)
    everything = list(model.parameters())
    model.add_adapter("other", LoRA(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    before = {name: value.clone() for name, value in model.named_parameters()}
    torch.optim.SGD(everything, lr=0.5).step()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
    assert folklora.penalty(model) == 0


def test_an_adapter_set_aside_and_put_back_is_regularised_and_a_deleted_one_is_not() -> None:
    config = replace(PENALISED, reduction="sum")
    model = tiny.precise(config)
    whole = folklora.penalty(model)
    assert whole > 0
    with others_aside(model):
        assert folklora.penalty(model) == 0
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    for one in (model, copy.deepcopy(model)):
        assert folklora.penalty(one) == whole
    name = next(iter(model.peft_config))
    model.add_adapter("other", LoRA(r=2, target_modules=["q_proj"]))
    model.delete_adapter(name)
    assert folklora.penalty(model) == 0
    model.add_adapter(name, config)
    model.set_adapter(name)
    once = sum(float(update.penalty()) for _, update in updates_of(model, name))
    assert once > 0
    assert float(folklora.penalty(model)) == pytest.approx(once)


def test_an_adapter_that_takes_the_place_of_its_namesake_is_asked_once() -> None:
    for config in (replace(PENALISED, reduction="sum"), Normed(r=4, target_modules=tiny.TARGETS)):
        model = tiny.precise(config)
        name = next(iter(model.peft_config))
        # PeftModel.add_adapter refuses a name that is there, the tuner by itself does not
        model.base_model.inject_adapter(model.get_base_model(), name)
        model.set_adapter(name)
        once = sum(float(update.penalty() or 0) for _, update in updates_of(model, name))
        assert float(folklora.penalty(model)) == pytest.approx(once)
        torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.0).step()
    assert set(calls_by_layer(model)) == {1}


def test_the_value_for_logs_is_what_enters_the_loss() -> None:
    for reduction, divide in (("mean", 6), ("sum", 1)):
        config = KaSA(r=4, target_modules=tiny.TARGETS, beta=0.05, gamma=0.0, reduction=reduction)
        model = tiny.precise(config)
        squares = sum(float(v.square().sum()) for name, v in model.named_parameters() if name.endswith(".d"))
        assert float(folklora.penalty(model)) == pytest.approx(0.05 * squares / divide)
    assert folklora.penalty(get_peft_model(tiny.llama(), LoRA(target_modules=["q_proj"]))) == 0


def test_a_fused_optimizer_under_a_gradient_scaler_gets_the_scaled_gradient() -> None:
    model = tiny.precise(PENALISED)
    expected = tiny.penalty_gradients(model)
    before = trained_values(model)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0, fused=True)
    # as torch.amp.GradScaler leaves the optimizer before it calls a fused step
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(128.0), torch.tensor(0.0)
    optimizer.step()
    for name, value in trained_values(model).items():
        assert torch.allclose(before[name] - value, expected[name], rtol=1e-6, atol=1e-9), name


def gates_after_two_steps(halves: list[int]) -> dict[str, float]:
    """γ after two validation steps on these halves of the batch."""
    model = tiny.moved(tiny.adapted(DiffoRA(r=4, target_modules=tiny.TARGETS)))
    rows = [tiny.batch()["input_ids"][2 * half : 2 * half + 2] for half in halves]
    search = Search(model, [rows], loss=lambda called, parts: sum(called(p, labels=p).loss for p in parts) / len(parts))
    for _ in range(2):
        search.step()
    return gates(model)


def test_validation_steps_read_what_all_processes_read(pair: dict[str, Any]) -> None:
    assert pair["gates"] == pytest.approx(gates_after_two_steps([0, 1]), rel=1e-6)
    assert pair["gates"] != pytest.approx(gates_after_two_steps([0]), rel=1e-6)


def _main(results: Path) -> None:
    found: dict[str, object] = {}
    for accumulation in (1, 4):
        for penalised in (True, False):
            model = tiny.trainer_step(PENALISED, accumulation, penalised, same_rows(2))
            found[f"trainer {accumulation} {penalised}"] = trained_values(model)
        model = tiny.trainer_step(Normed(r=4, target_modules=tiny.TARGETS), accumulation, rows=same_rows(2))
        found[f"calls {accumulation}"] = calls_by_layer(model)
    half = tiny.batch()["input_ids"].chunk(2)[dist.get_rank()]
    dist.all_gather_object(balanced := [None, None], balances(half))
    found["balances"] = balanced
    for name, config in sharded_methods().items():
        try:
            found[f"sharded {name}"] = two_steps(config, _fully_shard)
        except Exception as error:
            found[f"sharded {name}"] = f"{type(error).__name__}: {error}"
    found["gates"] = gates_after_two_steps([dist.get_rank()])
    if dist.get_rank() == 0:
        torch.save(found, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
