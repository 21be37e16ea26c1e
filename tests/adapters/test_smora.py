"""SMoRA: routing, gates and the balance of the ranks, against the formula written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from folklora import LoRA, SMoRA, export_lora, tiny
from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.smora import SMoRAUpdate

EPS32 = torch.finfo(torch.float32).eps
IN, OUT, R, K = 20, 12, 8, 3
ROWS, POSITIONS = 4, 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(IN, OUT)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.reentrant is None:
            return self.q(x)
        return checkpoint(self.q, x, use_reentrant=self.reentrant)


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = SMoRA(**{"r": R, "k": K, "target_modules": ["q"], "balance_rate": 0.01} | options)
    model = get_peft_model(Net(), config).to(dtype)
    _, update = the_layer(model)
    with torch.no_grad():
        update.B.normal_()
        update.balance.uniform_(-0.2, 0.2)
    return model


def the_layer(model: nn.Module) -> tuple[FolkloraLayer, SMoRAUpdate]:
    return next(updates_of(model, "default"))


def inputs(seed: int = 2) -> Tensor:
    return torch.randn(ROWS, POSITIONS, IN, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def by_the_formula(model: PeftModel, x: Tensor) -> Tensor:
    """The layer token by token, gathering the open ranks only."""
    layer, update = the_layer(model)
    config, rows = update.config, []
    for token in x.reshape(-1, IN):
        scores = torch.sigmoid(update.router @ token)
        opened = torch.topk(scores + update.balance, config.k).indices
        values = (scores + update.balance if config.bias_in_gate else scores)[opened]
        gates = config.k * values / values.sum()
        rows.append(config.alpha / config.k * (update.B[:, opened] * gates) @ (update.A[opened] @ token))
    return layer.base_layer(x) + torch.stack(rows).view(*x.shape[:-1], OUT)


def close32(actual: Tensor, expected: Tensor) -> None:
    # sums of some twenty products, through a sigmoid and a quotient
    torch.testing.assert_close(actual, expected, rtol=0, atol=100 * EPS32 * float(expected.detach().abs().max()))


def step(model: nn.Module, *batches: Tensor, **options: Any) -> Tensor:
    """One optimizer step over micro-batches; how the balance moved, in units of its rate."""
    _, update = the_layer(model)
    before = update.balance.clone()
    for x in batches:
        model(x, **options).square().mean().backward()
    torch.optim.SGD(trained(model), lr=0.0).step()
    model.zero_grad()
    return ((update.balance - before) / update.config.balance_rate).round()


def expected_move(update: SMoRAUpdate, *tokens: Tensor) -> Tensor:
    """sign(mean - load) of all these tokens' choices, counted one by one."""
    load = [0] * R
    for token in torch.cat([x.reshape(-1, IN) for x in tokens]):
        for rank in torch.topk(torch.sigmoid(update.router @ token) + update.balance, K).indices:
            load[rank] += 1
    return torch.tensor([float((sum(load) > R * n) - (sum(load) < R * n)) for n in load])


def test_the_start_is_the_base() -> None:
    torch.manual_seed(1)
    model = get_peft_model(Net(), SMoRA(r=R, k=K, target_modules=["q"]))
    layer, update = the_layer(model)
    assert torch.equal(model(inputs()), layer.base_layer(inputs()))
    assert (update.balance == 0).all()
    assert update.router.abs().max() <= 1 / IN**0.5
    assert float(update.router.detach().std()) == pytest.approx((1 / 3 / IN) ** 0.5, rel=0.2)


@pytest.mark.parametrize("bias_in_gate", [True, False])
def test_of_every_token_k_gates_are_open_and_sum_to_k(bias_in_gate: bool) -> None:
    _, update = the_layer(adapted(bias_in_gate=bias_in_gate))
    chosen, gates = update.route(inputs())
    assert gates.dtype == torch.float32
    assert ((gates != 0).sum(-1) == K).all()
    assert torch.allclose(gates.sum(-1), torch.full((ROWS, POSITIONS), float(K)), atol=1e-6)
    assert torch.equal(gates.gather(-1, chosen) != 0, torch.ones_like(chosen, dtype=torch.bool))
    # in half precision the routing is still computed in float32
    assert update.bfloat16().route(inputs().bfloat16())[1].dtype == torch.float32


@pytest.mark.parametrize("bias_in_gate", [True, False])
def test_output_and_gradients_are_those_of_the_open_ranks_alone(bias_in_gate: bool) -> None:
    model, x = adapted(bias_in_gate=bias_in_gate), inputs().requires_grad_()
    results = []
    for call in (model, lambda x: by_the_formula(model, x)):
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained(model)])])
    assert len(results[0]) == 5
    for actual, expected in zip(*results, strict=True):
        close32(actual, expected)


def test_blocks_of_p_ranks_are_a_mixture_of_loras() -> None:
    model, x = adapted(r=8, k=4, p=2, bias_in_gate=False), inputs()
    layer, update = the_layer(model)
    with torch.no_grad():
        update.router.copy_(torch.eye(4, IN))
        update.balance.copy_(torch.tensor([0.0, 0.5, -0.5, 0.1]))
    scores = torch.sigmoid(x[..., :4])
    best = (scores + update.balance).topk(2, dim=-1).indices
    weights = torch.zeros_like(scores).scatter(-1, best, scores.gather(-1, best))
    weights = 4 * weights / weights.sum(-1, keepdim=True) / 2
    experts = [x @ update.A[2 * i : 2 * i + 2].T @ update.B[:, 2 * i : 2 * i + 2].T for i in range(4)]
    mixture = sum(weights[..., i : i + 1] * expert for i, expert in enumerate(experts))
    close32(model(x), layer.base_layer(x) + update.config.alpha / 4 * mixture)


def test_with_all_ranks_open_alike_it_is_lora() -> None:
    model = adapted(k=R)
    layer, update = the_layer(model)
    with torch.no_grad():
        update.router.zero_()
        update.balance.zero_()
    close32(model(inputs()), layer.base_layer(inputs()) + 16 / R * inputs() @ update.A.T @ update.B.T)


def test_the_order_of_the_ranks_does_not_matter() -> None:
    model = adapted()
    before, order = model(inputs()), torch.randperm(R, generator=torch.Generator().manual_seed(4))
    _, update = the_layer(model)
    for name, dim in (("A", 0), ("B", 1), ("router", 0), ("balance", 0)):
        value = getattr(update, name)
        value.data = value.data.index_select(dim, order)
    close32(model(inputs()), before)


def test_one_token_teaches_its_own_ranks_alone() -> None:
    model, token = adapted(), inputs()[:1, :1]
    _, update = the_layer(model)
    model(token).square().sum().backward()
    opened = torch.zeros(R, dtype=torch.bool).index_fill(0, update.route(token)[0].flatten(), True)
    for gradient in (update.A.grad, update.B.grad.T, update.router.grad):
        assert torch.equal(gradient.abs().amax(1) > 0, opened)
    assert update.balance.grad is None


@pytest.mark.parametrize(("k", "expected"), [(None, 2), (3, 3)])
def test_sizes(k: int | None, expected: int) -> None:
    config = SMoRA(r=12, k=k)
    assert config.open_blocks == expected
    assert SMoRA().open_blocks == 8
    assert config.trainable_count((OUT, IN)) == 12 * (IN + OUT) + 12 * IN
    assert SMoRA(r=12, p=3).trainable_count((OUT, IN)) == 12 * (IN + OUT) + 4 * IN
    assert sum(value.numel() for value in trained(adapted())) == R * (IN + OUT) + R * IN


def test_the_balance_moves_against_the_load_after_each_step() -> None:
    model = adapted().train()
    _, update = the_layer(model)
    expected = expected_move(update, inputs())
    assert expected.unique().numel() > 1
    assert torch.equal(step(model, inputs()), expected)
    # with all ranks open, each has exactly the mean
    assert torch.equal(step(adapted(k=R).train(), inputs()), torch.zeros(R))


def test_micro_batches_and_several_passes_are_one_load() -> None:
    parts = [inputs(seed)[:, :2] for seed in range(4)]
    model = adapted().train()
    _, update = the_layer(model)
    expected = expected_move(update, *parts)
    assert any(not torch.equal(expected_move(update, part), expected) for part in parts)
    assert torch.equal(step(model, *parts), expected)
    # a loss of two passes, as preference training has
    twice = adapted().train()
    _, update = the_layer(twice)
    (twice(parts[0]).mean() - twice(parts[1]).mean()).backward()
    assert torch.equal(step(twice, *parts[2:]), expected)
    assert (update.load == 0).all()


def test_what_no_step_learns_from_is_not_counted() -> None:
    model = adapted().train()
    _, update = the_layer(model)
    with torch.no_grad():
        model(inputs(5))
    model(inputs(6))
    model.eval()
    model(inputs(7)).sum().backward()
    assert (update.load == 0).all()
    assert torch.equal(step(model, inputs(8)), torch.zeros(R))
    model.train()
    expected = expected_move(update, inputs())
    assert torch.equal(step(model, inputs()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_pass_counts_once(reentrant: bool) -> None:
    model, parts = adapted().train(), [inputs(seed).requires_grad_() for seed in (2, 3)]
    model.get_base_model().reentrant = reentrant
    _, update = the_layer(model)
    expected = expected_move(update, *parts)
    model(parts[0]).square().mean().backward()
    assert update.load.sum() == K * ROWS * POSITIONS
    assert torch.equal(step(model, parts[1]), expected)


def test_transformers_checkpointing_counts_once() -> None:
    loads = []
    for checkpointing in (False, True):
        model = tiny.adapted(SMoRA(r=R, k=K, target_modules=tiny.TARGETS)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tiny.loss(model).backward()
        loads.append([update.load for _, update in updates_of(model, "default")])
    real = int(tiny.batch()["attention_mask"].sum())
    assert [int(load.sum()) for load in loads[0]] == [K * real] * len(loads[0])
    assert all(torch.equal(*pair) for pair in zip(*loads, strict=True))


def test_padding_and_rows_of_other_adapters_are_left_out() -> None:
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.int64)
    mask[1:, 3:] = 0
    model = adapted().train()
    _, update = the_layer(model)
    expected = expected_move(update, inputs()[mask.bool()])
    assert not torch.equal(expected_move(update, inputs()), expected)
    assert torch.equal(step(model, inputs(), attention_mask=mask), expected)
    mixed = adapted().train()
    mixed.add_adapter("other", LoRA(r=2, target_modules=["q"]))
    _, update = the_layer(mixed)
    rows = ["default", "other", "__base__", "other"]
    expected = expected_move(update, inputs()[:1])
    assert torch.equal(step(mixed, inputs(), adapter_names=rows, attention_mask=mask), expected)


def test_compiled_training_counts_too() -> None:
    model = adapted().train()
    _, update = the_layer(model)
    expected = expected_move(update, inputs())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(inputs()).square().mean().backward()
    assert update.load.sum() == 2 * K * ROWS * POSITIONS
    assert torch.equal(step(model), expected)


def test_two_optimizers_step_the_balance_once() -> None:
    model = adapted().train()
    _, update = the_layer(model)
    before, expected = update.balance.clone(), expected_move(update, inputs())
    model(inputs()).square().mean().backward()
    for values in ([update.A, update.B], [update.router]):
        torch.optim.SGD(values, lr=0.0).step()
    assert torch.equal(((update.balance - before) / 0.01).round(), expected)


def test_a_copy_counts_for_itself() -> None:
    model = adapted().train()
    model(inputs()).square().mean().backward()
    twin = copy.deepcopy(model)
    step(twin, inputs())
    assert the_layer(model)[1].load.sum() == K * ROWS * POSITIONS
    assert the_layer(twin)[1].load.sum() == 0


def test_balancing_evens_the_load_out() -> None:
    spreads = []
    for rate in (0.0, 0.01):
        model, x = adapted(balance_rate=rate).train(), inputs()
        _, update = the_layer(model)
        with torch.no_grad():
            update.balance.copy_(torch.linspace(-0.2, 0.2, R))
        for _ in range(40):
            step(model, x)
        load = torch.bincount(update.route(x)[0].flatten(), minlength=R)
        spreads.append(int(load.max() - load.min()))
    assert spreads[1] < spreads[0] / 2


def test_the_balance_is_saved(tmp_path: Path) -> None:
    model = adapted().train()
    step(model, inputs())
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(the_layer(loaded)[1].balance, the_layer(model)[1].balance)
    assert torch.equal(loaded(inputs()), model.eval()(inputs()))


def test_it_has_no_fixed_weight(tmp_path: Path) -> None:
    for options in ({}, {"k": R}):
        with pytest.raises(ValueError, match="cannot be merged into layer 'q': its update depends on each layer's inp"):
            adapted(**options).merge_adapter()
        with pytest.raises(ValueError, match="its update depends on each layer's input"):
            export_lora(adapted(**options), tmp_path / "lora")


def error_on_clusters(seed: int, config: SMoRA | LoRA) -> float:
    """The relative error on 8 clusters of inputs, each with a change of its own of one linear map, after training."""
    generator = torch.Generator().manual_seed(seed)

    def low_rank() -> Tensor:
        return torch.randn(48, 2, generator=generator) @ torch.randn(2, 48, generator=generator) / 96**0.5

    maps = torch.stack([low_rank() for _ in range(8)]) + low_rank()
    clusters = torch.arange(2048) % 8
    x = 1.5 * torch.randn(8, 48, generator=generator)[clusters] + torch.randn(2048, 48, generator=generator)
    y = torch.einsum("noi,ni->no", maps[clusters], x)
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(48, 48, bias=False))
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(trained(model), lr=0.03, weight_decay=0.0)
    for _ in range(150):
        rows = torch.randint(1024, (256,), generator=generator)
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((model.eval()(x[1024:]) - y[1024:]).square().mean() / y[1024:].square().mean())


@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_tokens_choose_serve_clusters_that_one_lora_cannot(seed: int) -> None:
    single = error_on_clusters(seed, LoRA(r=48, alpha=48, target_modules=["0"]))
    gated = error_on_clusters(seed, SMoRA(r=48, k=8, alpha=8, balance_rate=1e-3, target_modules=["0"]))
    # measured: less than a tenth
    assert gated < single / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank r"),
        ({"r": 8, "p": 3}, "p must be a whole number that divides the rank r = 8"),
        ({"r": 8, "k": 9}, "k must be a multiple of p = 1 between 1 and r = 8"),
        ({"r": 8, "k": 3, "p": 2}, "k must be a multiple of p = 2"),
        ({"balance_rate": -1.0}, "balance_rate"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMoRA(**options)


def test_more_ranks_than_the_weight_has_may_exist_but_not_be_open() -> None:
    assert adapted(r=40, k=3)(inputs()).shape == (ROWS, POSITIONS, OUT)
    with pytest.raises(ValueError, match="k = 13 open ranks are above 12, the rank of layer 'q'"):
        adapted(r=40, k=13)
