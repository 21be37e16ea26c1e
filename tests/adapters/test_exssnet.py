"""ExSSNeT: masks by the formula, the straight-through gradient, and earlier tasks that stay as they were to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import ExSSNeT, tiny
from folklora.adapters.exssnet import ExSSNeTUpdate, choose_task, fix_mask, largest, next_task
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.sparse import unpacked

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    model = tiny.adapted(ExSSNeT(**{"target_modules": list(TARGETS), "density": 0.3} | options), dtype=dtype)
    return model.to(dtype)


def steps(model: nn.Module, count: int = 3, seed: int = 0, **options: Any) -> None:
    """Steps of AdamW on what is trained, with a new optimizer, towards other answers for each seed."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, **{"lr": 0.02, "weight_decay": 0.0} | options)
    answers = torch.randint(tiny.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(seed))
    model.train()
    for _ in range(count):
        model(**tiny.batch(), labels=answers).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def learn_task(model: PeftModel, index: int) -> None:
    if index:
        torch.manual_seed(index)
        next_task(model)
    steps(model, seed=index, lr=0.1)
    fix_mask(model)
    # momentum and weight decay may not move another entry either
    steps(model, seed=index, weight_decay=0.1)


def masks(update: ExSSNeTUpdate) -> list[Tensor]:
    return [unpacked(bits, update.shape) for bits in update.masks]


def own(update: ExSSNeTUpdate, task: int) -> Tensor:
    """E_i."""
    found = torch.zeros(update.shape, dtype=torch.bool).flatten()
    found[update.indices[task].long()] = True
    return found.view(update.shape)


def effective(layer: nn.Module) -> Tensor:
    """The weight that the layer computes with: its output for a unit matrix."""
    columns = layer.in_features
    with torch.no_grad():
        return layer(torch.eye(columns)).T.contiguous()


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(7, 13), (32, 20), (1, 5)])
def test_a_mask_has_the_largest_scores_and_as_many_as_the_formula_says(shape: tuple[int, int], density: float) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    mask, count = largest(scores.abs(), density), scores.numel()
    assert int(mask.sum()) == count - int((1 - density) * count)
    if 0 < int(mask.sum()) < count:
        assert scores.abs()[mask].min() > scores.abs()[~mask].max()


def test_of_equal_scores_the_last_are_taken() -> None:
    mask = largest(torch.ones(4, 5), 0.25)
    assert mask.flatten().nonzero().flatten().tolist() == [15, 16, 17, 18, 19]


def test_the_gradient_passes_the_mask_straight_through() -> None:
    model = adapted(dtype=torch.float64)
    layer, update = next(updates_of(model, "default"))
    weight = layer.get_base_layer().weight.detach()
    x = tiny.layer_input(layer).double()
    layer(x).square().sum().backward()
    # the same layer by hand, with the mask as a leaf
    mask = largest(update.scores.detach().abs(), 0.3).double().requires_grad_()
    nn.functional.linear(x, weight * mask).square().sum().backward()
    tiny.close(update.scores.grad, mask.grad * update.scores.detach().sign(), 1e-12, "the scores' gradient")
    assert (update.scores.grad[mask == 0] != 0).any(), "what is masked is told too"


def test_masks_alone_are_supermasks_of_the_base() -> None:
    model = adapted(dtype=torch.float64)
    start = {layer.name: update.scores.detach().clone() for layer, update in updates_of(model, "default")}
    steps(model)
    # SupSup by hand, on the plain model
    plain = tiny.llama(dtype=torch.float64)
    layers = {name: plain.get_submodule(name) for name in start}
    originals = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    scores = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = torch.optim.AdamW(scores.values(), lr=0.02, weight_decay=0.0)
    answers = torch.randint(tiny.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for name, layer in layers.items():
            count = scores[name].numel()
            order = scores[name].detach().abs().flatten().argsort(stable=True)
            mask = torch.ones(count, dtype=torch.float64)
            mask[order[: int(0.7 * count)]] = 0
            layer.weight = nn.Parameter(originals[name] * mask.view_as(layer.weight))
        plain.zero_grad()
        plain(**tiny.batch(), labels=answers).loss.backward()
        for name, layer in layers.items():
            scores[name].grad = layer.weight.grad * originals[name] * scores[name].detach().sign()
        optimizer.step()
    for layer, update in updates_of(model, "default"):
        tiny.close(update.scores, scores[layer.name], 1e-9, f"the scores of {layer.name} and SupSup's")
    fix_mask(model)
    for layer, update in updates_of(model, "default"):
        assert torch.equal(tiny.change(layer).detach() == 0, masks(update)[0]), "D is 0 before weights are trained"


def test_what_earlier_tasks_compute_stays_to_the_bit() -> None:
    model, known, seen, kept = adapted(), [], [], []
    for index in range(3):
        learn_task(model, index)
        for task, (logits, weights) in enumerate(zip(seen, kept, strict=True)):
            choose_task(model, task)
            assert torch.equal(tiny.logits(model), logits)
            assert all(torch.equal(effective(layer), w) for layer, w in zip(layers_of(model), weights, strict=True))
        choose_task(model, index)
        seen.append(tiny.logits(model))
        kept.append([effective(layer) for layer in layers_of(model)])
        known.append({layer.name: own(update, index) for layer, update in updates_of(model, "default")})
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    for layer, update in updates_of(model, "default"):
        taken = torch.zeros(update.shape, dtype=torch.bool)
        for index, mask in enumerate(masks(update)):
            mine = known[index][layer.name]
            assert torch.equal(mine, mask & ~taken), "what no earlier mask has"
            assert torch.equal(own(update, index), mine)
            taken |= mask
        assert torch.equal(torch.stack([own(update, i) for i in range(3)]).sum(0), taken.long()), "a partition"
        # (W + D) ⊙ M of the last task by hand
        W, D = layer.get_base_layer().weight.detach(), torch.zeros(update.shape).flatten()
        for indices, values in zip(update.indices, update.values, strict=True):
            assert values.detach().abs().max() > 1e-3
            D[indices.long()] = values.detach()
        tiny.close(
            kept[-1][0] if layer is next(layers_of(model)) else effective(layer), (W + D.view_as(W)) * mask, 1e-6, "W"
        )
    assert all(len(counts) == 3 for counts in model.peft_config["default"].counts.values())


def test_training_reaches_the_newest_task_alone() -> None:
    model = adapted()
    learn_task(model, 0)
    found, _ = model.get_nb_trainable_parameters()
    assert found == sum(counts[0] for counts in model.peft_config["default"].counts.values())
    next_task(model)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"scores"}
    fix_mask(model)
    trained = {
        name.partition(".folklora_updates.default.")[2] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"values.1"}
    steps(model)
    for _, update in updates_of(model, "default"):
        free = own(update, 1)
        assert torch.equal(free, masks(update)[1] & ~masks(update)[0])
        assert 0 < int(free.sum()) < int(masks(update)[1].sum()), "the second mask meets the first"


def test_scores_to_start_from_are_copied() -> None:
    model = adapted()
    learn_task(model, 0)
    scores = {layer.name: torch.randn(update.shape) for layer, update in updates_of(model, "default")}
    before = {name: value.clone() for name, value in scores.items()}
    next_task(model, scores)
    for layer, update in updates_of(model, "default"):
        assert torch.equal(update.scores, scores[layer.name])
    steps(model)
    assert all(torch.equal(scores[name], value) for name, value in before.items())


def test_a_mask_of_everything_is_ordinary_training() -> None:
    model, plain = adapted(dtype=torch.float64, density=1.0), tiny.llama(dtype=torch.float64)
    assert all(update.starts_at_base for _, update in updates_of(model, "default"))
    fix_mask(model)
    model.double()
    for name, value in plain.named_parameters():
        value.requires_grad_(any(f".{target}." in name for target in TARGETS))
    for one in (model, plain):
        steps(one)
    for layer in layers_of(model):
        expected = plain.get_submodule(layer.name).weight
        tiny.close(layer.get_base_layer().weight + tiny.change(layer), expected, 1e-9, layer.name)


@pytest.mark.parametrize("searching", [False, True])
def test_a_file_holds_all_tasks(searching: bool, tmp_path: Path) -> None:
    model = adapted()
    for index in range(2):
        learn_task(model, index)
    if searching:
        next_task(model)
        steps(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model)), "the newest task is chosen"
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    for task in range(2):
        choose_task(model, task)
        choose_task(loaded, task)
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    merged = loaded.merge_and_unload()
    tiny.close(tiny.logits(merged), tiny.logits(model), 1e-5, "the logits of one task's merged model")


def test_a_task_may_have_nothing_left_to_train() -> None:
    model = adapted(density=1.0)
    fix_mask(model)
    steps(model)
    logits = tiny.logits(model)
    next_task(model)
    assert set(fix_mask(model).values()) == {0}
    steps(model)
    assert torch.equal(tiny.logits(model), logits)


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"density must be above 0 and at most 1, not 1\.5"):
        ExSSNeT(density=1.5)
    with pytest.raises(ValueError, match="exssnet changes the weight itself, which has no input to drop"):
        ExSSNeT(dropout=0.1)
    with pytest.raises(ValueError, match="which modules_to_save and train_bias would change: leave it out"):
        ExSSNeT(modules_to_save=["lm_head"], train_bias=True)
    model = adapted()
    with pytest.raises(ValueError, match=r"still searches for a mask; fix_mask\(\) ends that"):
        next_task(model)
    with pytest.raises(ValueError, match="the adapter has 1 tasks, from 0; there is no task 1"):
        choose_task(model, 1)
    fix_mask(model)
    with pytest.raises(ValueError, match=r"searches for no mask; next_task\(\) begins a search"):
        fix_mask(model)
    with pytest.raises(ValueError, match="no ExSSNeT adapter named 'other'"):
        fix_mask(model, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged: call unmerge_adapter\(\)"):
        choose_task(model, 0)
    with pytest.raises(ValueError, match="ExSSNeT has no option 'r'"):
        get_peft_model(tiny.llama(), ExSSNeT(r=3))
