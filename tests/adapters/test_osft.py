"""OSFT: what is protected stays protected under AdamW; a decomposition, dense autograd and PEFT as oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OSFConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import OSFT, LoRA, export_lora, tiny
from folklora.adapters.host.layer import updates_of
from folklora.adapters.osft import OSFTUpdate, next_task

EPS32 = torch.finfo(torch.float32).eps
# wide, tall and square
SHAPES = [(20, 32), (36, 20), (24, 24)]
TARGETS = ["q", "v"]


class Three(tiny.TwoLayers):
    """A square layer after the wide and the tall one, named `o`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.o = nn.Linear(36, 36)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(super().forward(x)))


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    options = {"r": 6, "target_modules": ["q", "v", "o"]} | options
    return get_peft_model(Three() if base is None else base, OSFT(**options))


def inputs(columns: int = 32, rows: int = 16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def weight_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)) / shape[1] ** 0.5


def moved(update: OSFTUpdate, size: float = 0.1) -> OSFTUpdate:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in (update.U, update.s, update.V):
            value += size * torch.randn(value.shape, generator=generator)
    return update


def strongest(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_h [out, k], σ_h [k], V_h [in, k], float64."""
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def change_of(update: OSFTUpdate) -> Tensor:
    return update.factors().dense().detach().double()


def train(model: nn.Module, steps: int = 5, optimizer: Any = torch.optim.AdamW, **options: Any) -> list[float]:
    x, losses = inputs(), []
    target = torch.randn(16, 36, generator=torch.Generator().manual_seed(9))
    tuned = optimizer([p for p in model.parameters() if p.requires_grad], **options)
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        tuned.step()
        tuned.zero_grad()
    return losses


@pytest.mark.parametrize("shape", SHAPES)
def test_the_protected_and_the_trained_part_make_up_the_weight_for_every_k(shape: tuple[int, int]):
    weight = weight_of(shape)
    for k in range(min(shape)):
        update = OSFT(r=min(shape) - k).update(weight)
        U, S, V = strongest(weight, k)
        whole = (U * S) @ V.T + (update.U0 * update.s0).double() @ update.V0.double().T
        torch.testing.assert_close(whole, weight.double(), rtol=0, atol=1e-5)
        assert torch.cat([U.T @ update.U.double(), V.T @ update.V.double()]).norm() < 1e-5
        assert not update.factors().dense().any(), "the start is the base, to the bit"


@pytest.mark.parametrize(("short", "share", "k"), [(10, 0.25, 7), (10, 0.9, 1), (7, 0.01, 6), (4, 1.0, 0), (3, 0.5, 1)])
def test_the_share_gives_the_rank(short: int, share: float, k: int):
    assert OSFT(unfreeze_rank_ratio=share).rank((short, 12)) == short - k


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [5, 20])
def test_function_and_gradients_are_those_of_the_dense_formula(shape: tuple[int, int], r: int):
    weight, k = weight_of(shape), min(shape) - r
    update = moved(OSFT(r=r).update(weight))
    U_h, S_h, V_h = strongest(weight, k)
    U, s, V = (p.detach().double().requires_grad_() for p in (update.U, update.s, update.V))
    off_U, off_V = U - U_h @ (U_h.T @ U), V - V_h @ (V_h.T @ V)
    dense = (U_h * S_h) @ V_h.T + (off_U * s) @ off_V.T
    x, g = inputs(shape[1]).double(), inputs(shape[0]).double()
    expected = torch.autograd.grad((x @ dense.T * g).sum(), (U, s, V))
    torch.testing.assert_close(weight.double() + change_of(update), dense.detach(), rtol=0, atol=1e-5)
    found = (x.float() @ update.factors().dense().T * g.float()).sum()
    found = torch.autograd.grad(found, (update.U, update.s, update.V))
    for one, other in zip(found, expected, strict=True):
        # sums of 16 rows and up to 36 columns of products of order 1
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    if k:
        assert (U_h.T @ found[0].double()).abs().max() < 1e-4
        assert (V_h.T @ found[2].double()).abs().max() < 1e-4


def test_200_steps_of_adamw_with_weight_decay_leave_the_protected_subspace_alone():
    model = adapted()
    protected = {
        layer.name: strongest(layer.get_base_layer().weight, min(layer.get_base_layer().weight.shape) - 6)
        for layer, _ in updates_of(model, "default")
    }
    for _ in range(4):
        train(model, steps=50, lr=1e-3, weight_decay=0.1)
        for layer, update in updates_of(model, "default"):
            U_h, _, V_h = protected[layer.name]
            change = change_of(update)
            assert change.abs().max() > 0.01
            for product in (U_h.T @ update.U.double(), V_h.T @ update.V.double(), U_h.T @ change, change @ V_h):
                assert product.abs().max() < 1e-5


def test_projected_gradients_alone_would_leave_it_under_adamw():
    update = OSFT(r=6).update(weight_of((20, 32)))
    optimizer = torch.optim.AdamW([update.U, update.s, update.V], lr=1e-3)
    x, y = inputs(32), inputs(20)
    for _ in range(100):
        loss = (x @ update.factors().dense().T - y).square().mean()
        loss.backward()
        # no layer of a model carries this update, so nothing projects its parameters
        optimizer.step()
        optimizer.zero_grad()
    U_h, _, V_h = strongest(weight_of((20, 32)), 14)
    assert (V_h.T @ update.V.detach().double()).abs().max() > 1e-4
    assert (U_h.T @ change_of(update)).abs().max() < 1e-5, "what is computed is projected all the same"
    before = change_of(update)
    with torch.no_grad():
        update.after_step()
    assert (V_h.T @ update.V.detach().double()).abs().max() < 1e-5
    torch.testing.assert_close(change_of(update), before, rtol=0, atol=1e-6)


def test_inputs_in_the_protected_span_see_the_base():
    model = adapted(tiny.TwoLayers(), target_modules=["q"])
    base = tiny.TwoLayers()
    _, _, V_h = strongest(base.q.weight, 14)
    x = (V_h @ torch.randn(14, 8, generator=torch.Generator().manual_seed(5)).double()).T.float()
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value += 0.2
    assert (model(inputs()) - base(inputs())).abs().max() > 0.1
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_equals_pefts_osf_where_that_keeps_the_subspace(optimizer: type):
    model = adapted(target_modules=TARGETS)
    theirs = get_peft_model(Three(), OSFConfig(effective_rank=14, target_modules=TARGETS))
    torch.testing.assert_close(theirs(inputs()), model(inputs()), rtol=0, atol=1e-5)
    # the signs of singular vectors are free: Adam sees each element's own gradient, and a sign turns with it
    ours, others = (
        train(one, 5, optimizer, lr=1e-2 if optimizer is torch.optim.SGD else 1e-4) for one in (model, theirs)
    )
    assert ours == pytest.approx(others, rel=1e-4)
    assert ours[-1] < ours[0]


def test_counts_and_export_at_the_true_rank(tmp_path: Path):
    model = adapted()
    counts = [OSFT(r=6).trainable_count(shape) for shape in ((20, 32), (36, 20), (36, 36))]
    assert counts == [6 * 53, 6 * 57, 6 * 73]
    assert model.get_nb_trainable_parameters()[0] == sum(counts)
    assert {u.protected is None for layer, u in updates_of(model, "default") if layer.name == "o"} == {True}
    train(model)
    assert export_lora(model, tmp_path / "lora") == {"q": 6, "v": 6, "o": 6}
    stock = PeftModel.from_pretrained(Three(), tmp_path / "lora")
    torch.testing.assert_close(stock(inputs()), model(inputs()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_over_a_bfloat16_base_and_under_autocast_the_start_is_the_base(half: bool):
    base = Three().bfloat16() if half else Three()
    x = inputs().bfloat16() if half else inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not half):
        expected = base(x)
        assert torch.equal(adapted(base)(x), expected)


def test_a_new_task_protects_the_strongest_directions_of_the_changed_weight(tmp_path: Path):
    model = adapted(r=10)
    train(model, lr=1e-2)
    before = model(inputs())
    first = {layer.name: change_of(update) for layer, update in updates_of(model, "default")}
    protected = next_task(model, {"q": 4, "v": 5})
    assert protected == {"q": 16, "v": 15, "o": 26}
    # two roundings of float32 a layer, three layers
    torch.testing.assert_close(model(inputs()), before, rtol=0, atol=1e-5)
    assert model.peft_config["default"].history == {"q": 10, "v": 10, "o": 10}
    train(model, lr=1e-2)
    for layer, update in updates_of(model, "default"):
        weight = layer.get_base_layer().weight.detach().double() + first[layer.name]
        U_h, _, V_h = strongest(weight, protected[layer.name])
        second = change_of(update) - first[layer.name]
        assert second.abs().max() > 0.01
        assert (U_h.T @ second).abs().max() < 1e-5
        assert (second @ V_h).abs().max() < 1e-5
    assert (model(inputs()) - before).abs().max() > 0.01
    check_it_saves_merges_and_leaves_the_base(model, tmp_path)


def check_it_saves_merges_and_leaves_the_base(model: PeftModel, folder: Path) -> None:
    expected = model(inputs())
    model.save_pretrained(folder / "saved")
    with tiny.NoDecomposition():
        loaded = PeftModel.from_pretrained(Three(), folder / "saved", is_trainable=True)
    assert torch.equal(loaded(inputs()), expected)
    next_task(model), next_task(loaded)
    assert torch.equal(loaded(inputs()), model(inputs()))
    with model.disable_adapter():
        assert torch.equal(model(inputs()), Three()(inputs()))
    model.merge_adapter()
    torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="layer 'q' is merged"):
        next_task(model)


def test_the_kept_change_never_outgrows_the_weight():
    model = adapted(r=16, target_modules=TARGETS)
    for _ in range(3):
        train(model, steps=2, lr=1e-2)
        next_task(model)
    assert set(model.peft_config["default"].history.values()) <= set(range(16, 21))
    untouched = adapted()
    next_task(untouched)
    assert untouched.peft_config["default"].history == {}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rank 21 is above 20"):
        adapted(r=21)
    with pytest.raises(ValueError, match="unfreeze_rank_ratio must be above 0"):
        OSFT(unfreeze_rank_ratio=0.0)
    model = adapted()
    with pytest.raises(ValueError, match=r"(?s)no layer 'k'.*'q' can train 1 to 20 directions, not 21"):
        next_task(model, {"k": 3, "q": 21})
    with pytest.raises(ValueError, match="no OSFT adapter named 'default'"):
        next_task(get_peft_model(Three(), LoRA(target_modules=["q"])))
