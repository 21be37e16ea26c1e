"""AM-LoRA: the attentional mixture against plain loops over rows, tokens and tasks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import AMLoRA, LoRA, activation_penalty, add_task, export_lora
from folklora.adapters.am_lora import AMLoRAUpdate
from folklora.adapters.host.layer import FolkloraLayer, updates_of

EPS32 = torch.finfo(torch.float32).eps
IN, OUT, R = 24, 20, 3
SHAPE = (OUT, IN)
TOKEN_GATES = {"granularity": "token", "gate_init": "linear"}


class Net(nn.Module):
    """One linear layer in a model that is called as language models are."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(IN, OUT)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.q(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(base: nn.Module | None = None, fill: bool = True, **options: Any) -> PeftModel:
    """A model with gates that read token by token; LoRAs and gates have values of ordinary size (or start values)."""
    base = base or net()
    torch.manual_seed(1)
    settings = {"r": R, "alpha": 2.0, "dropout": 0.0, "tasks": 3, "target_modules": ["q"], **TOKEN_GATES} | options
    model = get_peft_model(base, AMLoRA(**settings))
    if fill:
        randomise(model)
    return model


def randomise(model: PeftModel, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, update in updates_of(model, "default"):
            for part in (update.A, update.B, update.gate_weight, update.gate_bias):
                for parameter in part:
                    parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def the_layer(model: PeftModel) -> tuple[FolkloraLayer, AMLoRAUpdate]:
    return next(updates_of(model, "default"))


def inputs(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*(shape or (2, 5)), IN, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def loops(model: PeftModel, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, attention over the slots and scores, in float64, one token and one task at a time."""
    layer, update = the_layer(model)
    config, weight, bias = update.config, layer.base_layer.weight.double(), layer.base_layer.bias.double()
    tasks = list(zip(update.A, update.B, update.gate_weight, update.gate_bias, strict=True))
    outputs, attentions, all_scores = [], [], []
    for n, row in enumerate(x.double()):
        valid = [True] * len(row) if mask is None else mask[n].bool().tolist()
        h = [[config.alpha / config.r * (B.double() @ (A.double() @ token)) for A, B, _, _ in tasks] for token in row]
        reads = [
            [{"input": token, "lora": part, "both": torch.cat([token, part])}[config.gate_input] for part in parts]
            for token, parts in zip(row, h, strict=True)
        ]
        if config.granularity == "sequence":
            kept = list(itertools.compress(reads, valid))
            reads = [[sum(q[i] for q in kept) / len(kept) for i in range(len(tasks))]] * len(row)
        for token, parts, q in zip(row, h, reads, strict=True):
            scores = []
            for (_, _, w, b), read in zip(tasks, q, strict=True):
                read = torch.tanh(read) if config.score_activation == "tanh" else read
                scores.append(w.double() @ read / config.temperature + b.double()[0])
            powers = [score.exp() for score in scores]
            none = 1.0 if config.zero_slot else 0.0
            a = [power / (sum(powers) + none) for power in powers]
            outputs.append(weight @ token + bias + sum(share * part for share, part in zip(a, parts, strict=True)))
            attentions.append(torch.stack([1 - sum(a), *a] if config.zero_slot else a))
            all_scores.append(torch.stack(scores))
    return tuple(torch.stack(part).view(*x.shape[:2], -1) for part in (outputs, attentions, all_scores))


def attention(model: PeftModel, x: Tensor, **more: Any) -> Tensor:
    _, update = the_layer(model)
    update.record = True
    model(x, **more)
    return update.attention


def assert_close32(actual: Tensor, expected: Tensor) -> None:
    # sums of at most 44 terms, nested three times
    tolerance = 100 * EPS32 * max(float(expected.detach().abs().max()), 1e-3)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("score_activation", ["identity", "tanh"])
@pytest.mark.parametrize("zero_slot", [True, False])
@pytest.mark.parametrize("gate_input", ["input", "lora", "both"])
def test_output_attention_and_gradients_equal_plain_loops(
    gate_input: str, zero_slot: bool, score_activation: str, granularity: str
):
    options = {"gate_input": gate_input, "zero_slot": zero_slot, "score_activation": score_activation}
    model, x = adapted(granularity=granularity, temperature=0.7, selector_train="all", **options), inputs()
    expected, a, _ = loops(model, x, MASK)
    assert_close32(attention(model, x, attention_mask=MASK).expand(2, 5, -1), a)
    y = model(x, attention_mask=MASK)
    assert_close32(y, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    theirs = torch.autograd.grad(expected, trained, direction.double())
    for actual, wanted in zip(torch.autograd.grad(y, trained, direction), theirs, strict=True):
        assert_close32(actual, wanted)


@pytest.mark.parametrize("gate_input", ["input", "lora", "both"])
@pytest.mark.parametrize("zero_slot", [True, False])
def test_a_new_task_and_a_disabled_adapter_are_the_base_bit_for_bit(gate_input: str, zero_slot: bool):
    x = inputs()
    new = adapted(fill=False, tasks=1, gate_input=gate_input, zero_slot=zero_slot)
    assert torch.equal(new(x), net()(x))
    used = adapted(gate_input=gate_input, zero_slot=zero_slot)
    assert not torch.equal(used(x), net()(x))
    with used.disable_adapter():
        assert torch.equal(used(x), net()(x))


@pytest.mark.parametrize("zero_slot", [True, False])
def test_attention_is_a_distribution_over_the_slots(zero_slot: bool):
    a = attention(adapted(zero_slot=zero_slot), 20 * inputs())
    assert a.shape == (2, 5, 3 + zero_slot)
    assert a.dtype == torch.float32
    assert (a >= 0).all()
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 5), rtol=0, atol=1e-6)
    assert not zero_slot or (attention(adapted(), inputs())[..., 0] > 0).all()


@pytest.mark.parametrize("chosen", [None, 0, 1, 2])
def test_scores_that_choose_one_slot_leave_the_base_plus_that_lora(chosen: int | None):
    model, x = adapted(), inputs()
    layer, update = the_layer(model)
    with torch.no_grad():
        for i, bias in enumerate(update.gate_bias):
            bias.fill_(1e4 if i == chosen else -1e4)
    weight = layer.base_layer.weight.double()
    if chosen is not None:
        weight = weight + 2.0 / R * update.B[chosen].double() @ update.A[chosen].double()
    assert_close32(model(x), x.double() @ weight.T + layer.base_layer.bias.double())


def test_equal_loras_without_a_zero_slot_are_that_lora_for_any_gate():
    model, x = adapted(zero_slot=False), inputs()
    layer, update = the_layer(model)
    with torch.no_grad():
        for A, B in zip(update.A, update.B, strict=True):
            A.copy_(update.A[0])
            B.copy_(update.B[0])
    weight = layer.base_layer.weight.double() + 2.0 / R * update.B[0].double() @ update.A[0].double()
    assert_close32(model(x), x.double() @ weight.T + layer.base_layer.bias.double())


def test_the_first_lora_without_a_zero_slot_is_a_plain_lora_and_with_one_starts_at_half():
    x, plain = inputs(), get_peft_model(net(), LoRA(r=R, alpha=2.0, target_modules=["q"]))
    model = adapted(tasks=1, zero_slot=False)
    _, update = the_layer(model)
    _, lora = next(updates_of(plain, "default"))
    with torch.no_grad():
        lora.A.copy_(update.A[0])
        lora.B.copy_(update.B[0])
    assert (attention(model, x) == 1).all()
    assert_close32(model(x), plain(x))
    half = attention(adapted(fill=False, tasks=1, gate_init="zero"), x)
    assert (half == 0.5).all()


def penalised(model: PeftModel, x: Tensor, **more: Any) -> Tensor | None:
    model.train()(x, **more)
    return activation_penalty(model)


def test_the_attentions_l1_norm_trains_only_where_the_zero_slot_is_left_out_of_it():
    options = {"sparsity": 1.0, "selector_train": "all"}
    constant = adapted(zero_slot=False, **options)
    value = penalised(constant, inputs())
    assert value.item() == pytest.approx(1.0, abs=1e-6)
    value.backward()
    _, update = the_layer(constant)
    assert max(float(p.grad.abs().max()) for p in [*update.gate_weight, *update.gate_bias]) < 1e-7
    model = adapted(**options)
    _, update = the_layer(model)
    penalised(model, inputs()).backward()
    # the penalty is 1 - a_0: descent lowers every score
    assert all(bias.grad.item() > 1e-3 for bias in update.gate_bias)


def test_the_scores_l1_norm_pulls_the_attention_towards_uniform():
    model = adapted(sparsity=1.0, sparsity_on="scores", selector_train="all")
    before = attention(model, inputs()).std(-1).mean()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        penalised(model, inputs()).backward()
        optimizer.step()
    assert attention(model, inputs()).std(-1).mean() < 0.5 * before


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("zero_slot", [True, False])
@pytest.mark.parametrize("sparsity_on", ["attention", "entropy", "scores"])
def test_penalty_equals_plain_loops_over_real_tokens(sparsity_on: str, zero_slot: bool, masked: bool):
    model, x = adapted(sparsity=0.3, sparsity_on=sparsity_on, zero_slot=zero_slot), inputs()
    _, a, scores = loops(model, x)
    values = []
    for n, position in itertools.product(range(2), range(5)):
        if masked and not MASK[n, position]:
            continue
        here, e = a[n, position], scores[n, position]
        values.append(
            {
                "attention": sum(here[1:] if zero_slot else here),
                "entropy": -sum(share * share.log() for share in here),
                "scores": sum(score.abs() for score in e),
            }[sparsity_on]
        )
    value = penalised(model, x, attention_mask=MASK if masked else None)
    assert value.dtype == torch.float32
    assert_close32(value, 0.3 * sum(values) / len(values))
    assert activation_penalty(model) is None
    if masked:
        other = torch.where(MASK.bool().unsqueeze(-1), x, 7.0)
        assert torch.equal(penalised(model, other, attention_mask=MASK), value)


def test_no_penalty_in_evaluation_nor_without_a_weight():
    model = adapted(sparsity=0.3).eval()
    model(inputs())
    assert activation_penalty(model) is None
    assert penalised(adapted(sparsity=0.0), inputs()) is None


def test_a_batch_without_rows_has_no_penalty_and_no_output():
    model = adapted(sparsity=0.3)
    assert penalised(model, inputs(0, 5)).item() == 0
    assert model(inputs(0, 5)).shape == (0, 5, OUT)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gate_input", ["input", "lora", "both"])
def test_softmax_and_penalty_are_float32_in_half_precision(gate_input: str, autocast: bool):
    model = adapted(net() if autocast else net().bfloat16(), sparsity=0.3, gate_input=gate_input)
    x = inputs() if autocast else inputs().bfloat16()
    exact = attention(adapted(gate_input=gate_input), inputs())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        a, value = attention(model, x), penalised(model, x)
    assert a.dtype == value.dtype == torch.float32
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 5), rtol=0, atol=4 * EPS32)
    # a score is a sum of at most 44 products of rounded factors, rounded itself; the attention moves less than it
    torch.testing.assert_close(a, exact, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)


def test_padding_does_not_reach_a_sequences_attention():
    model, x = adapted(granularity="sequence"), inputs()
    real = MASK.bool()
    other = torch.where(real.unsqueeze(-1), x, 7.0)
    assert torch.equal(model(other, attention_mask=MASK)[real], model(x, attention_mask=MASK)[real])
    alone = model(x[1:, 2:], attention_mask=MASK[1:, 2:])
    assert_close32(model(x, attention_mask=MASK)[1:, 2:], alone)


@pytest.mark.parametrize("shape", [(6,), ()])
def test_vectors_outside_a_sequence_have_an_attention_each(shape: tuple[int, ...]):
    model, x = adapted(granularity="sequence"), inputs(*shape) if shape else inputs(1)[0]
    assert_close32(model(x), loops(model, x.view(-1, 1, IN))[0].view(*shape, OUT))


@pytest.mark.parametrize(("granularity", "shape"), [("token", (2, 3, 4)), ("sequence", (2, 3, 4))])
def test_inputs_with_more_dimensions(granularity: str, shape: tuple[int, ...]):
    model, x = adapted(granularity=granularity), inputs(*shape)
    assert_close32(model(x), loops(model, x.flatten(0, 1))[0].view(*shape, OUT))


@pytest.mark.parametrize(("gate_input", "width"), [("input", IN), ("lora", OUT), ("both", IN + OUT)])
@pytest.mark.parametrize("selector_train", ["new", "all"])
def test_trainable_count_and_start_values(gate_input: str, width: int, selector_train: str):
    options = {"gate_input": gate_input, "selector_train": selector_train, "new_gate_bias": -2.5}
    model = adapted(fill=False, tasks=1, **options)
    add_task(model)
    trainable, _ = model.get_nb_trainable_parameters()
    gates = 2 if selector_train == "all" else 1
    assert trainable == R * (IN + OUT) + gates * (width + 1) == model.peft_config["default"].trainable_count(SHAPE)
    _, update = the_layer(model)
    for A, B, w, b in zip(update.A, update.B, update.gate_weight, update.gate_bias, strict=True):
        assert (A.shape, B.shape, w.shape, b.item()) == ((R, IN), (OUT, R), (width,), -2.5)
        assert 0 < A.abs().max() <= 1 / math.sqrt(IN)
        assert 0 < w.abs().max() <= 1 / math.sqrt(width)
        assert (B == 0).all()
    assert (
        adapted(fill=False, gate_init="zero").base_model.model.q.folklora_updates["default"].gate_weight[0] == 0
    ).all()


@pytest.mark.parametrize("bias", [0.0, -8.0])
def test_a_new_slot_takes_attention_in_proportion_and_little_with_a_negative_bias(bias: float):
    model, x = adapted(tasks=2, new_gate_bias=bias, gate_init="zero"), inputs()
    before, y = attention(model, x).double(), model(x)
    add_task(model)
    after = attention(model, x).double()
    # e_0 = 0, so that all slots together weigh 1 / a_0, and the new one exp(bias)
    share = math.exp(bias) / (1 / before[..., :1] + math.exp(bias))
    assert_close32(after[..., :-1], before * (1 - share))
    assert_close32(after[..., -1:], share)
    change = (model(x) - y).abs().max()
    assert change > 1e-2 if bias == 0 else 0 < change < 1e-3


def test_the_order_of_old_tasks_does_not_matter():
    model, x = adapted(), inputs()
    _, update = the_layer(model)
    before = model(x)
    for part in (update.A, update.B, update.gate_weight, update.gate_bias):
        part[0].data, part[1].data = part[1].data, part[0].data
    assert_close32(model(x), before)


def test_dropout_reaches_the_loras_and_not_the_gates():
    model, x = adapted(dropout=0.5), inputs()
    layer, update = the_layer(model)
    a = attention(model.eval(), x)
    torch.manual_seed(5)
    kept = F.dropout(x, 0.5)
    torch.manual_seed(5)
    y = model.train()(x)
    assert torch.equal(update.attention, a)
    h = [2.0 / R * kept @ A.T @ B.T for A, B in zip(update.A, update.B, strict=True)]
    assert_close32(y, layer.base_layer(x) + sum(a[..., i + 1, None] * part for i, part in enumerate(h)))


def test_it_has_no_fixed_weight(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be merged into layer 'q': its update depends on each layer's input"):
        adapted().merge_adapter()
    with pytest.raises(ValueError, match="no plain LoRA form"):
        export_lora(adapted(), tmp_path / "lora")


@pytest.mark.parametrize(
    "options",
    [
        {"gate_input": "output"},
        {"selector_train": "old"},
        {"granularity": "word"},
        {"score_activation": "relu"},
        {"gate_init": "normal"},
        {"sparsity_on": "logits"},
        {"tasks": 0},
        {"temperature": 0.0},
        {"sparsity": -1.0},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(options))):
        AMLoRA(**options)
