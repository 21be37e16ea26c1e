"""FactorLLM: the experts are the layer, the router is taught by it, and only chosen experts are computed."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from folklora import FactorLLM, LoRA, activation_penalty, tiny
from folklora.adapters.factorllm import FactorLLMUpdate, divergence, nearest, nearest_subset, to_dense
from folklora.adapters.host.feed_forward import feed_forward_of
from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.host.routed import opened

D, UNITS, E, K = 8, 24, 4, 2
# a sum of products of three: 24 terms of a few eps64 each
EXACT = 1e-12


class Net(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=UNITS, num_attention_heads=1, mlp_bias=bias))
        if bias:
            for layer in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj):
                nn.init.normal_(layer.bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.mlp(x)


def adapted(base: nn.Module | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> PeftModel:
    base = (Net() if base is None else base).to(dtype)
    torch.manual_seed(1)
    model = get_peft_model(base, FactorLLM(**{"experts": E, "top_k": K} | options)).to(dtype).eval()
    experts = the_layer(model)[1].experts
    if experts is not None:
        nn.init.normal_(experts, std=0.1)
    return model


def the_layer(model: nn.Module) -> tuple[FolkloraLayer, FactorLLMUpdate]:
    return next(updates_of(model, "default"))


def inputs(seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def expert_outputs(model: PeftModel, x: Tensor) -> Tensor:
    """[..., E, d]: every expert by the formula, from the layer's own matrices and what was trained of them."""
    layer, update = the_layer(model)
    mlp, order, found = layer.get_base_layer(), update.order.tolist(), []
    change = torch.zeros(3, UNITS, D).to(x) if update.experts is None else update.experts
    G, U, W = (mlp.gate_proj.weight + change[0], mlp.up_proj.weight + change[1], mlp.down_proj.weight + change[2].T)
    for e in range(E):
        own = order[e * UNITS // E : (e + 1) * UNITS // E]
        gate, up = x @ G[own].T, x @ U[own].T
        if mlp.gate_proj.bias is not None:
            gate, up = gate + mlp.gate_proj.bias[own], up + mlp.up_proj.bias[own]
        found.append((F.silu(gate) * up) @ W[:, own].T)
    return torch.stack(found, dim=-2)


def by_the_formula(model: PeftModel, x: Tensor) -> Tensor:
    """Token by token, summing the experts with the largest logits."""
    layer, update = the_layer(model)
    rows = []
    for token in x.reshape(-1, D):
        chosen = torch.topk(update.router @ token + update.router_bias, update.config.active).indices
        rows.append(E / update.config.active * sum(expert_outputs(model, token)[e] for e in chosen))
    y, bias = torch.stack(rows).view(x.shape), layer.get_base_layer().down_proj.bias
    return y if bias is None else y + bias


VARIANTS = [
    {},
    {"partition": "random"},
    {"partition": "kmeans"},
    {"train_experts": True},
    {"train_experts": True, "partition": "random"},
    {"top_k": 1},
    {"top_k": 3},
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", VARIANTS)
def test_grouped_and_masked_computation_are_the_formula(options: dict[str, Any], bias: bool) -> None:
    model, x = adapted(Net(bias), **options), inputs()
    expected = by_the_formula(model, x)
    with torch.no_grad():
        for _ in range(2):  # the second time from what the first laid out
            torch.testing.assert_close(model(x), expected, rtol=0, atol=EXACT)
    torch.testing.assert_close(model.train()(x), expected, rtol=0, atol=EXACT)
    # where another adapter is trained, gradients pass the chosen experts alone
    model.eval()
    own, theirs = (torch.autograd.grad(call(x).square().sum(), x)[0] for x, call in _twice(model))
    torch.testing.assert_close(own, theirs, rtol=0, atol=100 * EXACT)


def _twice(model: PeftModel) -> list[tuple[Tensor, Any]]:
    return [(inputs().requires_grad_(), call) for call in (model, lambda x: by_the_formula(model, x))]


@pytest.mark.parametrize("partition", ["contiguous", "random", "kmeans"])
def test_all_experts_are_the_layer_itself(partition: str) -> None:
    base, x = Net(bias=True).double(), inputs()
    expected = base(x)
    model = adapted(copy.deepcopy(base), top_k=E, partition=partition)
    assert torch.equal(model(x), expected)
    # and in training, where the experts are computed one by one
    torch.testing.assert_close(model.train()(x), expected, rtol=0, atol=EXACT)


def test_the_mean_over_all_subsets_is_the_layer() -> None:
    model, x = adapted(), inputs()
    outputs = expert_outputs(model, x)
    subsets = list(itertools.combinations(range(E), K))
    mean = sum(E / K * outputs[..., list(subset), :].sum(-2) for subset in subsets) / len(subsets)
    torch.testing.assert_close(mean, the_layer(model)[0].get_base_layer()(x), rtol=0, atol=EXACT)


def test_every_token_has_k_experts_and_each_unit_one_expert() -> None:
    model = adapted(partition="random")
    _, update = the_layer(model)
    p, chosen = update.route(inputs())
    assert (opened(chosen, E).sum(-1) == K).all()
    assert torch.equal(p.topk(K).indices, chosen)
    assert sorted(update.order.tolist()) == list(range(UNITS))
    assert update.order.tolist() != list(range(UNITS))
    assert sorted(int(unit) for e in range(E) for unit in update.units(e)) == list(range(UNITS))


def test_only_chosen_experts_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(top_k=1)
    layer, update = the_layer(model)
    with torch.no_grad():
        update.router_bias.copy_(torch.tensor([0.0, 0.0, 1e3, 0.0]))
    mlp = layer.get_base_layer()
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight.data[: 2 * UNITS // E] = torch.nan
        part.weight.data[3 * UNITS // E :] = torch.nan
    assert torch.isfinite(model(inputs())).all()


def test_contiguous_experts_are_views_of_the_frozen_weights() -> None:
    whole = feed_forward_of(Net().mlp)
    part = whole.part(slice(UNITS // E, 2 * UNITS // E))
    for own, base in ((part.gate, whole.gate), (part.up, whole.up), (part.down, whole.down)):
        assert own.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def test_labels_are_the_nearest_experts_and_the_nearest_subset() -> None:
    model = adapted()
    layer, _ = the_layer(model)
    x = inputs().reshape(-1, D)
    outputs, T = expert_outputs(model, x), layer.get_base_layer()(x)
    costs = torch.stack([(outputs[:, e] - T * K / E).square().mean(-1) for e in range(E)], dim=-1)
    near, best = nearest(outputs, T, K), nearest_subset(outputs, T, K)
    for row in range(len(x)):
        assert set(near[row].tolist()) == set(sorted(range(E), key=lambda e: float(costs[row, e]))[:K])
        errors = {
            subset: float((outputs[row, list(subset)].sum(0) - T[row]).square().sum())
            for subset in itertools.combinations(range(E), K)
        }
        assert set(best[row].tolist()) == set(min(errors, key=errors.get))
        assert errors[tuple(sorted(best[row].tolist()))] <= errors[tuple(sorted(near[row].tolist()))]
    assert not torch.equal(near.sort(-1).values, best.sort(-1).values)


@pytest.mark.parametrize("options", [{}, {"prior": "uniform", "labels": "subset"}, {"train_experts": True}])
def test_losses_are_their_formulas_over_real_tokens(options: dict[str, Any]) -> None:
    model, x = adapted(**options).train(), inputs()
    layer, update = the_layer(model)
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1:, 3:] = 0
    model(x, attention_mask=mask)
    found = activation_penalty(model)
    terms = []
    for token in x[mask.bool()]:
        p = (update.router @ token + update.router_bias).softmax(0)
        outputs, T = expert_outputs(model, token)[None], layer.get_base_layer()(token)[None]
        rule = nearest_subset if update.config.labels == "subset" else nearest
        s = opened(rule(outputs, T, K), E)[0].double()
        q = s.softmax(0) if update.config.prior == "softmax" else s / K
        p_, q_ = p.clamp(1e-7, 1 - 1e-7), q.clamp(1e-7, 1 - 1e-7)
        balance = p.topk(K).values.sum() / E
        terms.append(0.05 * (p_ * (p_ / q_).log()).sum() + 0.01 * balance)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=0, atol=EXACT)
    assert activation_penalty(model) is None  # taken once


def test_the_divergence_is_zero_for_equal_probabilities_alone() -> None:
    p = torch.rand(50, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(-1)
    assert float(divergence(p, p).abs().max()) == 0
    assert (divergence(p, p.roll(1, -1)) > 0).all()
    # the soft prior of two among four
    q = torch.tensor([1.0, 1.0, 0.0, 0.0]).softmax(-1)
    assert [round(float(v), 3) for v in q] == [0.366, 0.366, 0.134, 0.134]


def test_the_balance_is_smallest_for_even_probabilities() -> None:
    even = torch.full((E,), 1 / E)
    balances = [(opened(p.topk(K).indices, E) * p).mean() for p in (even, torch.tensor([0.4, 0.3, 0.2, 0.1]))]
    assert float(balances[0]) == pytest.approx(K / E**2)
    assert balances[1] > balances[0]


@pytest.mark.parametrize("train_experts", [False, True])
def test_sizes_and_what_learns_from_what(train_experts: bool) -> None:
    model = tiny.adapted(FactorLLM(train_experts=train_experts))
    layers, f, d = 2, 48, 32
    expected = layers * (4 * d + 4 + (3 * f * d if train_experts else 0))
    assert model.get_nb_trainable_parameters()[0] == expected
    model.train()
    loss = model(**tiny.labelled_batch()).loss
    _, update = the_layer(model)
    assert loss.requires_grad == train_experts
    if train_experts:
        loss.backward(retain_graph=True)
        assert update.router.grad is None
        assert update.experts.grad.abs().sum() > 0
        update.experts.grad = None
    activation_penalty(model).backward()
    assert update.router.grad.abs().sum() > 0
    # nor does what teaches the routers move anything else
    assert update.experts is None or update.experts.grad is None


def test_the_penalties_of_all_layers_are_summed() -> None:
    model = tiny.adapted(FactorLLM()).train()
    model(**tiny.labelled_batch())
    parts = [update._penalty for _, update in updates_of(model, "default")]
    torch.testing.assert_close(activation_penalty(model), sum(parts))
    assert len(parts) == 2


def test_rows_with_their_own_adapters() -> None:
    model, x = adapted(), inputs()
    torch.manual_seed(5)
    model.add_adapter("other", FactorLLM(experts=3, top_k=1))
    model.eval().double()
    found = model(x, adapter_names=["default", "__base__", "other"])
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(x)
    with model.disable_adapter():
        base = model(x)
    torch.testing.assert_close(
        found, torch.stack([alone["default"][0], base[1], alone["other"][2]]), rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("options", [{}, {"partition": "kmeans", "train_experts": True}])
def test_it_is_saved_with_its_division(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(dtype=torch.float32, **options)
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    x = inputs(dtype=torch.float32)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(the_layer(loaded)[1].order, the_layer(model)[1].order)
    other = Net()
    nn.init.normal_(other.mlp.gate_proj.weight)
    with pytest.raises(ValueError, match="another base model's weights"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("options", [{"partition": "random"}, {"train_experts": True}])
def test_what_was_laid_out_follows_a_change(options: dict[str, Any]) -> None:
    model, x = adapted(**options), inputs()
    layer, update = the_layer(model)
    with torch.no_grad():
        model(x)
        layer.get_base_layer().up_proj.weight.mul_(2)
        if update.experts is not None:
            update.experts.mul_(3)
        torch.testing.assert_close(model(x), by_the_formula(model, x), rtol=0, atol=100 * EXACT)


@pytest.mark.parametrize("options", [{"partition": "random"}, {"train_experts": True}])
def test_what_was_laid_out_follows_values_that_were_put_past_autograd(options: dict[str, Any]) -> None:
    # averages of weights and some fused optimizers write so, of which a tensor's version does not tell
    model, x = adapted(**options), inputs()
    _, update = the_layer(model)
    with torch.no_grad():
        model(x)
        model.train()
        for value in trained(model):
            value.data.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(4)))
        torch.testing.assert_close(model.eval()(x), by_the_formula(model, x), rtol=0, atol=1000 * EXACT)
        assert update._laid is not None
        model.train()
        assert update._laid is None, "training needs its memory"


@pytest.mark.parametrize("options", [{}, {"partition": "random"}, {"train_experts": True}])
@pytest.mark.parametrize("training", [False, True])
def test_no_tokens_at_all(training: bool, options: dict[str, Any]) -> None:
    model, x = adapted(**options), inputs()[:, :0]
    found = model.train(training)(x)
    assert found.shape == x.shape
    assert activation_penalty(model) is None, "it would be a mean of nothing"


@pytest.mark.parametrize("options", [{"partition": "random"}, {"train_experts": True, "partition": "random"}])
def test_the_experts_make_a_dense_layer_again(options: dict[str, Any]) -> None:
    base = Net().double()
    untouched = copy.deepcopy(base.state_dict())
    kept = dict(base.named_parameters())
    model, x = adapted(base, **options), inputs()
    _, update = the_layer(model)
    expected = expert_outputs(model, x).sum(-2)
    dense = to_dense(model)
    assert not list(updates_of(dense, "default"))
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=EXACT)
    dense = dense.state_dict()
    assert set(dense) == set(untouched)
    assert all(torch.equal(dense[key], value) for key, value in untouched.items()) == (update.experts is None)
    assert all(torch.equal(kept[key], value) for key, value in untouched.items())
    with pytest.raises(ValueError, match="no FactorLLM adapter named 'default'"):
        to_dense(get_peft_model(Net(), LoRA(r=2, target_modules=["gate_proj"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "at least 2 experts"),
        ({"top_k": 5}, "top_k between 1 and their number"),
        ({"partition": "sorted"}, "partition must be one of contiguous, random, kmeans"),
        ({"route_weight": -1.0}, "route_weight and balance_weight"),
        ({"labels": "subset", "experts": 16}, "would compare 12870 subsets"),
        ({"dropout": 0.1}, "takes no dropout"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactorLLM(**options)


def after_training(steps: int, **options: Any) -> tuple[float, float]:
    """The loss of the router on its training inputs, and the distance from the dense layer on others.

    Half of the layer's experts do nothing for half of the inputs.
    """
    base, x = Net(), torch.randn(512, D, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for e in range(E):
            base.mlp.gate_proj.weight[e * UNITS // E : (e + 1) * UNITS // E, 0] = 4.0 if e % 2 else -4.0
    target = base(x)
    model = adapted(base, torch.float32, route_weight=1.0, scale=1.0, **options).train()
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    for _ in range(steps):
        model(x[:256])
        activation_penalty(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model(x[:256])
    loss = activation_penalty(model).item()
    with torch.no_grad():
        return loss, float((model.eval()(x[256:]) - target[256:]).square().mean())


def test_the_router_learns_its_labels() -> None:
    assert after_training(60)[0] < after_training(0)[0]


def test_a_learnt_router_leaves_out_what_does_nothing() -> None:
    options = {"labels": "subset", "prior": "uniform"}
    # measured: less than a fortieth
    assert after_training(60, **options)[1] < 0.1 * after_training(0, **options)[1]
