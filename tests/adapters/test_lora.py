"""LoRA and rsLoRA: what the papers promise, and PEFT's own LoRA as an oracle."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from folklora import LoRA
from folklora.adapters.host.layer import FolkloraLayer, layers_of, updates_of

EPS32 = torch.finfo(torch.float32).eps
TARGETS = ["q", "v"]


class Net(nn.Module):
    """Two linear layers of unequal sides."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(24, 20), nn.Linear(20, 36, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(self.q(x)))


def net(kind: type = Net) -> Any:
    torch.manual_seed(0)
    return kind()


def adapted(config: Any, base: nn.Module | None = None, seed: int = 1) -> PeftModel:
    base = base or net()
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def inputs(seed: int = 2) -> Tensor:
    return torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(seed))


def randomise(model: PeftModel, seed: int = 3) -> None:
    """Trained values: nothing of the update stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def copied_to_peft(model: PeftModel, **options: Any) -> PeftModel:
    """PEFT's own LoRA with the values of ours, on a base of the same seed."""
    base = copy.deepcopy(model).unload()
    theirs = get_peft_model(base, LoraConfig(target_modules=TARGETS, **options))
    with torch.no_grad():
        for layer, update in updates_of(model, "default"):
            other = theirs.base_model.model.get_submodule(layer.name)
            other.lora_A["default"].weight.copy_(update.A)
            other.lora_B["default"].weight.copy_(update.B)
    return theirs


def assert_close32(actual: Tensor, expected: Tensor) -> None:
    # sums of at most 36 terms in each of a few layers
    torch.testing.assert_close(actual, expected, rtol=0, atol=100 * EPS32 * float(expected.detach().abs().max()))


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in layers_of(model)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_is_the_base_bit_for_bit(rslora: bool, training: bool):
    x, base = inputs(), net()
    expected = base(x)
    model = adapted(LoRA(r=4, rslora=rslora, target_modules=TARGETS, dropout=0.0), base).train(training)
    assert torch.equal(model(x), expected)


def test_start_values():
    model = adapted(LoRA(r=16, target_modules=TARGETS), net().bfloat16())
    for layer, update in updates_of(model, "default"):
        out, columns = layer.get_base_layer().weight.shape
        bound = 1 / math.sqrt(columns)
        assert update.A.dtype == update.B.dtype == torch.float32
        assert (update.A.shape, update.B.shape) == ((16, columns), (out, 16))
        assert update.A.abs().max() <= bound
        # the standard deviation of U(-bound, bound) is bound / √3; that of its estimate from 320 values is below 3 %
        assert update.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.12)
        assert (update.B == 0).all()


def test_at_the_first_step_only_the_zero_factor_moves():
    model = adapted(LoRA(r=4, target_modules=TARGETS))
    model(inputs()).square().sum().backward()
    for _, update in updates_of(model, "default"):
        assert (update.A.grad == 0).all()
        assert update.B.grad.abs().max() > 0


@pytest.mark.parametrize("r", [1, 4])
def test_trainable_count_and_frozen_base(r: int):
    config = LoRA(r=r, target_modules=TARGETS)
    model = adapted(config)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == r * (20 + 24) + r * (36 + 20)
    assert trainable == config.trainable_count((20, 24)) + config.trainable_count((36, 20))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"}


@pytest.mark.parametrize("rslora", [False, True])
def test_output_and_gradients_equal_pefts(rslora: bool):
    model = adapted(LoRA(r=4, alpha=10.0, rslora=rslora, target_modules=TARGETS))
    randomise(model)
    theirs = copied_to_peft(model, r=4, lora_alpha=10, use_rslora=rslora)
    x = inputs()
    mine, other = model(x), theirs(x)
    assert_close32(mine, other)
    mine.square().mean().backward()
    other.square().mean().backward()
    for layer, update in updates_of(model, "default"):
        peft_layer = theirs.base_model.model.get_submodule(layer.name)
        assert_close32(update.A.grad, peft_layer.lora_A["default"].weight.grad)
        assert_close32(update.B.grad, peft_layer.lora_B["default"].weight.grad)


def test_a_few_training_steps_equal_pefts():
    model = adapted(LoRA(r=4, alpha=8.0, target_modules=TARGETS))
    theirs = copied_to_peft(model, r=4, lora_alpha=8)
    base, x, goal = weights(model), inputs(), torch.randn(5, 7, 36, generator=torch.Generator().manual_seed(9))
    losses: list[list[float]] = []
    for trained in (model, theirs):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=2.0)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.mse_loss(trained(x), goal)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.95 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close32(model(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(base, weights(model), strict=True))


def test_rslora_is_lora_with_alpha_times_root_r():
    models = [
        adapted(LoRA(r=4, alpha=3.0, rslora=True, target_modules=TARGETS)),
        adapted(LoRA(r=4, alpha=3.0 * math.sqrt(4), target_modules=TARGETS)),
    ]
    for model in models:
        randomise(model)
    assert torch.equal(models[0](inputs()), models[1](inputs()))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_keeps_the_output_and_unmerging_gives_back_the_base_bit_for_bit(safe: bool):
    model = adapted(LoRA(r=4, target_modules=TARGETS))
    randomise(model)
    x, before = inputs(), weights(model)
    expected = model(x)
    model.merge_adapter(safe_merge=safe)
    for layer, weight in zip(layers_of(model), before, strict=True):
        delta = layer.get_base_layer().weight - weight
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 4
    assert_close32(model(x), expected)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert torch.equal(model(x), expected)


def test_merged_and_unloaded_it_is_the_plain_model():
    model = adapted(LoRA(r=4, target_modules=TARGETS))
    randomise(model)
    expected = model(inputs())
    plain = model.merge_and_unload()
    assert not any(isinstance(module, FolkloraLayer) for module in plain.modules())
    assert_close32(plain(inputs()), expected)


def test_two_adapters_at_once_add_their_updates():
    model = adapted(LoRA(r=4, target_modules=TARGETS))
    model.add_adapter("second", LoRA(r=3, alpha=5.0, rslora=True, target_modules=["v"]))
    model.base_model.set_adapter(["default", "second"])
    randomise(model)
    x, expected = inputs(), net()
    with torch.no_grad():
        for name in ("default", "second"):
            for layer, update in updates_of(model, name):
                expected.get_submodule(layer.name).weight += update.factors().dense()
    assert_close32(model(x), expected(x))
    model.merge_adapter()
    assert_close32(model(x), expected(x))


def test_a_transposed_layer_equals_the_linear_one():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = Conv1D(20, 24), Conv1D(36, 20)

        forward = Net.forward

    linear, transposed = net(), net(Transposed)
    with torch.no_grad():
        for name in TARGETS:
            transposed.get_submodule(name).weight.copy_(linear.get_submodule(name).weight.T)
        transposed.q.bias.copy_(linear.q.bias)
        transposed.v.bias.zero_()
    models = [adapted(LoRA(r=4, target_modules=TARGETS), base) for base in (linear, transposed)]
    for model in models:
        randomise(model)
    assert_close32(models[1](inputs()), models[0](inputs()))
    models[1].merge_adapter()
    assert_close32(models[1](inputs()), models[0](inputs()))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Embedding(30, 12)
        self.v = nn.Conv1d(12, 10, 3, stride=2, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.v(self.q(tokens).transpose(1, 2))


def test_embeddings_and_convolutions_equal_pefts():
    model = adapted(LoRA(r=4, alpha=6.0, target_modules=TARGETS), net(Words))
    randomise(model)
    theirs = get_peft_model(net(Words), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    updates = {layer.name: update for layer, update in updates_of(model, "default")}
    embedding, convolution = theirs.base_model.model.q, theirs.base_model.model.v
    with torch.no_grad():
        embedding.lora_embedding_A["default"].copy_(updates["q"].A)
        embedding.lora_embedding_B["default"].copy_(updates["q"].B)
        convolution.lora_A["default"].weight.copy_(updates["v"].A.view(4, 12, 3))
        convolution.lora_B["default"].weight.copy_(updates["v"].B.view(10, 4, 1))
    tokens = torch.randint(0, 30, (3, 16), generator=torch.Generator().manual_seed(4))
    expected = theirs(tokens)
    assert (expected - net(Words)(tokens)).abs().max() > 0.1
    assert_close32(model(tokens), expected)
    model.merge_adapter()
    assert_close32(model(tokens), expected)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_a_dilated_convolution_equals_its_merged_weight(mode: str):
    base = nn.Sequential(nn.Conv2d(6, 10, 3, stride=2, padding=2, dilation=2, padding_mode=mode))
    model = adapted(LoRA(r=4, target_modules=["0"]), base)
    randomise(model)
    x = torch.randn(2, 6, 11, 8, generator=torch.Generator().manual_seed(4))
    expected = model(x)
    model.merge_adapter()
    assert_close32(model(x), expected)


def test_dropout_drops_elements_of_the_input_in_training_only():
    p = 0.4
    model = adapted(LoRA(r=4, alpha=8.0, dropout=p, target_modules=["q"]))
    randomise(model)
    layer, update = next(updates_of(model, "default"))
    x, base = inputs(), layer.get_base_layer()
    torch.manual_seed(5)
    kept = F.dropout(x, p)
    torch.manual_seed(5)
    dropped = layer.train()(x)
    assert_close32(dropped, base(x) + 2.0 * kept @ update.A.T @ update.B.T)
    assert_close32(layer.eval()(x), base(x) + 2.0 * x @ update.A.T @ update.B.T)


def test_adapters_with_equal_dropout_lose_the_same_elements():
    model = adapted(LoRA(r=4, dropout=0.5, target_modules=["q"]))
    model.add_adapter("second", LoRA(r=4, dropout=0.5, target_modules=["q"]))
    model.base_model.set_adapter(["default", "second"])
    randomise(model)
    (layer,) = layers_of(model)
    first, second = (layer.folklora_updates[name] for name in ("default", "second"))
    with torch.no_grad():
        second.A.copy_(first.A)
        second.B.copy_(-first.B)
    # opposite updates cancel only if both saw the same input
    assert_close32(layer.train()(inputs()), layer.get_base_layer()(inputs()))


def test_rank_and_alpha_patterns():
    config = LoRA(r=4, alpha=8.0, target_modules=TARGETS, rank_pattern={"v": 2}, alpha_pattern={"v": 6.0})
    updates = {layer.name: update for layer, update in updates_of(adapted(config), "default")}
    assert [(u.A.shape[0], u.scale) for u in (updates["q"], updates["v"])] == [(4, 2.0), (2, 3.0)]


def test_an_adapter_on_a_real_transformer_equals_pefts(tiny_llama):
    tokens = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(4))
    targets = ["q_proj", "v_proj"]
    model = adapted(LoRA(r=4, alpha=8.0, target_modules=targets), tiny_llama())
    randomise(model)
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for layer, update in updates_of(model, "default"):
            other = theirs.base_model.model.get_submodule(layer.name)
            other.lora_A["default"].weight.copy_(update.A)
            other.lora_B["default"].weight.copy_(update.B)
    assert_close32(model(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("r", [0, -2, 2.5, "8"])
def test_a_rank_that_is_no_positive_whole_number_is_refused(r: Any):
    with pytest.raises(ValueError, match="rank r must be a whole number of at least 1"):
        LoRA(r=r)


def test_a_rank_above_the_layers_limit_names_every_such_layer_and_changes_nothing():
    base = net()
    with pytest.raises(ValueError, match=r"(?s)rank 21 is above 20.*'q'.*rank 21 is above 20.*'v'"):
        get_peft_model(base, LoRA(r=21, target_modules=TARGETS))
    assert not any(isinstance(module, FolkloraLayer) for module in base.modules())


def test_an_unknown_option_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="no option 'lora_alpha'; did you mean 'alpha'"):
        LoRA(r=4, lora_alpha=8)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_an_impossible_dropout_is_refused(dropout: float):
    with pytest.raises(ValueError, match="dropout"):
        LoRA(dropout=dropout)
