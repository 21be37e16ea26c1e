"""SVFit: the singular values alone, against closed forms and planted tasks; what its file holds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from folklora import SVFit, export_lora, factored_linear, spectrum, tiny
from folklora.adapters.host.layer import updates_of

EPS32 = torch.finfo(torch.float32).eps
SHAPES = [(20, 32), (36, 20), (24, 24)]
R = 6


def weight_of(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_values(values: list[float], m: int = 12, n: int = 9) -> Tensor:
    """A weight with these singular values."""
    U, V = (torch.linalg.qr(weight_of((side, len(values)), side).double()).Q for side in (m, n))
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.T


def shifted(update: nn.Module) -> nn.Module:
    with torch.no_grad():
        update.delta += torch.linspace(-1.0, 2.0, len(update.delta))
    return update


def nets(values: list[float]) -> tuple[nn.Sequential, nn.Sequential]:
    """Two equal models of one layer with these singular values."""
    made = [nn.Sequential(nn.Linear(9, 12, bias=False)) for _ in range(2)]
    for model in made:
        model[0].weight.data = with_values(values).float()
    return made[0], made[1]


def file_values(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_base_bit_for_bit(shape: tuple[int, int]):
    weight, x = weight_of(shape), weight_of((5, shape[1]), 3)
    update = SVFit(r=R).update(weight)
    assert (update.factors().dense() == 0).all()
    bias = weight_of((1, shape[0]), 4)[0]
    assert torch.equal(factored_linear(x, weight, bias, update.factors()), F.linear(x, weight, bias))
    torch.testing.assert_close(update.sigma, torch.linalg.svdvals(weight)[:R], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_frame_is_orthonormal_and_splits_the_weight(shape: tuple[int, int]):
    weight = weight_of(shape)
    update = SVFit(r=R).update(weight)
    for vectors in (update.U, update.V):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(R), rtol=0, atol=1e-5)
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rest = (U[:, R:] * S[R:]) @ Vh[R:]
    torch.testing.assert_close((update.U * update.S) @ update.V.T + rest, weight.double(), rtol=0, atol=1e-5)


def test_trainable_count():
    config = SVFit(r=768)
    assert 24 * config.trainable_count((768, 768)) == 18432
    model = tiny.adapted(SVFit(r=R, target_modules=tiny.TARGETS))
    assert model.get_nb_trainable_parameters()[0] == R * len(list(updates_of(model, "default")))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_weight_has_the_trained_values_and_the_frozen_tail(shape: tuple[int, int]):
    weight = weight_of(shape)
    update = shifted(SVFit(r=R).update(weight))
    with torch.no_grad():
        # the sign is free
        update.delta[1] = -1.5 * update.S[1]
    merged = weight.double() + update.factors().dense().detach().double()
    tail = torch.linalg.svdvals(weight.double())[R:]
    expected = torch.cat([update.sigma.detach().double().abs(), tail]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(merged), expected, rtol=0, atol=1e-5)
    x = weight_of((5, shape[1]), 3)
    actual = factored_linear(x, weight, None, update.factors())
    torch.testing.assert_close(actual, (x.double() @ merged.T).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_that_of_the_weight_between_the_vectors(shape: tuple[int, int]):
    weight = weight_of(shape).double()
    update = shifted(SVFit(r=R).update(weight).double())
    x, goal = weight_of((50, shape[1]), 3).double(), weight_of((50, shape[0]), 4).double()
    F.mse_loss(factored_linear(x, weight, None, update.factors()), goal).backward()
    merged = (weight + update.factors().dense().detach()).requires_grad_()
    F.mse_loss(F.linear(x, merged), goal).backward()
    expected = torch.einsum("oi,or,ir->r", merged.grad, update.U, update.V)
    torch.testing.assert_close(update.delta.grad, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().min() > 1e-6


@pytest.mark.parametrize(("energy_of", "rank"), [("s2", 2), ("s", 3)])
def test_the_rank_by_energy(energy_of: str, rank: int):
    weight = with_values([3.0, 1.0, 0.1])
    assert SVFit(energy_of=energy_of).chosen_rank(weight) == rank
    assert SVFit(r=1, energy_of=energy_of).chosen_rank(weight) is None


def test_ranks_found_by_energy_are_noted_saved_and_loaded(tmp_path: Path):
    config = SVFit(energy=0.8, target_modules=tiny.TARGETS, rank_pattern={"v_proj": 3})
    model = tiny.trained(config)
    ranks = export_lora(model, tmp_path / "lora")
    for layer, update in updates_of(model, "default"):
        S = torch.linalg.svdvals(layer.get_base_layer().weight.double()).square()
        r = len(update.delta)
        assert ranks[layer.name] == r
        if layer.name.endswith("v_proj"):
            assert r == 3
        else:
            assert S[: r - 1].sum() < 0.8 * S.sum() <= S[:r].sum()
    assert len(set(ranks.values())) > 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_without_a_rank_there_are_no_shapes():
    with pytest.raises(ValueError, match="give r where there are none yet"):
        SVFit().empty((20, 32))


def regression(weight: Tensor, target: Tensor, rank: int, steps: int = 400) -> tuple[nn.Module, float]:
    """SVFit trained until W x is target x; the update and the last ‖target - W'‖²."""
    update = SVFit(r=rank).update(weight).double()
    optimizer = torch.optim.LBFGS(update.parameters(), max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight + update.factors().dense() - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return update, closure().item()


def test_it_recovers_a_planted_rescaling():
    weight = weight_of((20, 20)).double()
    U, S, Vh = torch.linalg.svd(weight)
    c = torch.empty(20, dtype=torch.float64).uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(5))
    update, _ = regression(weight, (U * (S * c)) @ Vh, 20)
    torch.testing.assert_close(update.sigma.detach() / S, c, rtol=0, atol=1e-3)


def test_a_planted_rotation_stays_at_its_floor():
    weight = weight_of((20, 20)).double()
    rotated = torch.linalg.qr(weight_of((20, 20), 7).double()).Q @ weight
    _, loss = regression(weight, rotated, 20)
    U, _, Vh = torch.linalg.svd(weight)
    floor = rotated.square().sum() - torch.einsum("oi,or,ri->r", rotated, U, Vh).square().sum()
    assert loss == pytest.approx(floor.item(), rel=1e-6)
    assert loss > 0.5 * rotated.square().sum()


def test_components_of_no_weight_have_no_effect():
    weight = with_values([3.0, 1.0]).float()
    with pytest.warns(UserWarning, match="not unique"):
        update = SVFit(r=4).update(weight)
    with torch.no_grad():
        update.delta.fill_(1.0)
    dense = update.factors().dense()
    torch.testing.assert_close(torch.linalg.svdvals(dense), torch.tensor([1.0, 1.0] + 7 * [0.0]), rtol=0, atol=1e-5)
    dense.sum().backward()
    assert (update.delta.grad[2:] == 0).all()


@pytest.mark.parametrize("save_vectors", [False, True])
def test_what_is_saved_and_that_it_loads_onto_a_fresh_base(tmp_path: Path, save_vectors: bool):
    model = tiny.trained(SVFit(r=R, save_vectors=save_vectors, target_modules=tiny.TARGETS))
    with warnings.catch_warnings():
        # PEFT would warn of values that it misses in the file
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    kept = {key.rpartition(".")[2] for key in file_values(tmp_path)}
    assert kept == {"delta", "S", "base_sample"} | ({"U", "V"} if save_vectors else set())
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_with_the_vectors_saved_nothing_is_decomposed_in_loading(tmp_path: Path):
    model = tiny.trained(SVFit(r=R, save_vectors=True, target_modules=tiny.TARGETS))
    model.save_pretrained(tmp_path)
    with tiny.NoDecomposition():
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_values_put_in_by_load_state_dict_are_completed_at_first_use(tmp_path: Path):
    model = tiny.trained(SVFit(r=R, target_modules=tiny.TARGETS))
    model.save_pretrained(tmp_path)
    loaded = get_peft_model(tiny.llama(), SVFit.from_pretrained(tmp_path))
    values = {key: value for key, value in model.state_dict().items() if not key.endswith((".U", ".V"))}
    loaded.load_state_dict(values, strict=False)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_a_base_whose_weights_come_later_is_decomposed_at_first_use(tmp_path: Path):
    model = tiny.trained(SVFit(r=R, target_modules=tiny.TARGETS))
    model.save_pretrained(tmp_path)
    base = tiny.llama()
    layers = [base.get_submodule(layer.name) for layer, _ in updates_of(model, "default")]
    weights = [layer.weight for layer in layers]
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.to("meta"))
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = weight
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_equal_singular_values_are_warned_of_at_the_start_and_in_loading(tmp_path: Path):
    one, other = nets([3.0, 2.0, 2.0, 1.0])
    with pytest.warns(UserWarning, match=r"\[12, 9\].*not unique.*save_vectors=True"):
        model = get_peft_model(one, SVFit(r=3, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="layer '0'.*may belong to other singular vectors"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_cut_between_equal_singular_values_is_warned_of():
    with pytest.warns(UserWarning, match="not unique"):
        SVFit(r=2).update(with_values([3.0, 2.0, 2.0, 1.0]))


def test_a_base_rounded_by_more_than_its_gaps_bear_is_warned_of(tmp_path: Path):
    for gap, loads in ((1.0, True), (0.01, False)):
        one, other = nets([3.0, 3.0 - gap, 1.0])
        model = get_peft_model(one, SVFit(r=2, target_modules=["0"]))
        model.save_pretrained(tmp_path / str(gap))
        other[0].weight.data = other[0].weight.data.bfloat16()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(other, tmp_path / str(gap))
        assert (not any("other singular vectors" in str(w.message) for w in caught)) == loads


def test_weight_decay_pulls_to_the_base():
    update = shifted(SVFit(r=R).update(weight_of((20, 32))))
    before = update.delta.detach().clone()
    optimizer = torch.optim.SGD(update.parameters(), lr=1.0, weight_decay=0.5)
    update.delta.grad = torch.zeros(R)
    optimizer.step()
    torch.testing.assert_close(update.sigma.detach() - update.S, 0.5 * before, rtol=0, atol=4 * EPS32 * 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"energy": 0.0}, "energy"), ({"energy": 1.5}, "energy"), ({"energy_of": "s3"}, "energy_of"), ({"r": 0}, "rank")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SVFit(**options)


def test_energy_ranks_at_the_edges():
    weight = with_values([2.0, 1.0, 1.0])
    assert [spectrum.energy_rank(weight, share) for share in (0.5, 4 / 6, 5 / 6, 1.0)] == [1, 1, 2, 3]
    assert spectrum.energy_rank(weight.T, 5 / 6) == 2
    assert spectrum.energy_rank(torch.zeros(4, 3), 0.9) == 1
    with pytest.raises(ValueError, match="share is 0"):
        spectrum.energy_rank(weight, 0.0)
