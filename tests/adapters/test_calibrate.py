"""Calibration against dense float64 computations, and that it leaves a model as it found it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from folklora import LoRA, Statistics, calibrate, tiny
from folklora.adapters.host.layer import layers_of

EVERYTHING = {"covariance", "gradient", "fisher"}
TARGETS = tiny.TARGETS


def labelled(rows: slice = slice(None)) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in tiny.labelled_batch().items()}


def read(model: nn.Module, names: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The real positions that the layers read, [positions, in]."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args: seen.__setitem__(name, args[0][batch["attention_mask"].bool()])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def gradient(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    weight = model.get_submodule(name).weight
    return torch.autograd.grad(model(**batch).loss, weight)[0]


def close64(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float64
    # sums of some dozens of terms, taken in another order
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def same(one: Statistics, other: Statistics) -> bool:
    return list(one) == list(other) and all(
        torch.equal(value, other[layer][kind]) for layer, found in one.items() for kind, value in found.items()
    )


def test_all_three_kinds_equal_their_formulas() -> None:
    model = tiny.llama(dtype=torch.float64)
    batches = [labelled(slice(0, 1)), labelled(slice(1, 4))]
    found = calibrate(model, batches, EVERYTHING, target_modules=TARGETS, dtype=torch.float64)
    assert len(found) == 2 * len(TARGETS)
    rows = [read(model, list(found), batch) for batch in batches]
    for name, kinds in found.items():
        x = torch.cat([seen[name] for seen in rows])
        assert len(x) == 4 * 6 - 2
        close64(kinds["covariance"], x.T @ x / len(x))
        gradients = torch.stack([gradient(model, name, batch) for batch in batches])
        close64(kinds["gradient"], gradients.mean(0))
        close64(kinds["fisher"], gradients.square().mean(0))
        assert kinds["gradient"].abs().max() > 1e-4


def test_the_covariance_is_symmetric_positive_and_blind_to_the_order_of_batches() -> None:
    model = tiny.llama(dtype=torch.float64)
    rows = [labelled(slice(i, i + 1)) for i in range(4)]
    options: dict[str, Any] = {"target_modules": TARGETS, "dtype": torch.float64}
    found = calibrate(model, rows, {"covariance"}, **options)
    reversed_ = calibrate(model, rows[::-1], {"covariance"}, **options)
    whole = calibrate(model, [tiny.batch()], {"covariance"}, **options)
    for name, kinds in found.items():
        C = kinds["covariance"]
        assert torch.equal(C, C.T)
        assert torch.linalg.eigvalsh(C).min() >= -1e-14 * C.trace()
        close64(C, reversed_[name]["covariance"])
        close64(C, whole[name]["covariance"])


def test_padding_does_not_count() -> None:
    model, batch = tiny.llama(), tiny.batch()
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 3)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    first, second = (calibrate(model, [b], "covariance", target_modules=TARGETS) for b in (batch, other))
    assert same(first, second)
    unmasked = calibrate(model, [{"input_ids": batch["input_ids"]}], "covariance", target_modules=TARGETS)
    name = next(iter(first))
    assert not torch.allclose(first[name]["covariance"], unmasked[name]["covariance"], rtol=1e-2)


def test_encoder_and_decoder_have_masks_of_their_own(tiny_t5: Any) -> None:
    model = tiny_t5()
    ids = torch.randint(2, 128, (2, 7), generator=torch.Generator().manual_seed(0))
    mask, answers = torch.ones_like(ids), torch.ones(2, 3, dtype=torch.long)
    mask[0, 4:], answers[1, 2:] = 0, 0
    found = []
    for filler in (5, 9):
        inputs = {"input_ids": ids.masked_fill(mask == 0, filler), "attention_mask": mask}
        inputs["decoder_input_ids"] = ids[:, :3].masked_fill(answers == 0, filler)
        whole = {**inputs, "decoder_attention_mask": answers}
        found.append(calibrate(model, [whole], "covariance", target_modules=["q", "k", "wi"]))
        with pytest.raises(ValueError, match="cannot be told which of it is padding"):
            calibrate(model, [inputs], "covariance", target_modules=["q"])
    for name, kinds in found[0].items():
        torch.testing.assert_close(kinds, dict(found[1][name]), rtol=1e-5, atol=1e-6)
    cross = [name for name in found[0] if "EncDecAttention.k" in name]
    assert len({id(found[0][name]["covariance"]) for name in cross}) == 1 < len(cross), "all read the encoder's states"
    # two masks of one shape: which positions are whose?
    square = {**whole, "decoder_input_ids": ids, "decoder_attention_mask": mask.flip(0)}
    with pytest.raises(ValueError, match="cannot be told which of it is padding"):
        calibrate(model, [square], "covariance", target_modules=["EncDecAttention.k"])


def test_layers_that_read_one_input_share_one_accumulator() -> None:
    found = calibrate(tiny.llama(), [tiny.batch()] * 2, "covariance", target_modules="all-linear")
    groups: dict[int, set[str]] = {}
    for name, kinds in found.items():
        groups.setdefault(id(kinds["covariance"]), set()).add(name.removeprefix("model.layers."))
    block = [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"self_attn.o_proj"}]
    block += [{"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}]
    assert list(groups.values()) == [{f"{i}.{name}" for name in group} for i in range(2) for group in block]


class Fork(nn.Module):
    """Two layers that read one input, or each its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.one(x) + self.two(y)


def test_layers_that_part_ways_later_are_refused() -> None:
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    with pytest.raises(RuntimeError, match=r"'two' read the same input as one in the first batch"):
        calibrate(Fork(), [(x, x), (x, y)], "covariance", target_modules=["one", "two"])
    found = calibrate(Fork(), [(x, y), (x, x)], "covariance", target_modules=["one", "two"], dtype=torch.float64)
    rows = torch.cat([y, x]).reshape(-1, 4).double()
    close64(found["two"]["covariance"], rows.T @ rows / len(rows))


def test_an_input_changed_in_place_is_another_input() -> None:
    class InPlace(Fork):
        def forward(self, x: Tensor) -> Tensor:
            first = self.one(x)
            return first + self.two(x.add_(1))

    x = torch.randn(1, 5, 4)
    found = calibrate(InPlace(), [x.clone()], "covariance", target_modules=["one", "two"])
    for name, rows in (("one", x[0]), ("two", x[0] + 1)):
        torch.testing.assert_close(found[name]["covariance"], rows.T @ rows / 5)


def test_normalised_as_cordas_authors_do() -> None:
    model, batch = tiny.llama(dtype=torch.float64), tiny.batch()
    options: dict[str, Any] = {"target_modules": ["down_proj"], "normalise": True, "dtype": torch.float64}
    found = calibrate(model, [batch], "covariance", **options)
    for name in found:
        # row by row, without its padding
        rows = [read(model, [name], labelled(slice(i, i + 1)))[name] for i in range(4)]
        expected = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in rows) / 4
        close64(found[name]["covariance"], expected)
    dead = calibrate(
        nn.Sequential(nn.Linear(3, 2)), [torch.zeros(2, 4, 3)], "covariance", target_modules=["0"], normalise=True
    )
    assert not dead["0"]["covariance"].any()


def test_gradients_are_out_by_in_however_the_weight_lies() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16)).eval()
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "labels": ids}
    found = calibrate(model, [batch], {"gradient"}, target_modules=["c_fc", "wte", "lm_head"])
    expected = {name: gradient(model, name, batch) for name in found}
    wte, head, fc = "transformer.wte", "lm_head", "transformer.h.0.mlp.c_fc"
    assert found[fc]["gradient"].shape == (64, 16)
    torch.testing.assert_close(found[fc]["gradient"], expected[fc].T)
    # one weight: each of its layers has the gradient of all its uses, in its own orientation
    torch.testing.assert_close(found[wte]["gradient"], expected[wte].T)
    torch.testing.assert_close(found[head]["gradient"], expected[wte])


def test_one_weights_gradient_exists_at_a_time() -> None:
    model = tiny.llama()
    alive = []
    weights = [p for p in model.parameters() if p.dim() == 2]
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda _: alive.append(sum(w.grad is not None for w in weights)))
    calibrate(model, [labelled()], {"gradient", "fisher"}, target_modules="all-linear")
    assert alive == [1] * 14


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(fails: bool) -> None:
    model = tiny.llama()
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model(**labelled()).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: value.grad for name, value in model.named_parameters()}
    kept = [None if value is None else value.clone() for value in gradients.values()]
    modes, wanted = ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    batches = [labelled(), {"input_ids": labelled()["input_ids"]}] if fails else [labelled()]
    if fails:
        with pytest.raises(ValueError, match="the model gave no loss"):
            calibrate(model, batches, EVERYTHING, target_modules=TARGETS)
    else:
        calibrate(model, batches, EVERYTHING, target_modules=TARGETS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    for (_, parameter), expected, value in zip(model.named_parameters(), gradients.values(), kept, strict=True):
        assert parameter.grad is expected
        assert value is None or torch.equal(parameter.grad, value)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_dropout_is_off_and_progress_changes_nothing() -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config).train()
    ids = torch.arange(12).view(2, 6)
    batches = [{"input_ids": ids, "labels": ids}] * 2
    first, second = (
        calibrate(model, batches, EVERYTHING, target_modules=["c_fc"], progress=progress) for progress in (False, True)
    )
    assert same(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": r".*\.1\..*proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ],
)
def test_a_configuration_chooses_the_layers_that_it_adapts(options: dict[str, Any]) -> None:
    config = LoRA(r=2, **options)
    found = calibrate(tiny.llama(), [tiny.batch()], "covariance", target_modules=config)
    assert config == LoRA(r=2, **options), "it is not changed"
    if set(options) == {"target_modules"}:
        again = calibrate(tiny.llama(), [tiny.batch()], "covariance", target_modules=options["target_modules"])
        assert list(again) == list(found)
    assert [layer.name for layer in layers_of(get_peft_model(tiny.llama(), config))] == list(found)


def test_own_losses_and_plain_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) - batch[1]).square().sum()

    found = calibrate(model, [(x, y)], EVERYTHING, target_modules=["0", "2"], loss=loss, dtype=torch.float64)
    expected = torch.autograd.grad(loss(model, (x, y)), [model[0].weight, model[2].weight])
    for name, value in zip(("0", "2"), expected, strict=True):
        close64(found[name]["gradient"], value)
    close64(found["0"]["covariance"], x.T @ x / 5)


def test_a_vector_a_row_counts_whole_and_what_cannot_be_told_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=61, **sizes)).eval()
    found = calibrate(model, [tiny.batch()], "covariance", target_modules=["pooler.dense", "query"])
    first = model.bert(**tiny.batch()).last_hidden_state[:, 0].detach()
    torch.testing.assert_close(found["bert.pooler.dense"]["covariance"], first.T @ first / 4)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(4, 3)

        def forward(self, x: Tensor, attention_mask: Tensor, take: int) -> Tensor:
            return self.expert(x.reshape(-1, 4)[:take])

    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    x = torch.randn(2, 3, 4)
    inputs = {"x": x, "attention_mask": mask}
    flat = calibrate(Routed(), [{**inputs, "take": 6}], "covariance", target_modules=["expert"])["expert"]
    kept = x[mask.bool()]
    torch.testing.assert_close(flat["covariance"], kept.T @ kept / 4)
    with pytest.raises(ValueError, match=r"'expert'.*cannot be told which of it is padding"):
        calibrate(Routed(), [{**inputs, "take": 5}], "covariance", target_modules=["expert"])
    whole = {**inputs, "attention_mask": torch.ones_like(mask), "take": 5}
    assert calibrate(Routed(), [whole], "covariance", target_modules=["expert"])


class Idle(nn.Module):
    """A model one of whose layers takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_what_cannot_be_found_is_an_error() -> None:
    model, batch = tiny.llama(), labelled()
    with pytest.raises(ValueError, match="no statistics are called hessian; there are covariance, gradient, fisher"):
        calibrate(model, [batch], {"hessian"})
    with pytest.raises(ValueError, match="want names no statistics"):
        calibrate(model, [batch], set())
    with pytest.raises(ValueError, match="float32 or float64"):
        calibrate(model, [batch], "covariance", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no batches"):
        calibrate(model, [], "covariance")
    with pytest.raises(ValueError, match="target module 'nose' matches no layer"):
        calibrate(model, [batch], "covariance", target_modules=["nose", "q_proj"])
    with pytest.raises(ValueError, match=r"'model.embed_tokens' is a Embedding"):
        calibrate(model, [batch], "covariance", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="before get_peft_model"):
        calibrate(get_peft_model(tiny.llama(), LoRA(target_modules=TARGETS)), [batch], "covariance")
    for kind in ("covariance", "gradient"):
        with pytest.raises(ValueError, match="no batch reached idle"):
            calibrate(Idle(), [torch.ones(1, 4)], kind, target_modules=["used", "idle"], loss=lambda m, x: m(x).sum())


def test_what_is_no_loss_or_not_finite_is_an_error() -> None:
    def go(loss: Any, x: Tensor, want: str = "gradient") -> None:
        calibrate(Idle(), [x], want, target_modules=["used"], loss=loss)

    with pytest.raises(ValueError, match="batch 1 must be one number"):
        go(lambda m, x: m(x), torch.ones(1, 4))
    with pytest.raises(ValueError, match="does not depend on the weight"):
        go(lambda m, x: m(x).sum().detach(), torch.ones(1, 4))
    with pytest.raises(ValueError, match="batch 1 is nan"):
        go(lambda m, x: m(x).sum(), torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match="not finite: covariance of 'used'"):
        go(None, torch.full((1, 4), torch.inf), "covariance")
    whole = Idle()
    whole.used.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="'used' is quantised"):
        calibrate(whole, [torch.ones(1, 4)], "fisher", target_modules=["used"])
