"""KaSA: the truncation, the update in singular-value form and its penalty, with PEFT's KaSA as an oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import folklora
from folklora import Factors, KaSA, export_lora, factored_linear
from folklora.adapters.host.layer import layers_of, updates_of

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps
TARGETS = ["q", "v"]
R = 4


class Net(nn.Module):
    """A wide and a tall layer; in the first one, in > out + r."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(40, 20), nn.Linear(20, 36, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(self.q(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(base: nn.Module | None = None, seed: int = 1, **options: Any) -> PeftModel:
    base = base or net()
    torch.manual_seed(seed)
    # the layers are small, and most tests need several directions dropped
    return get_peft_model(base, KaSA(**{"r": R, "truncate_limit": 1.0, "target_modules": TARGETS} | options))


def inputs() -> Tensor:
    return torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(2))


def randomise(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def truncated(weight: Tensor, t: int) -> Tensor:
    """W without its t weakest directions, float64, by a full decomposition."""
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    keep = len(S) - t
    return (U[:, :keep] * S[:keep]) @ Vh[:keep]


def peft_kasa(model: PeftModel, *, alpha: int, beta: float = 1e-4, gamma: float = 1e-3, **options: Any) -> PeftModel:
    """PEFT's KaSA on a base of its own, with the values of ours."""
    kasa = KasaConfig(beta=beta, gamma=gamma)
    config = LoraConfig(r=R, lora_alpha=alpha, target_modules=TARGETS, kasa_config=kasa, **options)
    theirs = get_peft_model(net(), config)
    with torch.no_grad():
        for layer, update in updates_of(model, "default"):
            other = theirs.base_model.model.get_submodule(layer.name)
            other.lora_A["default"].weight.copy_(update.A)
            other.lora_B["default"].weight.copy_(update.B)
            other.lora_diag["default"].copy_(update.d)
    return theirs


def assert_close32(actual: Tensor, expected: Tensor) -> None:
    # sums of at most 40 terms in each of a few layers
    torch.testing.assert_close(
        actual, expected.to(actual), rtol=0, atol=100 * EPS32 * float(expected.detach().abs().max())
    )


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in layers_of(model)]


@pytest.mark.parametrize("t", [None, 1, 7, 0])
@pytest.mark.parametrize("name", TARGETS)
def test_what_remains_is_the_best_approximation_of_rank_k_minus_t(name: str, t: int | None):
    model, dropped = adapted(truncate=t), R if t is None else t
    layer, update = next(pair for pair in updates_of(model, "default") if pair[0].name == name)
    weight = layer.get_base_layer().weight.detach().double()
    world = weight + update.factors().dense().detach().double()
    S = torch.linalg.svdvals(weight)
    assert (update.P.shape, update.Q.shape) == ((weight.shape[0], dropped), (dropped, weight.shape[1]))
    assert torch.linalg.matrix_rank(world, rtol=1e-5) == min(weight.shape) - dropped
    lost = float((weight - world).square().sum())
    assert lost == pytest.approx(float(S[len(S) - dropped :].square().sum()), rel=1e-5)
    assert_close32(world, truncated(weight, dropped))


def test_at_the_start_the_output_is_that_of_the_truncated_weight_whatever_d():
    x, base = inputs(), net()
    h = torch.tanh(F.linear(x.double(), truncated(base.q.weight, R), base.q.bias.double()))
    expected = F.linear(h, truncated(base.v.weight, R))
    model = adapted(base)
    for scale in (1.0, 50.0):
        for _, update in updates_of(model, "default"):
            assert (update.B == 0).all()
            update.d.data.mul_(scale)
        assert_close32(model(x), expected)
    assert (model(x) - net()(x)).abs().max() > 1e-3


def test_start_values():
    draws = torch.cat([update.d for seed in range(40) for _, update in updates_of(adapted(seed=seed), "default")])
    # 320 draws of N(0, 1): the mean is within 0.06, the deviation within 0.04, at one standard error
    assert abs(draws.mean().item()) < 0.25
    assert draws.std().item() == pytest.approx(1.0, abs=0.16)
    for _, update in updates_of(adapted(net().bfloat16()), "default"):
        assert {p.dtype for p in update.parameters()} == {torch.float32}
        assert update.A.abs().max() <= 1 / math.sqrt(update.A.shape[1])


def test_at_the_first_step_the_task_moves_only_the_zero_factor():
    model = adapted(beta=0.0, gamma=0.0)
    model(inputs()).square().sum().backward()
    for _, update in updates_of(model, "default"):
        assert (update.A.grad == 0).all()
        assert (update.d.grad == 0).all()
        assert update.B.grad.abs().max() > 0
        assert update.P.grad is None
        assert update.Q.grad is None


@pytest.mark.parametrize(("width", "matrices", "total"), [(768, 24, 295_104), (1024, 48, 786_816)])
def test_published_trainable_counts(width: int, matrices: int, total: int):
    # RoBERTa base and large, query and value of every layer
    assert matrices * KaSA(r=8).trainable_count((width, width)) == total


def test_trainable_count_of_a_model():
    config = KaSA(r=R, truncate=6, target_modules=TARGETS)
    trainable, _ = get_peft_model(net(), config).get_nb_trainable_parameters()
    assert trainable == R * (40 + 20) + R + R * (20 + 36) + R
    assert trainable == config.trainable_count((20, 40)) + config.trainable_count((36, 20))


@pytest.mark.parametrize("rslora", [False, True])
def test_output_gradients_and_merged_weight_equal_pefts(rslora: bool):
    model = adapted(alpha=10.0, rslora=rslora)
    randomise(model)
    theirs, x = peft_kasa(model, alpha=10, use_rslora=rslora), inputs()
    mine, other = model(x), theirs(x)
    assert_close32(mine, other)
    mine.square().mean().backward()
    other.square().mean().backward()
    model.merge_adapter()
    theirs.merge_adapter()
    for layer, update in updates_of(model, "default"):
        peft_layer = theirs.base_model.model.get_submodule(layer.name)
        assert_close32(update.A.grad, peft_layer.lora_A["default"].weight.grad)
        assert_close32(update.B.grad, peft_layer.lora_B["default"].weight.grad)
        assert_close32(update.d.grad, peft_layer.lora_diag["default"].grad)
        assert_close32(layer.get_base_layer().weight, peft_layer.get_base_layer().weight)


def test_penalty_equals_pefts():
    model = adapted(beta=0.3, gamma=0.7, l3="paper", reduction="sum")
    randomise(model)
    theirs = peft_kasa(model, alpha=16, beta=0.3, gamma=0.7)
    torch.testing.assert_close(folklora.penalty(model), theirs.base_model._get_kasa_loss(), rtol=1e-6, atol=0)
    mean = adapted(beta=0.3, gamma=0.7, l3="paper", reduction="mean")
    randomise(mean)
    torch.testing.assert_close(2 * folklora.penalty(mean), folklora.penalty(model), rtol=1e-6, atol=0)


def test_training_steps_equal_pefts_with_its_penalty_added_to_the_loss():
    model = adapted(alpha=8.0, beta=0.02, gamma=0.05, l3="paper", reduction="sum")
    theirs = peft_kasa(model, alpha=8, beta=0.02, gamma=0.05)
    x, goal = inputs(), torch.randn(5, 7, 36, generator=torch.Generator().manual_seed(9))
    for trained in (model, theirs):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.mse_loss(trained(x), goal)
            if trained is theirs:
                loss = loss + theirs.base_model._get_kasa_loss()
            loss.backward()
            optimizer.step()
    for layer, update in updates_of(model, "default"):
        peft_layer = theirs.base_model.model.get_submodule(layer.name)
        assert update.B.abs().max() > 1e-3
        # rounding grows over eight steps by the steps' own factor
        torch.testing.assert_close(update.A, peft_layer.lora_A["default"].weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(update.B, peft_layer.lora_B["default"].weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(update.d, peft_layer.lora_diag["default"], rtol=0, atol=1e-5)


def filled(shape: tuple[int, int], seed: int = 5, **options: Any) -> nn.Module:
    """A float64 update with values of ordinary size."""
    update = KaSA(**options).empty(shape).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (update.A, update.B, update.d):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return update


def test_the_singular_values_penalty():
    update = filled((20, 40), r=4, beta=0.3, gamma=0.0)
    with torch.no_grad():
        update.d.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert update.penalty().item() == pytest.approx(9.0, rel=1e-12)


def large_gram(update: nn.Module) -> Tensor:
    """The authors' own form, with the Gram matrices of the long sides."""
    A, B = update.A, update.B
    eye_out, eye_in = (torch.eye(n, dtype=A.dtype) for n in (B.shape[0], A.shape[1]))
    return torch.linalg.norm(B @ B.T - eye_out) + torch.linalg.norm(A.T @ A - eye_in)


@pytest.mark.parametrize("shape", [(20, 40), (36, 20), (4, 4)])
def test_the_reference_form_equals_the_large_gram_in_value_and_gradient(shape: tuple[int, int]):
    update = filled(shape, r=R, beta=0.0, gamma=1.0, l3="reference")
    mine, theirs = update.penalty(), large_gram(update)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    factors = [update.A, update.B]
    for actual, expected in zip(torch.autograd.grad(mine, factors), torch.autograd.grad(theirs, factors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("l3", ["paper", "reference"])
def test_penalty_of_orthonormal_factors(l3: str):
    out, columns = 20, 40
    update = filled((out, columns), r=R, beta=0.0, gamma=1.0, l3=l3)
    with torch.no_grad():
        update.A.copy_(torch.linalg.qr(update.A.T).Q.T)
        update.B.copy_(torch.linalg.qr(update.B).Q)
    floor = 0.0 if l3 == "paper" else math.sqrt(columns - R) + math.sqrt(out - R)
    # the paper's norm is smoothed at zero: each matrix counts √eps there
    assert update.penalty().item() == pytest.approx(floor, abs=2.1 * math.sqrt(EPS64))
    update.penalty().backward()
    assert max(update.A.grad.abs().max(), update.B.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("l3", ["paper", "reference"])
def test_the_penalty_does_not_move_a_zero_factor(l3: str):
    update = filled((20, 40), r=R, gamma=1.0, l3=l3)
    update.B.data.zero_()
    update.penalty().backward()
    assert (update.B.grad == 0).all()
    assert update.A.grad.abs().max() > 0.01


def test_the_penalty_of_the_published_log_at_the_start():
    # DeBERTa-v3-base, r 8, weights 1: the log shows a loss of 62.5 after an epoch, of which 8 are E Σ d²
    update = KaSA(r=8, beta=1.0, gamma=1.0).empty((768, 768))
    torch.manual_seed(0)
    nn.init.kaiming_uniform_(update.A.data, a=math.sqrt(5))
    assert update.penalty().item() == pytest.approx(27.6 + 27.7, abs=0.1)


def test_no_penalty_where_both_weights_are_zero():
    assert filled((20, 40), r=R, beta=0.0, gamma=0.0).penalty() is None


@pytest.mark.parametrize("trained", [False, True])
def test_dropout_touches_only_the_learned_part(trained: bool):
    p = 0.5
    model = adapted(alpha=8.0, dropout=p)
    if trained:
        randomise(model)
    layer, update = next(updates_of(model, "default"))
    x, base = inputs(), layer.get_base_layer()
    world = factored_linear(x, base.weight, base.bias, Factors(update.Q, -1.0, update.P))
    torch.manual_seed(5)
    kept = F.dropout(x, p)
    torch.manual_seed(5)
    y = layer.train()(x)
    if trained:
        assert_close32(y, world + 2.0 * (kept @ update.A.T * update.d) @ update.B.T)
    else:
        assert torch.equal(y, world)


def test_a_transposed_layer_equals_the_linear_one():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = Conv1D(20, 40), Conv1D(36, 20)

        forward = Net.forward

    linear, transposed = net(), Transposed()
    with torch.no_grad():
        for name in TARGETS:
            transposed.get_submodule(name).weight.copy_(linear.get_submodule(name).weight.T)
        transposed.q.bias.copy_(linear.q.bias)
        transposed.v.bias.zero_()
    models = [adapted(linear), adapted(transposed)]
    for model in models:
        randomise(model)
    assert_close32(models[1](inputs()), models[0](inputs()))


def test_merging_keeps_the_output_and_the_base_comes_back_bit_for_bit():
    model = adapted()
    randomise(model)
    x, before = inputs(), weights(model)
    expected, plain = model(x), net()(x)
    model.merge_adapter()
    assert_close32(model(x), expected)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert torch.equal(model.unload()(x), plain)


def test_merged_and_unloaded_it_is_the_plain_model():
    model = adapted()
    randomise(model)
    expected = model(inputs())
    assert_close32(model.merge_and_unload()(inputs()), expected)


def test_saved_and_loaded_nothing_is_decomposed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = adapted(truncate=6)
    randomise(model)
    expected = model(inputs())
    model.save_pretrained(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading decomposed a weight")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(loaded(inputs()), expected)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(loaded(inputs()), expected)


@pytest.mark.parametrize("t", [None, 7, 0])
def test_it_exports_as_a_lora_of_rank_r_plus_t(tmp_path: Path, t: int | None):
    model = adapted(truncate=t)
    randomise(model)
    ranks = export_lora(model, tmp_path / "lora")
    assert ranks == dict.fromkeys(TARGETS, R + (R if t is None else t))
    stock = PeftModel.from_pretrained(net(), tmp_path / "lora")
    assert_close32(stock(inputs()), model(inputs()))


def test_what_cannot_be_truncated_is_refused_with_the_layers_name():
    with pytest.raises(ValueError, match=r"(?s)truncating 20 directions.*'q'.*at most 19.*truncating 20.*'v'"):
        adapted(truncate=20)
    with pytest.raises(ValueError, match=r"truncating 20 directions leaves nothing of layer 'q'"):
        adapted(r=20)
    adapted(r=20, truncate_limit=0.95)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l3": "squared"}, "l3"),
        ({"reduction": "max"}, "reduction"),
        ({"truncate": -1}, "truncate"),
        ({"truncate_limit": 1.5}, "truncate_limit"),
        ({"r": 0}, "r"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        KaSA(**options)
