"""Layers that read one tensor share a product and its gradient: the results are those of layers apart."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from folklora import KIND, AMLoRA, CoDyRA, LoRA, PiSSA, RandLoRA, SMoRA, VLAdapter, tiny
from folklora.adapters.host import siblings
from folklora.adapters.host.layer import layers_of
from folklora.factored import Factors, factored_linear, share_input

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps
METHODS = [
    LoRA(r=4, target_modules="all-linear"),
    PiSSA(r=4, target_modules="all-linear"),
    AMLoRA(r=3, tasks=2, dropout=0.0, target_modules="all-linear"),
    AMLoRA(r=3, tasks=2, dropout=0.0, gate_input="lora", target_modules="all-linear"),
    KIND(classes=2, target_modules="all-linear"),
    RandLoRA(r=4, dropout=0.0, target_modules="all-linear"),
    CoDyRA(r=4, dropout=0.0, target_modules="all-linear"),
]


class Attention(nn.Module):
    """Query, key and value of one input, or a key and value of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 6, bias=False), nn.Linear(12, 6)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        source = x if other is None else other
        return torch.cat([self.q_proj(x).tanh(), self.k_proj(source) * self.v_proj(source)], dim=-1)


def attention(dtype: torch.dtype = torch.float64, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(Attention().to(dtype), LoRA(**{"r": 3, "target_modules": targets, **options}))
    return tiny.moved(model).to(dtype)


def apart(model: PeftModel) -> PeftModel:
    twin = copy.deepcopy(model)
    for layer in layers_of(twin):
        layer.siblings = []
    return twin


def inputs(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def count_shares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []

    def counted(x: Tensor, parts: list[Factors]) -> list:
        counts.append(len(parts))
        return share_input(x, parts)

    monkeypatch.setattr(siblings, "share_input", counted)
    return counts


def results(model: PeftModel, *xs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in xs]
    y = model(*leaves)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [*leaves, *trained])]


def assert_alike(one: list[Tensor], other: list[Tensor], unit: float) -> None:
    for a, b in zip(one, other, strict=True):
        # a few hundred terms at most in any sum
        torch.testing.assert_close(a, b, rtol=0, atol=300 * unit * max(1.0, float(b.detach().abs().max())))


def test_together_they_compute_what_they_compute_apart(monkeypatch: pytest.MonkeyPatch):
    counts = count_shares(monkeypatch)
    model = attention()
    assert_alike(results(model, inputs()), results(apart(model), inputs()), EPS64)
    assert counts == [3]


def test_layers_that_read_different_tensors_are_not_mixed_up(monkeypatch: pytest.MonkeyPatch):
    counts = count_shares(monkeypatch)
    model = attention()
    xs = inputs(), inputs(2)
    assert_alike(results(model, *xs), results(apart(model), *xs), EPS64)
    # the query's offer is for another tensor; key and value find each other
    assert counts == [3, 2]
    assert_alike(results(model, xs[1]), results(apart(model), xs[1]), EPS64)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.method}-{getattr(config, 'gate_input', '')}")
def test_whole_models_agree(config: Any, monkeypatch: pytest.MonkeyPatch):
    counts = count_shares(monkeypatch)
    model = tiny.precise(config)
    twin = apart(model)
    for one in (model, twin):
        tiny.loss(one).backward()
    assert counts == [3, 2] * 2
    assert_alike(
        [p.grad for p in model.parameters() if p.requires_grad],
        [p.grad for p in twin.parameters() if p.requires_grad],
        EPS64,
    )


def test_without_gradients_and_with_frozen_inputs():
    model = attention()
    with torch.no_grad():
        y = model(inputs())
    assert_alike([y], [apart(model)(inputs())], EPS64)
    # no gradient of x is asked for: only the factors get one
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(one(inputs()).square().sum(), ps) for one, ps in ((model, trained),)]
    other = apart(model)
    expected = torch.autograd.grad(other(inputs()).square().sum(), [p for p in other.parameters() if p.requires_grad])
    assert_alike(list(grads[0]), list(expected), EPS64)


def test_an_output_that_nobody_uses_leaves_the_others_right():
    model = attention()
    layer_q, layer_k, layer_v = layers_of(model)
    x = inputs().requires_grad_()
    q, _, v = layer_q(x), layer_k(x), layer_v(x)
    (found,) = torch.autograd.grad((q.sum() + v.square().sum()), x)
    y = inputs().requires_grad_()
    twin_q, _, twin_v = layers_of(apart(model))
    (expected,) = torch.autograd.grad(twin_q(y).sum() + twin_v(y).square().sum(), y)
    assert_alike([found], [expected], EPS64)


def test_a_backward_pass_that_stops_short_does_not_spoil_the_next():
    model = attention()
    x = inputs().requires_grad_()
    loss = model(x).square().sum()
    B = next(layers_of(model)).folklora_updates["default"].B
    torch.autograd.grad(loss, B, retain_graph=True)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    again = torch.autograd.grad(loss, x)
    expected = results(apart(model), inputs())[1]
    assert_alike([*first, *again], [expected, expected], EPS64)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant: bool):
    model = attention()
    x = inputs().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert_alike(found, results(apart(model), inputs())[1:], EPS64)


def test_autocast_and_float32_masters():
    model = attention(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (results(one, inputs(dtype=torch.float32)) for one in (model, apart(model)))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        # both round their products to bfloat16, and at most three of them are summed in another order
        limit = 6 * torch.finfo(torch.bfloat16).eps * float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=limit)


def test_a_sibling_that_is_merged_disabled_or_dropped_out_goes_its_own_way(monkeypatch: pytest.MonkeyPatch):
    counts = count_shares(monkeypatch)
    model = attention()
    _, key, value = layers_of(model)
    expected = model(inputs())
    key.merge()
    merged = model(inputs())
    key.unmerge()
    assert_alike([merged], [expected], EPS64)
    value.dropouts["default"] = 0.5
    model.train()(inputs())
    assert counts == [3, 2, 2]


def test_ranks_that_count_their_tokens_count_each_once():
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(Attention(), SMoRA(r=4, k=2, target_modules=targets)).train()
    # in the first pass the key and the value read another tensor than the query
    model(inputs(dtype=torch.float32), inputs(2, torch.float32)).square().sum().backward()
    model(inputs(3, torch.float32)).square().sum().backward()
    loads = [int(layer.folklora_updates["default"].load.sum()) for layer in layers_of(model)]
    # two passes of 2 x 5 tokens with 2 ranks each
    assert loads == [40, 40, 40]


def test_a_sibling_that_is_a_function_goes_its_own_way_and_still_adds_up(monkeypatch: pytest.MonkeyPatch):
    counts = count_shares(monkeypatch)
    model = attention()
    model.add_adapter("bent", VLAdapter(reduction_factor=2, train_bias=True, target_modules=["k_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "bent"])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for update in (layer.folklora_updates["bent"] for layer in list(layers_of(model))[1:]):
            for parameter in update.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.double()
    query, key, value = layers_of(model)
    assert_alike(results(model, inputs()), results(apart(model), inputs()), EPS64)
    # key and value have a function each; what else they carry is computed with nobody's help
    assert counts == []
    x = inputs()
    for layer in (query, key, value):
        sets = [], ["default"], ["bent"], ["default", "bent"]
        base, one, two, both = (tiny.layer_output(layer, names, x) for names in sets)
        assert_alike([one + two - base], [both], EPS64)
        assert torch.equal(two, base) == (layer is query)


def test_what_was_offered_is_neither_copied_nor_pickled_nor_kept():
    model = attention(torch.float32)
    query, key, _ = layers_of(model)
    x = inputs(dtype=torch.float32)
    query(x)
    assert key.offer is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        first, *others = layers_of(twin)
        assert all(layer.offer is None for layer in (first, *others))
        assert first.siblings == others
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    key(x)
    assert key.offer is None


def test_the_shared_gradient_is_that_of_finite_differences():
    torch.manual_seed(3)
    x, weights = torch.randn(3, 4, dtype=torch.float64), [torch.randn(n, 4, dtype=torch.float64) for n in (2, 5)]
    factors = [torch.randn(s, dtype=torch.float64) for s in ((2, 4), (2, 2), (1, 4), (5, 1))]
    leaves = [t.requires_grad_() for t in (x, *factors)]

    def run(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        parts = [Factors(a1, 1.5, b1), Factors(a2, 0.5, b2)]
        shared = share_input(x, parts)
        outputs = [factored_linear(x, w, None, f, shared=s) for w, f, s in zip(weights, parts, shared, strict=True)]
        return torch.cat(outputs, dim=1)

    assert torch.autograd.gradcheck(run, leaves)
