"""Penalties and after-step work count exactly once a step, in every way to split it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import folklora
from folklora import KaSA, tiny
from folklora.adapters.host.layer import layers_of

sys.path.insert(0, str(Path(__file__).parent))

import stepping


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes of one gloo group found; see stepping.py."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    results = tmp_path_factory.mktemp("pair") / "results.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, stepping.__file__, str(results)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(results)


@pytest.fixture(scope="module")
def formula() -> dict[str, torch.Tensor]:
    return tiny.penalty_gradients(tiny.precise(stepping.PENALISED))


def _one_process(accumulation: int, penalised: bool) -> dict[str, torch.Tensor]:
    return stepping.trained_values(
        tiny.trainer_step(stepping.PENALISED, accumulation, penalised, stepping.same_rows(1))
    )


@pytest.fixture(scope="module")
def steps(pair: dict[str, Any]) -> dict[tuple[int, int], tuple[dict, dict]]:
    """(accumulation, processes) -> the parameters after a step with penalties, and without."""
    found = {(n, 1): (_one_process(n, True), _one_process(n, False)) for n in (1, 4)}
    return found | {(n, 2): (pair[f"trainer {n} True"], pair[f"trainer {n} False"]) for n in (1, 4)}


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_the_penalty_enters_once_a_step(
    steps: dict, formula: dict[str, torch.Tensor], accumulation: int, processes: int
) -> None:
    penalised, free = steps[accumulation, processes]
    assert set(penalised) == set(formula)
    for name, gradient in formula.items():
        # the rate is 1, and float64 leaves some twelve digits of the difference
        assert torch.allclose(free[name] - penalised[name], gradient, rtol=1e-6, atol=1e-10), name
        assert torch.allclose(penalised[name], steps[1, 1][0][name], rtol=0, atol=1e-10), name


def test_the_formula_of_the_simplest_penalty(formula: dict[str, torch.Tensor]) -> None:
    model = tiny.precise(stepping.PENALISED)
    count = len(list(layers_of(model)))
    for name, value in model.named_parameters():
        if name.endswith(".d"):
            assert torch.allclose(formula[name], 2 * stepping.PENALISED.beta * value / count)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_after_step_runs_once_a_step(pair: dict[str, Any], accumulation: int) -> None:
    model = tiny.trainer_step(stepping.Normed(r=4, target_modules=tiny.TARGETS), accumulation)
    assert stepping.calls_by_layer(model) == [1] * 6
    assert pair[f"calls {accumulation}"] == [1] * 6
    for layer in layers_of(model):
        assert layer.folklora_updates["default"].A.norm() == pytest.approx(1)


@pytest.mark.parametrize("name", stepping.sharded_methods())
def test_sharded_by_fsdp2_a_method_trains_as_whole(pair: dict[str, Any], name: str) -> None:
    sharded = pair[f"sharded {name}"]
    assert not isinstance(sharded, str), sharded
    whole = stepping.two_steps(stepping.sharded_methods()[name])
    assert set(sharded) == set(whole)
    for key, value in whole.items():
        assert torch.allclose(sharded[key], value, rtol=1e-5, atol=1e-6), key


def test_a_loop_by_hand_needs_no_call() -> None:
    model = tiny.precise(stepping.PENALISED)
    expected = tiny.penalty_gradients(model)
    before = stepping.trained_values(model)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    for name, value in stepping.trained_values(model).items():
        assert torch.allclose(before[name] - value, 0.5 * expected[name]), name


def test_an_optimizer_is_given_the_penalties_of_what_it_holds_alone() -> None:
    model, other = tiny.precise(stepping.PENALISED), tiny.precise(stepping.PENALISED)
    before = stepping.trained_values(model)
    held = {name: value for name, value in model.named_parameters() if name.endswith(".d")}
    torch.optim.SGD(other.parameters(), lr=0.5).step()
    torch.optim.SGD(held.values(), lr=0.5).step()
    moved = {name for name, value in stepping.trained_values(model).items() if not torch.equal(value, before[name])}
    assert moved == set(held)


def test_an_adapter_that_is_not_trained_is_not_regularised() -> None:
    model = tiny.precise(stepping.PENALISED)
    everything = list(model.parameters())
    model.add_adapter("other", folklora.LoRA(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    before = {name: value.clone() for name, value in model.named_parameters()}
    torch.optim.SGD(everything, lr=0.5).step()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
    assert folklora.penalty(model) == 0


def test_the_value_for_logs_is_what_enters_the_loss() -> None:
    for reduction, divide in (("mean", 6), ("sum", 1)):
        config = KaSA(r=4, target_modules=tiny.TARGETS, beta=0.05, gamma=0.0, reduction=reduction)
        model = tiny.precise(config)
        squares = sum(float(v.square().sum()) for name, v in model.named_parameters() if name.endswith(".d"))
        assert float(folklora.penalty(model)) == pytest.approx(0.05 * squares / divide)
    assert folklora.penalty(get_peft_model(tiny.llama(), folklora.LoRA(target_modules=["q_proj"]))) == 0


def test_a_fused_optimizer_under_a_gradient_scaler_gets_the_scaled_gradient() -> None:
    model = tiny.precise(stepping.PENALISED)
    expected = tiny.penalty_gradients(model)
    before = stepping.trained_values(model)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0, fused=True)
    # as torch.amp.GradScaler leaves the optimizer before it calls a fused step
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(128.0), torch.tensor(0.0)
    optimizer.step()
    for name, value in stepping.trained_values(model).items():
        assert torch.allclose(before[name] - value, expected[name], rtol=1e-6, atol=1e-9), name
