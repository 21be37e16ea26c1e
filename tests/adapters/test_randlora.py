"""RandLoRA: the formula in float64, bases that all layers share, and PEFT's RandLora as an oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, RandLoraConfig, get_peft_model
from peft import __version__ as peft_version
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from folklora import LoRA, RandLoRA, export_lora
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.randlora import RandLoRAUpdate, draw_bases

EPS32 = torch.finfo(torch.float32).eps
TARGETS = ["q", "v", "o"]
R = 8
# out and in at their largest are 36 and 40
SMALL, LARGE, BASES = 36, 40, 5


class Net(nn.Module):
    """A wide, a tall and a square layer; 8 divides none of their small sides."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(40, 20), nn.Linear(20, 36, bias=False), nn.Linear(36, 36)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.v(torch.tanh(self.q(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    return get_peft_model(base or net(), RandLoRA(**{"r": R, "alpha": 4.0, "target_modules": TARGETS} | options))


def inputs() -> Tensor:
    return torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(2))


def randomise(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def summed(update: RandLoRAUpdate) -> Tensor:
    """ΔW as the formula sums it, basis by basis, float64."""
    r, n = update.lambda_.shape
    A, B = (update.shared[f"{name}_{r}"].double() for name in "AB")
    A, lambdas, gamma = A[:, : update.gamma.shape[1]], update.lambda_.double(), update.gamma.double()
    total = sum(B[: update.large, j] @ lambdas[:, j].diag() @ A @ gamma[j].diag() for j in range(n))
    return update.scale * (total.T if update.wide else total)


def peft_randlora(model: PeftModel, permuted: bool = False, **options: Any) -> PeftModel:
    """PEFT's RandLora on a base of its own, with the values of ours."""
    theirs = get_peft_model(net(), RandLoraConfig(r=R, target_modules=TARGETS, **{"randlora_alpha": 4} | options))
    with torch.no_grad():
        for layer, update in updates_of(model, "default"):
            other = theirs.base_model.model.get_submodule(layer.name)
            B = update.shared[f"B_{R}"]
            other.randlora_A["default"].copy_(update.shared[f"A_{R}"][:, None])
            other.randlora_B["default"].copy_(B)
            if permuted:
                # each layer its own bases, in the order in which PEFT pairs them
                own = B[: update.large, : other.num_bases]
                other.randlora_B = nn.ParameterDict({"default": own.transpose(1, 2).reshape(own.shape)})
                other.randlora_B.requires_grad_(False)
            other.randlora_lambda["default"].copy_(update.lambda_)
            other.randlora_gamma["default"].copy_(update.gamma)
    return theirs


def assert_close32(actual: Tensor, expected: Tensor) -> None:
    # sums of at most 40 terms in each of a few products
    tolerance = 100 * EPS32 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected.to(actual), rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", [True, False])
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"very_sparse": True}])
def test_logits_and_gradients_equal_pefts(layout: bool, options: dict[str, bool]):
    bases = next((name.replace("_", "-") for name in options), "dense")
    model = adapted(peft_layout=layout, bases=bases)
    randomise(model)
    theirs = peft_randlora(model, permuted=not layout, **options)
    mine, expected = model(inputs()), theirs(inputs())
    assert not torch.allclose(mine, net()(inputs()), atol=0.1)
    assert_close32(mine, expected)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for layer, update in updates_of(model, "default"):
        other = theirs.base_model.model.get_submodule(layer.name)
        assert_close32(update.lambda_.grad, other.randlora_lambda["default"].grad)
        assert_close32(update.gamma.grad, other.randlora_gamma["default"].grad)
        assert_close32(update.factors().dense(), other.get_delta_weight("default"))


def test_the_two_layouts_are_not_the_same():
    one, two = adapted(), adapted(peft_layout=True)
    for model in (one, two):
        randomise(model)
    assert not torch.allclose(one(inputs()), two(inputs()), atol=0.1)


def test_the_start_and_the_defaults_are_pefts():
    theirs = get_peft_model(net(), RandLoraConfig(target_modules=TARGETS, r=20))
    own, other = RandLoRA(), RandLoraConfig()
    assert (own.r, 20 * own.r, own.seed) == (other.r, other.randlora_alpha, other.projection_prng_key)
    for layer, update in updates_of(adapted(r=20), "default"):
        peft_layer = theirs.base_model.model.get_submodule(layer.name)
        assert torch.equal(update.lambda_, peft_layer.randlora_lambda["default"])
        assert torch.equal(update.gamma, peft_layer.randlora_gamma["default"])


@pytest.mark.parametrize("bases", ["sparse", "very-sparse"])
def test_sparse_bases_are_pefts_bit_for_bit(bases: str):
    model = adapted(bases=bases, seed=7)
    options = {bases.replace("-", "_"): True, "projection_prng_key": 7}
    theirs = get_peft_model(net(), RandLoraConfig(r=R, target_modules=TARGETS, **options)).base_model
    shared = model.base_model.model.folklora_shared["default"]
    assert torch.equal(shared[f"A_{R}"], theirs.randlora_A["default"][:, 0])
    assert torch.equal(shared[f"B_{R}"], theirs.randlora_B["default"])


@pytest.mark.parametrize(("bases", "values"), [("dense", None), ("sparse", 1 / 6), ("very-sparse", 1 / 32)])
def test_how_bases_are_drawn(bases: str, values: float | None):
    A, B = draw_bases(bases, 8, 256, 300, seed=4)
    assert (A.shape, B.shape) == ((8, 256), (300, 32, 8))
    for basis in (A, B):
        assert basis.std().item() == pytest.approx(1, abs=1e-5)
        # five standard errors of a mean and of a share
        assert abs(basis.mean().item()) < 5 / math.sqrt(basis.numel())
        if values is None:
            assert basis.abs().max().item() == pytest.approx(math.sqrt(3), abs=0.05)
            continue
        assert len(basis.unique()) == 3
        share = (basis > 0).float().mean().item()
        assert abs(share - values) < 5 * math.sqrt(values / basis.numel())
    again = draw_bases(bases, 8, 256, 300, seed=4)
    assert torch.equal(A, again[0])
    assert torch.equal(B, again[1])
    assert not torch.equal(B, draw_bases(bases, 8, 256, 300, seed=5)[1])
    assert draw_bases("dense", 1, 1, 1, seed=0)[0].abs().item() == 1


@pytest.mark.parametrize("shape", [(36, 20), (20, 40), (24, 24), (24, 40)])
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/(r sqrt n)"])
def test_the_update_is_the_sum_over_its_bases(shape: tuple[int, int], rule: str):
    config = RandLoRA(r=R, alpha=3.0, scale_rule=rule)
    update = filled(config, shape)
    n = math.ceil(min(shape) / R)
    assert update.scale == pytest.approx(3 / R / (math.sqrt(n) if "sqrt" in rule else 1))
    torch.testing.assert_close(update.factors().dense(), summed(update), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bases", ["dense", "sparse", "very-sparse"])
@pytest.mark.parametrize("shape", [(36, 20), (20, 40), (24, 24)])
def test_the_rank_is_full(shape: tuple[int, int], bases: str):
    update = filled(RandLoRA(r=R, bases=bases), shape)
    assert update.factors().rank == R * math.ceil(min(shape) / R)
    # a column of zeros in a sparse A is a direction that no λ and γ reach
    reached = int(update.shared[f"A_{R}"].any(0).sum())
    assert torch.linalg.matrix_rank(update.factors().dense()) == reached
    assert (reached == min(shape)) == (bases == "dense")
    compact = update.factors().compact()
    assert compact.rank == min(shape)
    torch.testing.assert_close(compact.dense(), update.factors().dense(), rtol=0, atol=1e-10)


def filled(config: RandLoRA, shape: tuple[int, int]) -> RandLoRAUpdate:
    """An update by itself in float64, with its bases and random diagonals."""
    update = config.empty(shape)
    update.base_sample = nn.Parameter(torch.zeros(1), requires_grad=False)
    update.share(nn.ParameterDict(config.shared({"layer": shape}, torch.empty(0, dtype=torch.float64))))
    update.double()
    randomise_own = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (update.lambda_, update.gamma):
            parameter.copy_(torch.randn(parameter.shape, generator=randomise_own))
    return update


@pytest.mark.parametrize("shape", [(12, 10), (10, 12)])
def test_gradients_follow_the_papers_formula(shape: tuple[int, int]):
    config = RandLoRA(r=4, alpha=4.0)
    update = filled(config, shape)
    G = torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    (update.factors().dense() * G).sum().backward()
    A, B = update.shared["A_4"], update.shared["B_4"]
    # dL/d(λ_j ⊙ A ⊙ γ_j), basis by basis
    upstream = torch.einsum("oi,ojk->jki", G.T if update.wide else G, B)
    dlambda = torch.einsum("jki,ki,ji->kj", upstream, A, update.gamma)
    dgamma = torch.einsum("jki,ki,kj->ji", upstream, A, update.lambda_)
    torch.testing.assert_close(update.lambda_.grad, dlambda, rtol=0, atol=1e-10)
    torch.testing.assert_close(update.gamma.grad, dgamma, rtol=0, atol=1e-10)
    assert A.grad is None
    assert B.grad is None


def test_the_trainable_count_is_the_published_one():
    config = RandLoRA(r=32)
    assert 28 * (config.trainable_count((3072, 3072)) + config.trainable_count((1024, 3072))) == 9_289_728
    trainable, _ = adapted().get_nb_trainable_parameters()
    assert trainable == sum(math.ceil(d / R) * (R + d) for d in (20, 20, 36))


def test_the_start_is_the_base_and_the_bases_get_no_gradient():
    model = adapted()
    assert torch.equal(model(inputs()), net()(inputs()))
    model(inputs()).square().mean().backward()
    for _, update in updates_of(model, "default"):
        assert update.lambda_.grad.abs().max() > 0
        assert (update.gamma.grad == 0).all()
        assert all(p.grad is None and not p.requires_grad for p in update.shared.values())


def test_all_layers_read_one_copy_of_the_bases():
    model = adapted()
    A, B = model.base_model.model.folklora_shared["default"].values()
    assert (A.shape, B.shape) == ((R, SMALL), (LARGE, BASES, R))
    assert sum(p is A or p is B for p in model.parameters()) == 2
    for _, update in updates_of(model, "default"):
        assert update.shared["A_8"] is A
        large = update.factors().A if update.wide else update.factors().B
        assert large.data_ptr() == B.data_ptr()


def test_layers_of_different_shapes_slice_the_bases():
    class Pair(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(10, 20), nn.Linear(20, 2))

    model = get_peft_model(Pair(), RandLoRA(r=2, target_modules=["0", "1"]))
    shared = model.base_model.model.folklora_shared["default"]
    assert (shared["A_2"].shape, shared["B_2"].shape) == ((2, 20), (20, 10, 2))
    assert [tuple(u.factors().A.shape) for _, u in updates_of(model, "default")] == [(10, 10), (2, 20)]
    randomise(model)
    for _, update in updates_of(model, "default"):
        torch.testing.assert_close(update.factors().dense().double(), summed(update), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_half_precision_base(dtype: torch.dtype):
    model = adapted(net().to(dtype))
    randomise(model)
    update = next(updates_of(model, "default"))[1]
    # before 0.21.2 PEFT's cast of adapters to float32 reached what their layers share
    kept = dtype if Version(peft_version) >= Version("0.21.2") else torch.float32
    assert {p.dtype for p in update.shared.values()} == {kept}
    assert update.gamma.dtype == torch.float32
    y = model(inputs().to(dtype))
    assert y.dtype == dtype
    model.merge_adapter()
    expected = model(inputs().to(dtype))
    # W + ΔW is rounded once, and so is each product
    assert (y - expected).float().abs().max() < 30 * torch.finfo(dtype).eps * y.float().abs().max()


def test_merged_it_computes_the_same_and_the_base_comes_back():
    model, x = adapted(), inputs()
    randomise(model)
    expected, weights = model(x), [layer.get_base_layer().weight.clone() for layer in layers_of(model)]
    model.merge_adapter()
    assert_close32(model(x), expected)
    model.unmerge_adapter()
    assert all(
        torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers_of(model), weights, strict=True)
    )


def test_two_adapters_have_bases_of_their_own():
    model = adapted()
    model.add_adapter("same", RandLoRA(r=R, target_modules=["o"]))
    # PEFT refuses a second seed and a larger layer, since its adapters share their bases; these do not
    model.add_adapter("other", RandLoRA(r=R, seed=1, target_modules=["q", "o"]))
    shared = model.base_model.model.folklora_shared
    assert shared["same"]["A_8"].shape == shared["default"]["A_8"].shape
    assert torch.equal(shared["same"]["A_8"], shared["default"]["A_8"])
    assert not torch.equal(shared["other"]["A_8"], shared["default"]["A_8"])
    assert shared["same"]["A_8"] is not shared["default"]["A_8"]


def test_a_rank_pattern_brings_bases_of_its_own_rank():
    model = adapted(rank_pattern={"v": 5})
    shapes = {key: tuple(p.shape) for key, p in model.base_model.model.folklora_shared["default"].items()}
    assert shapes == {"A_8": (8, 36), "B_8": (40, 5, 8), "A_5": (5, 20), "B_5": (36, 4, 5)}
    randomise(model)
    for _, update in updates_of(model, "default"):
        assert_close32(update.factors().dense(), summed(update))


def test_the_saved_file_holds_the_bases_once_and_they_are_what_is_loaded(tmp_path: Path):
    model = adapted()
    randomise(model)
    with torch.no_grad():
        for basis in model.base_model.model.folklora_shared["default"].values():
            # as another PyTorch release might have drawn them
            basis.copy_(torch.randn(basis.shape, generator=torch.Generator().manual_seed(99)))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in saved if "shared" in key} == {
        f"base_model.model.folklora_shared.{name}_{R}" for name in "AB"
    }
    samples = sum(update.base_sample.numel() for _, update in updates_of(model, "default"))
    own = model.get_nb_trainable_parameters()[0] + samples
    assert sum(value.numel() for value in saved.values()) == own + R * SMALL + LARGE * BASES * R
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(net(), tmp_path, **options)
        assert torch.equal(loaded(inputs()), model(inputs()))


def test_it_exports_as_a_lora_of_its_true_rank(tmp_path: Path):
    model = adapted()
    randomise(model)
    assert export_lora(model, tmp_path / "lora") == {"q": 20, "v": 20, "o": 36}
    stock = PeftModel.from_pretrained(net(), tmp_path / "lora")
    assert_close32(stock(inputs()), model(inputs()))


def test_a_transposed_layer_equals_the_linear_one():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v, self.o = Conv1D(20, 40), Conv1D(36, 20), Conv1D(36, 36)

        forward = Net.forward

    linear, transposed = net(), Transposed()
    with torch.no_grad():
        for name in TARGETS:
            transposed.get_submodule(name).weight.copy_(linear.get_submodule(name).weight.T)
            bias = linear.get_submodule(name).bias
            transposed.get_submodule(name).bias.copy_(0 if bias is None else bias)
    models = [adapted(linear), adapted(transposed)]
    for model in models:
        randomise(model)
    assert_close32(models[1](inputs()), models[0](inputs()))


def relative_error(config: Any, target: Tensor, steps: int) -> float:
    """What is left of ‖ΔW - target‖² after fitting it with Adam."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    update = next(updates_of(model, "default"))[1]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (update.factors().dense() - target).square().sum() / target.square().sum()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_it_fits_a_flat_spectrum_better_than_lora_and_a_low_rank_worse():
    generator = torch.Generator().manual_seed(1)
    flat = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    low = torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    randlora, lora = RandLoRA(r=4, alpha=4.0, target_modules=["0"]), LoRA(r=8, alpha=8.0, target_modules=["0"])
    # nearly as many parameters: 16 (4 + 64) and 8 · 128; of a flat spectrum rank 8 leaves at least 56 of 64 parts
    assert randlora.trainable_count((64, 64)) == 1088
    assert relative_error(randlora, flat, 800) < 0.8 < 1 - 8 / 64
    assert relative_error(lora, low, 800) < 0.01
    assert relative_error(randlora, low, 800) > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 0}, "rank"), ({"scale_rule": "r"}, "scale_rule must be one of"), ({"bases": "none"}, "bases must be one")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RandLoRA(**options)


def test_what_has_no_place_is_refused_before_anything_is_changed():
    base = net()
    with pytest.raises(ValueError, match=r"rank 21 is above 20.*'q'"):
        adapted(base, r=21)
    with pytest.raises(ValueError, match="holds only zeros"):
        # the first of two draws has two entries, both in the middle half
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), RandLoRA(r=1, bases="sparse", seed=0, target_modules=["0"]))
    assert not hasattr(base, "folklora_shared")
    assert not list(layers_of(base))
