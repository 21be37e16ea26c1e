"""MixDA: the mixture is its formula, its losses are theirs, and domains are trained, kept and mixed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from folklora import LoRA, MixDA, tiny
from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.knowledge import domain_loss, knowledge_loss, sample_loss
from folklora.adapters.mixda import MixDAUpdate

VOCABULARY, WIDTH, UNITS, INNER, HIDDEN = 31, 16, 32, 8, 6
OPTIONS = {"reduction": UNITS // INNER, "gate_hidden": HIDDEN, "gate_dropout": 0.0}
# sums of some fifty products in float64
EXACT = 1e-12


def bert(dropout: float = 0.0) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=UNITS,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return BertForMaskedLM(config).eval()


def adapted(dtype: torch.dtype = torch.float64, base: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model((bert() if base is None else base).to(dtype), MixDA(**{**OPTIONS, **options})).to(dtype)
    return tiny.moved(model).eval()


def the_layer(model: nn.Module, number: int = 0) -> tuple[FolkloraLayer, MixDAUpdate]:
    return list(updates_of(model, "default"))[number]


def batch(rows: int = 3, positions: int = 7, seed: int = 2) -> dict[str, Tensor]:
    tokens = torch.randint(5, VOCABULARY, (rows, positions), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def labelled(**options: Any) -> dict[str, Tensor]:
    inputs = batch(**options)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, positions in enumerate(([1, 4, 5], [2], [])):
        labels[row, positions] = inputs["input_ids"][row, positions]
        inputs["input_ids"][row, positions] = 4
    return {**inputs, "labels": labels}


def open_for_the_layer_alone(model: PeftModel) -> None:
    with torch.no_grad():
        for _, update in updates_of(model, "default"):
            update.gate[-1].bias[-1] = 1e5


def adapter_output(adapter: nn.Module, u: Tensor) -> Tensor:
    inner = u @ adapter.down.weight.T + adapter.down.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    return inner @ adapter.up.weight.T + adapter.up.bias


def by_the_formula(model: PeftModel, u: Tensor, mask: Tensor | None) -> Tensor:
    """Row by row, position by position."""
    layer, update = the_layer(model)
    v, rows = layer.base_layer(u), []
    for row in range(len(u)):
        real = range(u.shape[1]) if mask is None else mask[row].nonzero().flatten().tolist()
        read = {"last": u[row, list(real)[-1]], "mean": u[row, list(real)].mean(0)}
        tokens = []
        for position in range(u.shape[1]):
            z = read.get(update.config.gate_reads, u[row, position])
            for number, linear in enumerate(update.gate):
                z = linear.weight @ (z.clamp(min=0) if number else z) + linear.bias
            g = z.exp() / z.exp().sum() if update.config.gate == "softmax" else 1 / (1 + (-z).exp())
            branches = [adapter_output(adapter, u[row, position]) for adapter in update.adapters]
            tokens.append(sum(weight * branch for weight, branch in zip(g, [*branches, v[row, position]], strict=True)))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("gate_reads", ["last", "mean", "token"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_mixture_is_its_formula(gate: str, gate_reads: str, masked: bool) -> None:
    model = adapted(gate=gate, gate_reads=gate_reads)
    layer, _ = the_layer(model)
    u = torch.randn(3, 7, UNITS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    layer.context.masks = (batch()["attention_mask"],) if masked else ()
    expected = by_the_formula(model, u, batch()["attention_mask"] if masked else None)
    torch.testing.assert_close(layer(u), expected, rtol=0, atol=EXACT)


def test_a_gate_that_is_open_for_the_layer_alone_leaves_the_base_bit_for_bit() -> None:
    model = adapted(torch.float32)
    open_for_the_layer_alone(model)
    assert torch.equal(model(**batch()).logits, bert()(**batch()).logits)
    assert float(sample_loss(model, batch())) == 0


def test_the_start_is_a_scaled_base() -> None:
    torch.manual_seed(1)
    model = get_peft_model(bert().double(), MixDA(**OPTIONS)).double().eval()
    layer, update = the_layer(model)
    u = torch.randn(3, 7, UNITS, dtype=torch.float64)
    own = update.weights(u)[..., -1:]
    torch.testing.assert_close(layer(u) / own, layer.base_layer(u), rtol=0, atol=EXACT)
    assert 0.3 < float(own.detach().min()) < float(own.detach().max()) < 0.7
    torch.manual_seed(1)
    biased = get_peft_model(bert(), MixDA(**OPTIONS, gate_bias=4.0)).eval()
    assert float(the_layer(biased)[1].weights(u.float())[..., -1].min()) > 0.95


def test_one_weight_a_branch_for_a_whole_row() -> None:
    u, mask = torch.randn(3, 7, UNITS), batch()["attention_mask"]
    g = the_layer(adapted(torch.float32))[1].weights(u, mask)
    assert g.shape == (3, 1, 2)
    torch.testing.assert_close(g.sum(-1), torch.ones(3, 1))
    assert the_layer(adapted(torch.float32, gate_reads="token"))[1].weights(u).shape == (3, 7, 2)


@pytest.mark.parametrize("gate_reads", ["last", "mean"])
def test_more_padding_changes_nothing(gate_reads: str) -> None:
    model, inputs = adapted(gate_reads=gate_reads), batch()
    padded = {key: F.pad(value, (0, 4)) for key, value in inputs.items()}
    found = model(**padded).logits[:, :7]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], model(**inputs).logits[real], rtol=0, atol=1e-11)


@pytest.mark.parametrize("layers", [None, [1]])
def test_what_is_trained(layers: list[int] | None) -> None:
    model = adapted(layers_to_transform=layers)
    chosen = [0, 1] if layers is None else layers
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert len(names) == len(chosen) * (4 + 2 * 4)
    for number in chosen:
        prefix = f"base_model.model.bert.encoder.layer.{number}.output.dense.folklora_updates.default."
        assert {name for name in names if name.startswith((prefix + "adapters.", prefix + "gate."))}
    adapter = UNITS * INNER + INNER + INNER * WIDTH + WIDTH
    gate = (UNITS + 1) * HIDDEN + 2 * (HIDDEN + 1) * HIDDEN + (HIDDEN + 1) * 2
    assert model.get_nb_trainable_parameters()[0] == len(chosen) * (adapter + gate)


def test_second_matrices_are_found_outside_attention() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    model = get_peft_model(gpt2, MixDA(**OPTIONS))
    assert [layer.name for layer, _ in updates_of(model, "default")] == [
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.mlp.c_proj",
    ]
    with pytest.raises(ValueError, match=r"no layer of TwoLayers that is chosen ends in one of output.dense"):
        get_peft_model(tiny.TwoLayers(), MixDA())
    with pytest.raises(ValueError, match="reduction 64 is above 32, the inputs of layer"):
        adapted(reduction=64)


def test_the_knowledge_loss_counts_labelled_words_by_row() -> None:
    model, inputs = adapted(), labelled()
    found = knowledge_loss(model, inputs)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    rows = []
    for row in range(2):
        own = [-logits[row, t, y] for t, y in enumerate(inputs["labels"][row].tolist()) if y != -100]
        rows.append(sum(own) / len(own))
    # the logits are computed in float32 by the loss; the third row has no labels
    torch.testing.assert_close(found.double(), sum(rows) / 2, rtol=0, atol=1e-5)
    causal = tiny.adapted(MixDA(**OPTIONS, gate_reads="token", target_modules=["down_proj"])).eval()
    whole = {**tiny.batch(), "labels": tiny.batch()["input_ids"]}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    torch.testing.assert_close(knowledge_loss(causal, whole), causal(**whole).loss)


def test_the_sample_loss_is_that_of_the_layers_outputs() -> None:
    model, inputs = adapted(), batch()
    expected = []

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        u, residual = args
        kept = module.LayerNorm(module.dense.base_layer(u) + residual)
        real = inputs["attention_mask"].bool()
        expected.append((output - kept)[real].square().mean())

    found = sample_loss(model, {**inputs, "labels": inputs["input_ids"]})
    handles = [block.output.register_forward_hook(note) for block in model.get_base_model().bert.encoder.layer]
    model(**inputs)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, sum(expected) / 2, rtol=0, atol=EXACT)
    assert not any(module._forward_hooks for module in model.modules() if type(module).__name__.startswith("BertLayer"))


def test_the_adapter_may_imitate_the_layer() -> None:
    model, inputs = adapted(sample_target="adapter"), batch()
    expected, real = [], inputs["attention_mask"].bool()
    for layer, update in updates_of(model, "default"):
        layer.register_forward_hook(
            lambda module, args, output, update=update: expected.append(
                (adapter_output(update.adapters[0], args[0]) - module.base_layer(args[0]))[real].square().mean()
            )
        )
    model(**inputs)
    torch.testing.assert_close(sample_loss(model, inputs), sum(expected[:2]) / 2, rtol=0, atol=EXACT)


def test_the_frozen_models_dropout_rests() -> None:
    model = adapted(base=bert(dropout=0.5)).train()
    inputs = labelled()
    first, second = (domain_loss(model, inputs, batch()) for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())
    first.backward()
    assert all((value.grad is not None) == value.requires_grad for value in model.parameters())
    dropping = adapted(base=bert(), gate_dropout=0.5).train()
    assert not torch.equal(*(domain_loss(dropping, inputs, batch()) for _ in range(2)))


def test_the_loss_is_the_weighted_sum() -> None:
    model, inputs = adapted(knowledge_weight=0.3), labelled()
    expected = 0.3 * knowledge_loss(model, inputs) + sample_loss(model, batch())
    torch.testing.assert_close(domain_loss(model, inputs, batch()), expected, rtol=0, atol=EXACT)
    with pytest.raises(ValueError, match="no MixDA adapter named 'default'"):
        sample_loss(get_peft_model(bert(), LoRA(r=2, target_modules=["query"])), batch())


def domains(folder: Path, **options: Any) -> dict[str, str]:
    """Two adapters of the first stage, saved."""
    for seed, name in enumerate(("law", "medicine")):
        model = adapted(torch.float32, **options)
        torch.manual_seed(10 + seed)
        for _, update in updates_of(model, "default"):
            for value in update.adapters.parameters():
                nn.init.normal_(value, std=0.1)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("law", "medicine")}


def test_domains_are_mixed_frozen_and_saved_with_the_new_gate(tmp_path: Path) -> None:
    folders = domains(tmp_path)
    model = get_peft_model(bert(), MixDA(domains=folders, **{**OPTIONS, "reduction": 2}))
    law = PeftModel.from_pretrained(bert(), folders["law"])
    for (_, update), (_, own) in zip(updates_of(model, "default"), updates_of(law, "default"), strict=True):
        assert len(update.adapters) == 2
        for key, value in own.adapters[0].state_dict().items():
            assert torch.equal(update.adapters[0].state_dict()[key], value)
        assert not torch.equal(update.adapters[0].up.weight, update.adapters[1].up.weight)
    model.add_adapter("task", LoRA(r=2, target_modules=["query"]))
    model.base_model.set_adapter(["default", "task"])
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    inputs = labelled()
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {part for name in moved for part in (".gate.", ".task.") if part in name} == {".gate.", ".task."}
    assert all(".gate." in name or ".task." in name for name in moved)
    model.eval().save_pretrained(tmp_path / "mixed")
    for folder in folders.values():
        shutil.rmtree(folder)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "mixed")
    loaded.load_adapter(tmp_path / "mixed" / "task", "task")
    loaded.base_model.set_adapter(["default", "task"])
    assert torch.equal(loaded.eval()(**batch()).logits, model(**batch()).logits)
    assert the_layer(loaded)[1].frozen_parameters() == the_layer(model)[1].frozen_parameters() != frozenset()


def test_equal_adapters_count_as_one_of_their_weights_together(tmp_path: Path) -> None:
    folders = domains(tmp_path)
    model = get_peft_model(bert(), MixDA(domains={"a": folders["law"], "b": folders["law"]}, **OPTIONS)).double()
    layer, update = the_layer(model.eval())
    u = torch.randn(3, 7, UNITS, dtype=torch.float64)
    g = update.weights(u)
    assert g.shape == (3, 1, 3)
    expected = g[..., :2].sum(-1, keepdim=True) * adapter_output(update.adapters[0], u) + g[..., 2:] * layer.base_layer(
        u
    )
    torch.testing.assert_close(layer(u), expected, rtol=0, atol=EXACT)


def test_domains_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folders = domains(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the folder of domain 'art', .*, holds no adapter"):
        get_peft_model(bert(), MixDA(domains={"art": str(tmp_path / "art")}))
    mixed = get_peft_model(bert(), MixDA(domains=folders, **OPTIONS))
    mixed.save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="holds no MixDA adapter of its first stage"):
        get_peft_model(bert(), MixDA(domains={"both": str(tmp_path / "mixed")}))
    narrow = domains(tmp_path / "narrow", reduction=8)
    with pytest.raises(ValueError, match=r"the domains' adapters differ in reduction, .*: law: 4; medicine: 8"):
        get_peft_model(bert(), MixDA(domains={"law": folders["law"], "medicine": narrow["medicine"]}))
    other = bert()
    nn.init.normal_(other.bert.encoder.layer[0].output.dense.weight)
    with pytest.raises(ValueError, match="the adapter of domain 'law' was made for another base model"):
        get_peft_model(other, MixDA(domains=folders))
    assert not list(updates_of(other, "default"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "hard"}, "gate must be one of softmax, sigmoid"),
        ({"gate_reads": "first"}, "gate_reads must be one of last, mean, token"),
        ({"reduction": 0}, "reduction must be at least 1"),
        ({"gate_dropout": 1.0}, "gate_dropout must be at least 0 and below 1"),
        ({"dropout": 0.1}, "takes no dropout"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixDA(**options)
