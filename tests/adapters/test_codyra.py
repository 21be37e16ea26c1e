"""CoDyRA: thresholds, pruning and the border between tasks, with the reference code's schedule and operator redone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from folklora import CoDyRA, LoRA, export_lora, tiny
from folklora.adapters.codyra import compact, next_task
from folklora.adapters.host.layer import layers_of, updates_of

EPS32 = torch.finfo(torch.float32).eps
TARGETS = ["q", "v"]
R = 6


class Net(nn.Module):
    """A wide and a tall layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(32, 20), nn.Linear(20, 36, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(self.q(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(seed: int = 1, **options: Any) -> PeftModel:
    base = net()
    torch.manual_seed(seed)
    return get_peft_model(base, CoDyRA(**{"r": R, "target_modules": TARGETS} | options))


def inputs() -> Tensor:
    return torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(2))


def learnt(model: PeftModel, seed: int = 3, dead: int = 2) -> PeftModel:
    """The model as after a task: every value moved, and the first gates at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, (_, update) in enumerate(updates_of(model, "default")):
            for parameter in (update.A, update.B, update.w):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            update.w[: dead + index] = 0
    return model


def assert_close32(actual: Tensor, expected: Tensor) -> None:
    # sums of at most 36 terms in each of a few products
    tolerance = 100 * EPS32 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def kappas(config: CoDyRA, steps: int) -> list[float]:
    return [config.threshold(torch.tensor(t)).item() for t in range(steps)]


def reference_kappas(steps: int, dense: float, count: int, largest: float) -> list[float]:
    """The authors' loop: a list of thresholds, and an index that moves every so many iterations."""
    values, every = torch.linspace(0, largest, count).tolist(), int((steps - dense * steps) / count)
    index, found = 0, []
    for t in range(steps):
        if t >= dense * steps and t % every == 0:
            index = min(index + 1, count - 1)
        found.append(values[index] if t > dense * steps else 0.0)
    return found


@pytest.mark.parametrize(
    ("steps", "dense", "count", "largest", "total"),
    [(500, 0.5, 50, 0.005, 0.6499), (1000, 0.5, 50, 7e-4, 0.18199), (730, 0.2, 20, 0.01, None), (300, 0.0, 7, 1, None)],
)
def test_the_thresholds_are_the_reference_codes(
    steps: int, dense: float, count: int, largest: float, total: float | None
):
    found = kappas(CoDyRA(steps=steps, dense=dense, thresholds=count, kappa_max=largest), steps)
    assert found == pytest.approx(reference_kappas(steps, dense, count, largest), abs=1e-7)
    if total is not None:
        assert sum(found) == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("steps", [2, 5, 20, 49, 51, 101, 500])
@pytest.mark.parametrize("dense", [0.0, 0.5, 0.9])
def test_the_thresholds_rise_from_zero_to_the_largest_however_short_the_run(steps: int, dense: float):
    found = kappas(CoDyRA(steps=steps, dense=dense, kappa_max=0.3), steps + 10)
    assert found == sorted(found)
    assert set(found[: round(dense * steps) + 1]) == {0.0}
    assert found[steps + 1 :] == pytest.approx(9 * [0.3])
    if steps - round(dense * steps) >= 2:
        assert found[steps - 1] == pytest.approx(0.3)


@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.25])
def test_the_operators_on_a_grid(kappa: float):
    grid = torch.linspace(-1, 1, 161, dtype=torch.float64) + 1e-4
    threshold = torch.tensor(kappa, dtype=torch.float64)
    soft = CoDyRA().shrink(grid, threshold)
    torch.testing.assert_close(soft, F.softshrink(grid, kappa), rtol=0, atol=1e-15)
    # argmin_v (v - w)² / 2 + κ |v|, tried out
    tried = torch.linspace(-1.1, 1.1, 22001, dtype=torch.float64)
    best = tried[((tried - grid[:, None]).square() / 2 + kappa * tried.abs()).argmin(1)]
    torch.testing.assert_close(soft, best, rtol=0, atol=1.1e-4)
    reference = CoDyRA(reference_operator=True).shrink(grid, threshold)
    w = grid.clone()
    w[w > kappa] -= kappa
    w[w < -kappa] += kappa
    w[w.abs() < kappa] = 0
    assert torch.equal(reference, w)
    if kappa:
        assert (reference[grid.abs() < 2 * kappa] == 0).all()
        assert (soft != 0).sum() > (reference != 0).sum()


def test_the_start_is_the_base_with_gates_of_either_sign():
    model = adapted(r=20)
    assert torch.equal(model(inputs()), net()(inputs()))
    w = torch.cat([update.w for _, update in updates_of(model, "default")])
    assert (w > 0).any()
    assert (w < 0).any()
    assert w.std().item() == pytest.approx(1, abs=0.4)
    assert all((update.w == 1).all() for _, update in updates_of(adapted(gate_init="ones"), "default"))


def test_the_update_and_its_trainable_count():
    model = learnt(adapted(), dead=0)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == R * (32 + 20 + 1) + R * (20 + 36 + 1)
    for _, update in updates_of(model, "default"):
        explicit = sum(update.w[i] * torch.outer(update.B[:, i], update.A[i]) for i in range(R))
        assert_close32(update.factors().dense(), explicit)


def test_a_gate_at_zero_gets_a_gradient_and_its_component_none():
    model = learnt(adapted(), dead=2)
    x, goal = inputs(), torch.zeros(5, 7, 36)
    layer, update = next(updates_of(model, "default"))
    F.mse_loss(model(x), goal).backward()
    # dL/dW of the layer, from a dense weight in its place
    dense = (layer.get_base_layer().weight + update.factors().dense()).detach().requires_grad_()
    h = torch.tanh(F.linear(x, dense, layer.get_base_layer().bias))
    F.mse_loss(model.base_model.model.v(h), goal).backward()
    expected = torch.einsum("oi,or,ri->r", dense.grad, update.B, update.A)
    assert_close32(update.w.grad, expected)
    assert update.w.grad[:2].abs().min() > 0
    assert (update.A.grad[:2] == 0).all()
    assert (update.B.grad[:, :2] == 0).all()
    assert update.A.grad[2:].abs().min() > 0


def test_the_proximal_step_follows_each_optimizer_step():
    model = learnt(adapted(steps=8, dense=0.5, kappa_max=0.4), dead=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = kappas(model.peft_config["default"], 8)
    assert found[:5] == 5 * [0.0]
    assert found[5:] == sorted(found[5:])
    for t in range(8):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        before = [(u.w.detach().clone(), u.w.grad.clone()) for _, u in updates_of(model, "default")]
        optimizer.step()
        for (w, grad), (_, update) in zip(before, updates_of(model, "default"), strict=True):
            assert_close32(update.w, F.softshrink(w - 0.1 * grad, found[t]))
            assert update.step == t + 1
    assert any((update.w == 0).any() for _, update in updates_of(model, "default"))


def test_the_count_of_steps_is_saved(tmp_path: Path):
    model = adapted(steps=3, dense=0.0, kappa_max=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(2):
        optimizer.step()
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True, **options)
        assert [int(update.step) for _, update in updates_of(loaded, "default")] == [2, 2]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.q.folklora_updates.step"].dtype == torch.int64


@pytest.mark.parametrize("dead", [0, 2, R])
def test_compacted_the_pruned_ranks_are_gone_and_the_function_is_the_same(dead: int, tmp_path: Path):
    model = learnt(adapted(), dead=min(dead, R - 1))
    if dead == R:
        next(updates_of(model, "default"))[1].w.data.zero_()
    x, expected = inputs(), model(inputs())
    left = {layer.name: int((update.w != 0).sum()) for layer, update in updates_of(model, "default")}
    for layer, update in updates_of(model, "default"):
        assert torch.linalg.matrix_rank(update.factors().dense()) <= left[layer.name]
    assert compact(model) == left
    for layer, update in updates_of(model, "default"):
        r = left[layer.name]
        assert (update.A.shape[0], update.B.shape[1], update.w.shape[0]) == (r, r, r)
        assert all(p.requires_grad for p in (update.A, update.B, update.w))
    assert_close32(model(x), expected)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == left["q"] * (32 + 20 + 1) + left["v"] * (20 + 36 + 1)
    model(x).square().mean().backward()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert compact(loaded) == left


def test_the_export_has_the_rank_that_is_left(tmp_path: Path):
    model = learnt(adapted(), dead=R - 1)
    assert export_lora(model, tmp_path / "lora") == {"q": 1, "v": 1}
    stock = PeftModel.from_pretrained(net(), tmp_path / "lora")
    assert_close32(stock(inputs()), model(inputs()))


def test_after_a_task_the_function_stays_and_learning_starts_anew():
    model = learnt(adapted(), dead=2)
    for _, update in updates_of(model, "default"):
        update.step.fill_(77)
    x, expected = inputs(), model(inputs())
    assert next_task(model) == {"q": 4, "v": 3}
    assert_close32(model(x), expected)
    for _, update in updates_of(model, "default"):
        assert update.A.shape[0] == R
        assert (update.B == 0).all()
        assert (update.w != 0).all()
        assert int(update.step) == 0
    trained = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"A", "B", "w"}
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))


def test_the_history_replays_every_task_from_the_first_weights(tmp_path: Path):
    model, totals = adapted(rank_pattern={"v": 4}), {name: net().get_submodule(name).weight.clone() for name in TARGETS}
    for task in range(3):
        learnt(model, seed=task, dead=1)
        for layer, update in updates_of(model, "default"):
            totals[layer.name] = totals[layer.name] + (update.B * update.w) @ update.A
        if task == 1:
            compact(model)
        next_task(model)
    for layer, update in updates_of(model, "default"):
        current = layer.get_base_layer().weight + update.old_B @ update.old_A
        assert_close32(current, totals[layer.name])
    assert model.peft_config["default"].history == {"q": 15, "v": 6}
    assert not model.peft_config["default"].ranks
    assert next(updates_of(model, "default"))[1].A.shape[0] == R
    learnt(model, seed=9, dead=1)
    expected = model(inputs())
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(inputs()), expected)
    model.merge_adapter()
    assert_close32(model(inputs()), expected)
    merged = [layer.get_base_layer().weight.clone() for layer in layers_of(model)]
    model.merge_adapter()
    assert all(torch.equal(a, layer.get_base_layer().weight) for a, layer in zip(merged, layers_of(model), strict=True))


def test_tasks_that_leave_no_gate_open_leave_nothing():
    model = learnt(adapted(), dead=R)
    for _ in range(2):
        for _, update in updates_of(model, "default"):
            update.w.data.zero_()
        assert next_task(model) == {"q": 0, "v": 0}
    assert torch.equal(model(inputs()), net()(inputs()))


def test_dropout_leaves_what_earlier_tasks_learnt_alone():
    model = learnt(adapted(dropout=0.5), dead=0)
    next_task(model)
    layer, update = next(updates_of(model, "default"))
    kept = inputs() @ update.old_A.T @ update.old_B.T
    assert_close32(layer.train()(inputs()), layer.get_base_layer()(inputs()) + kept)


def run(kappa: float) -> tuple[float, int, float]:
    """What is left of the loss on a change of rank 2 learnt at rank 8, the gates left, and the size of the update."""
    generator = torch.Generator().manual_seed(4)
    change = torch.randn(24, 2, generator=generator) @ torch.randn(2, 24, generator=generator) / 8
    x = torch.randn(256, 24, generator=generator)
    torch.manual_seed(0)
    config = CoDyRA(r=8, steps=300, kappa_max=kappa, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(24, 24, bias=False)), config)
    with torch.no_grad():
        goal = model(x) + x @ change.T
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, betas=(0.9, 0.9999), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), goal) / (x @ change.T).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
    update = next(updates_of(model, "default"))[1]
    return loss.item(), int((update.w != 0).sum()), update.factors().dense().norm().item()


def test_thresholds_lower_the_rank_and_the_size_of_the_update_and_gates_alone_do_not():
    losses, ranks, sizes = zip(*(run(kappa) for kappa in (0.0, 0.005, 0.01)), strict=True)
    assert ranks[0] == 8 > ranks[1] > ranks[2] >= 2
    assert sizes[0] > sizes[1] > sizes[2]
    # the paper's threshold still learns the task; twice that costs some of it
    assert losses[0] < 0.01 < losses[1] < 0.1 < losses[2] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank r must be"),
        ({"gate_init": "zero"}, "gate_init must be"),
        ({"steps": 0}, "steps >= 1"),
        ({"thresholds": 1}, "thresholds >= 2"),
        ({"dense": 1.0}, "dense from 0 to below 1"),
        ({"kappa_max": -1e-3}, "kappa_max >= 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CoDyRA(**options)


@pytest.mark.parametrize("call", [compact, next_task])
def test_another_adapter_is_refused(call: Any):
    model = get_peft_model(tiny.llama(), LoRA(r=2, target_modules=["q_proj"]))
    for name in ("default", "other"):
        with pytest.raises(ValueError, match=f"no CoDyRA adapter named '{name}'"):
            call(model, name)
