"""LT-SFT: exactly the K largest changes, nothing else moves, changes add up in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from folklora import LTSFT, LoRA, export_lora, penalty, tiny
from folklora.adapters import lt_sft
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.lt_sft import reopen, select

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    model = tiny.adapted(LTSFT(**{"target_modules": list(TARGETS), "k": 200} | options), dtype=dtype)
    return model.to(dtype)


def steps(model: nn.Module, count: int = 3, **options: Any) -> None:
    """Steps of AdamW on what is trained, with a new optimizer."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, **{"lr": 0.01, "weight_decay": 0.0} | options)
    model.train()
    for _ in range(count):
        tiny.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def sparse(**options: Any) -> PeftModel:
    """A model whose adapter went through both phases."""
    model = adapted(**options)
    steps(model)
    select(model)
    steps(model, weight_decay=0.1)
    return model


def changes(model: PeftModel) -> Tensor:
    """ΔW of all layers, flat, one after another."""
    return torch.cat([tiny.change(layer).detach().flatten() for layer in layers_of(model)])


def chosen(model: PeftModel) -> list[int]:
    """Where the entries that are chosen stand in `changes`."""
    found, before = [], 0
    for layer, update in updates_of(model, "default"):
        found += [] if update.indices is None else (update.indices.long() + before).tolist()
        before += layer.in_features * layer.out_features
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_the_k_largest_changes_of_all_layers_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    # smaller than any layer, so that a layer comes in parts
    monkeypatch.setattr(lt_sft, "_CHUNK", 301)
    model = adapted(k=700)
    steps(model)
    sizes = changes(model).abs().numpy()
    counts = select(model)
    assert sorted(chosen(model)) == sorted(np.argpartition(sizes, -700)[-700:].tolist())
    assert sum(counts.values()) == 700
    assert len(set(counts.values())) > 3, "layers have as many as they earn"


def test_of_equal_changes_exactly_k_are_chosen_the_first_ones() -> None:
    model = adapted(k=500)
    for number, (_, update) in enumerate(updates_of(model, "default")):
        generator = torch.Generator().manual_seed(number)
        update.change.data = torch.randint(-2, 3, update.shape, generator=generator).float()
    sizes = changes(model).abs()
    assert (sizes == 2).sum() > 500
    select(model)
    assert sorted(chosen(model)) == (sizes == 2).nonzero().flatten()[:500].tolist()


def test_everything_returns_to_the_start_when_the_entries_are_chosen() -> None:
    model = adapted(modules_to_save=["lm_head"], train_bias=True)
    base = tiny.llama()
    steps(model)
    assert not torch.allclose(tiny.logits(model), tiny.logits(base))
    select(model)
    assert torch.equal(tiny.logits(model), tiny.logits(base))
    head = base.lm_head.weight.numel()
    assert model.get_nb_trainable_parameters()[0] == 200 + head


def test_other_entries_keep_their_value_to_the_bit() -> None:
    model, base = sparse(), weights(tiny.llama())
    moved = changes(model).nonzero().flatten().tolist()
    assert moved == sorted(chosen(model))
    merged = weights(model.merge_and_unload())
    differing = sum(int((merged[name] != value).sum()) for name, value in base.items())
    # a change below half a unit in the last place is lost in the sum
    assert 190 <= differing <= 200


def test_applied_and_taken_back_the_base_is_as_it_was() -> None:
    model, base = sparse(), tiny.llama()
    for _ in range(2):
        model.merge_adapter()
        model.unmerge_adapter()
    for name, value in tiny.base_parameters(model).items():
        assert torch.equal(value, base.state_dict()[name])
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(base))


def composed(folders: dict[str, Path], order: list[str]) -> PeftModel:
    model = PeftModel.from_pretrained(tiny.llama(), folders[order[0]], adapter_name=order[0])
    for name in order[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    model.base_model.set_adapter(order)
    return model.eval()


def test_changes_that_were_learnt_apart_add_up_in_any_order(tmp_path: Path) -> None:
    folders, total = {}, tiny.llama(dtype=torch.float64)
    # they share targets, and entries
    for name, targets in (("task", TARGETS), ("language", ["v_proj", "up_proj"]), ("domain", ["v_proj"])):
        one = sparse(target_modules=list(targets), k=600)
        one.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
        tiny.with_updates(one, total)
    expected = tiny.logits(total)
    found = [composed(folders, order) for order in (["task", "language", "domain"], ["domain", "language", "task"])]
    one, other = map(tiny.logits, found)
    assert torch.equal(one, other)
    tiny.close(one, expected, 1e-5, "the logits of all three and those of the sum of their changes")
    assert not torch.allclose(one, tiny.logits(composed(folders, ["task"])), atol=1e-3)
    merged = [weights(model.merge_and_unload()) for model in found]
    assert all(torch.equal(merged[1][name], value) for name, value in merged[0].items())
    # merged one after the other, too
    model = composed(folders, ["domain", "language", "task"])
    for name in ("task", "domain", "language"):
        model.merge_adapter([name])
    assert torch.equal(tiny.logits(model), one)


def test_a_change_adds_to_a_lora_with_dropout_and_to_bias_changes() -> None:
    model = sparse(train_bias=True)
    model.add_adapter("other", LoRA(r=3, dropout=0.5, target_modules=["q_proj", "up_proj"]))
    tiny.moved(model, "other")
    layer = next(layers_of(model))
    x = tiny.layer_input(layer)
    base, one, two, both = (tiny.layer_output(layer, n, x) for n in ([], ["default"], ["other"], ["default", "other"]))
    tiny.close(both, one + two - base, 1e-5, "the sum of both")
    layer.train()
    torch.manual_seed(0)
    dropped = tiny.layer_output(layer, ["other"], x)
    torch.manual_seed(0)
    tiny.close(tiny.layer_output(layer, ["default", "other"], x), dropped + one - base, 1e-5, "the sum under dropout")


def test_all_entries_give_full_fine_tuning() -> None:
    total = sum(layer.in_features * layer.out_features for layer in layers_of(adapted()))
    model = adapted(dtype=torch.float64, k=total)
    steps(model)
    full = changes(model)
    select(model)
    model.double()
    steps(model)
    assert torch.equal(changes(model), full)
    plain = tiny.llama(dtype=torch.float64)
    for name, value in plain.named_parameters():
        value.requires_grad_(any(f".{target}." in name for target in TARGETS))
    steps(plain)
    merged = model.merge_and_unload().state_dict()
    for name, value in plain.state_dict().items():
        # Adam divides by the gradient's size, which blows its rounding up where it is near 0
        tiny.close(merged[name], value, 1e-9, f"{name} and that of full fine-tuning")


def test_the_l1_term_has_the_gradient_of_its_formula() -> None:
    model = adapted(l1_full=0.7, l1_sparse=0.3)
    count = sum(p.numel() for p in tiny.llama().parameters())
    for weight in (0.7, 0.3):
        tiny.moved(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        value = sum(float(p.abs().sum()) for p in before.values())
        assert float(penalty(model)) == pytest.approx(weight * value / count, rel=1e-5)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=float(count)).step()
        for name, start in before.items():
            # a step of size lr · l1 / N = l1 against the sign
            tiny.close(model.get_parameter(name), start - weight * start.sign(), 1e-6, f"the step on {name}")
        if weight == 0.7:
            model.zero_grad()
            select(model)


def test_a_second_iteration_goes_on_from_what_the_first_learnt() -> None:
    model = adapted(k=100)
    steps(model)
    select(model, 60)
    steps(model)
    first, learnt, logits = chosen(model), changes(model), tiny.logits(model)
    reopen(model)
    assert torch.equal(tiny.logits(model), logits)
    assert model.get_nb_trainable_parameters()[0] == len(learnt)
    steps(model, lr=0.02)
    moved = (changes(model) - learnt).abs()
    moved[first] = -1
    assert sum(select(model, 40).values()) == 100
    assert torch.equal(tiny.logits(model), logits)
    assert set(chosen(model)) == set(first) | set(np.argpartition(moved.numpy(), -40)[-40:].tolist())
    steps(model)
    assert set(changes(model).nonzero().flatten().tolist()) == set(chosen(model))


@pytest.mark.parametrize("half", ["full", "sparse"])
def test_a_file_holds_indices_values_and_the_head(half: str, tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    steps(model)
    if half == "sparse":
        select(model)
        steps(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert torch.equal(changes(loaded), changes(model))
    heads = [m.base_model.model.lm_head.modules_to_save["default"].weight for m in (model, loaded)]
    assert torch.equal(*heads)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    if half == "sparse":
        indices = [value for key, value in saved.items() if key.endswith(".indices")]
        assert sum(map(len, indices)) == 200
        assert {value.dtype for value in indices} == {torch.int32}
        own = sum(v.numel() for key, v in saved.items() if ".folklora_" in key and not key.endswith("base_sample"))
        assert own == 2 * 200
    else:
        # training goes on where it stopped
        assert sum(select(loaded).values()) == 200


def test_over_bfloat16_the_base_is_rounded_once_and_the_values_stay_float32() -> None:
    model = tiny.adapted(LTSFT(k=200, target_modules=list(TARGETS)), dtype=torch.bfloat16)
    steps(model)
    select(model)
    steps(model)
    layer, update = next(pair for pair in updates_of(model, "default") if pair[1].values is not None)
    assert update.values.dtype == torch.float32
    base = layer.get_base_layer().weight
    x = tiny.layer_input(layer).bfloat16()
    expected = (base.double() + tiny.change(layer)).to(torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, expected))


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lt-sft changes the weight itself, which has no input to drop: set dropout=0"):
        LTSFT(dropout=0.1)
    with pytest.raises(ValueError, match="density must be above 0 and at most 1, not 0"):
        LTSFT(density=0)
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        LTSFT(k=0)
    with pytest.raises(ValueError, match="l1_full and l1_sparse must be at least 0"):
        LTSFT(l1_full=-1.0)
    model = adapted(k=10**6)
    total = len(changes(model))
    with pytest.raises(ValueError, match=rf"k=1000000 is above {total}, the number of entries that the targets have"):
        select(model)
    with pytest.raises(ValueError, match=rf"cannot choose {total + 1} entries: {total} of {total} are left"):
        select(model, total + 1)
    with pytest.raises(ValueError, match=r"is in its full phase; select\(\) ends it"):
        reopen(model)
    select(model, 5)
    with pytest.raises(ValueError, match=r"is in its sparse phase; reopen\(\) begins another full one"):
        select(model, 5)
    with pytest.raises(ValueError, match="no LT-SFT adapter named 'other'"):
        select(model, 5, "other")
    with pytest.raises(ValueError, match="has no LoRA form of low rank: it changes weights entry by entry"):
        export_lora(model, tmp_path / "lora")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged: call unmerge_adapter\(\)"):
        reopen(model)
    with pytest.raises(ValueError, match="LTSFT has no option 'r'"):
        get_peft_model(tiny.llama(), LTSFT(r=3))
