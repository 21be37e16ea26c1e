"""O-LoRA: the orthogonality by its double sum, where its gradient goes, IncLoRA without it, runs end to end."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig

from folklora import KaSA, LoRA, LoRAXS
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.continual import OLoRA
from folklora.stream.train import TrainSettings, train_task


def after_tasks(method, model, count, tokenizer=None):
    """The model made ready for task number `count` - 1, every B of the earlier ones drawn at random."""
    adapted = method.start(model)
    for index in range(count):
        method.prepare(adapted, tokenizer, [], index)
        generator = torch.Generator().manual_seed(index)
        if index < count - 1:
            for _, update in updates_of(adapted, f"task_{index}"):
                update.B.data.normal_(generator=generator)
    return adapted


def brute_force(model, count, measure):
    total = 0.0
    for layer in layers_of(model):
        new = layer.folklora_updates[f"task_{count - 1}"].A.double().detach()
        for i in range(count - 1):
            for a, b in itertools.product(layer.folklora_updates[f"task_{i}"].A.double().detach(), new):
                total += measure(a, b)
    return total


@pytest.mark.parametrize(
    ("norm", "measure"),
    [
        ("l1", lambda a, b: abs(float(a @ b))),
        ("l2", lambda a, b: float(a @ b) ** 2),
        ("cosine", lambda a, b: abs(float(a @ b / (a.norm() * b.norm())))),
    ],
)
def test_the_penalty_is_the_sum_over_all_pairs_of_rows(tiny_llama, norm, measure):
    method = OLoRA(adapter=LoRA(r=3), lambda_1=0.7, ortho_norm=norm)
    model = after_tasks(method, tiny_llama(), 3)
    expected = 0.7 * brute_force(model, 3, measure)
    assert expected > 0.1
    # four sums of 18 products of 32 float32 numbers
    assert method.penalty(model).item() == pytest.approx(expected, rel=1e-5)


def test_the_penalty_is_zero_just_where_rows_are_orthogonal_and_at_the_first_task(tiny_llama):
    method = OLoRA(adapter=LoRA(r=2))
    model = after_tasks(method, tiny_llama(), 1)
    assert method.penalty(model) is None
    method.prepare(model, None, [], 1)
    for layer in layers_of(model):
        basis = torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)))[0].T
        layer.folklora_updates["task_0"].A.data = basis[:2].clone()
        layer.folklora_updates["task_1"].A.data = basis[2:].clone()
    method.prepare(model, None, [], 1)
    assert method.penalty(model).item() < 1e-4
    next(layers_of(model)).folklora_updates["task_1"].A.data += 0.5 * basis[0]
    # each of its two rows has 0.5 of one old row
    assert method.penalty(model).item() == pytest.approx(0.5 * 2 * 0.5, rel=1e-3)


def test_its_gradient_reaches_the_new_rows_alone(tiny_llama):
    method = OLoRA(adapter=LoRA(r=2))
    model = after_tasks(method, tiny_llama(), 2)
    method.penalty(model).backward()
    reached = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert reached == {name for name, _ in model.named_parameters() if name.endswith("task_1.A")}


def test_lambda_2_adds_the_norm_of_every_new_tensor(tiny_llama):
    method = OLoRA(adapter=LoRA(r=2), lambda_1=0.0, lambda_2=0.3)
    model = after_tasks(method, tiny_llama(), 2)
    new = [value for name, value in model.named_parameters() if name.endswith(("task_1.A", "task_1.B"))]
    value = method.penalty(model)
    assert value.item() == pytest.approx(0.3 * sum(p.detach().double().norm().item() for p in new), rel=1e-5)
    value.backward()
    assert all(p.grad.isfinite().all() for p in new), "B starts at 0, where a norm has a corner"


def test_a_task_begins_with_the_function_before_and_merges_to_what_it_computes(tiny_llama):
    method = OLoRA(adapter=LoRA(r=2))
    model = after_tasks(method, tiny_llama(), 2).eval()
    ids = torch.arange(12).view(2, 6)
    both = model(ids).logits
    model.base_model.set_adapter(["task_0"])
    torch.testing.assert_close(model(ids).logits, both, rtol=1e-6, atol=1e-6)
    for _, update in updates_of(model, "task_1"):
        update.B.data.normal_(generator=torch.Generator().manual_seed(5))
    model.base_model.set_adapter(["task_0", "task_1"])
    both = model(ids).logits
    merged = model.merge_and_unload(adapter_names=["task_0", "task_1"])
    assert not torch.allclose(both, tiny_llama()(ids).logits, atol=1e-2)
    torch.testing.assert_close(merged(ids).logits, both, rtol=1e-4, atol=1e-4)


def test_without_its_weights_it_is_inc_lora(teach):
    plain, ours = teach("inc-lora", "inc"), teach("o-lora", "o", lambda_1=0, lambda_2=0)
    assert (ours["losses"], ours["matrix"]) == (plain["losses"], plain["matrix"])
    assert ours["stored_parameters"] == 2 * ours["trainable_parameters"]
    assert teach("o-lora", "more", lambda_1=0.5)["losses"] != plain["losses"]


def test_a_large_weight_turns_the_new_rows_away(tiny_llama, tiny_tokenizer, stream, tmp_path):
    largest = {}
    for weight in (0.0, 10.0):
        method = OLoRA(adapter=LoRA(r=2), lambda_1=weight, ortho_norm="l2")
        torch.manual_seed(0)
        model = after_tasks(method, tiny_llama(1), 2)
        settings = TrainSettings(learning_rate=0.01, epochs=12, batch_size=8, max_length=48, schedule="linear")
        train_task(model, tiny_tokenizer, method, stream[1].train, settings, seed=0, folder=tmp_path)
        pairs = [layer.folklora_updates for layer in layers_of(model)]
        largest[weight] = max((pair["task_0"].A @ pair["task_1"].A.T).abs().max().item() for pair in pairs)
    assert largest[10.0] < largest[0.0] / 10


def test_micro_batches_do_not_change_its_weight(teach):
    # two epochs of three steps: the first shown loss of each task is of the whole first step
    whole, split = (teach("o-lora", str(n), accumulation=n, lambda_2=0.1) for n in (1, 4))
    assert [p["loss"] for p in split["losses"]] == pytest.approx([p["loss"] for p in whole["losses"]], rel=2e-3)


def test_an_adapter_without_rows_to_train_is_refused_before_training(teach, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="'lora-xs' has no such A; choose an adapter that trains one"):
        teach(OLoRA(adapter=LoRAXS(r=2)), "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="'LoraConfig' has no such A"):
        OLoRA(adapter=LoraConfig(r=2)).start(tiny_llama())


def test_options_are_checked():
    with pytest.raises(ValueError, match="at least 0, not -1 and 0"):
        OLoRA(lambda_1=-1)
    with pytest.raises(ValueError, match="ortho_norm must be l1, l2, cosine, not 'max'"):
        OLoRA(ortho_norm="max")


def test_a_stopped_run_goes_on_to_the_same_results_over_another_adapter(teach):
    method = OLoRA(adapter=KaSA(r=2, alpha=8.0), lambda_1=0.1)
    assert teach(method, "stopped", stop_in=1) == teach(method, "whole")
