"""EWC: the Fisher information by hand, one quadratic for many, runs end to end."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F

from folklora import KaSA, LoRA, learn
from folklora.continual import EWC
from folklora.continual.ewc import empirical_fisher
from folklora.stream.tokens import encode
from folklora.stream.train import TrainSettings, train_task


def moved(method, model, seed=0):
    """The adapted model off its start."""
    adapted = method.start(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapted


def trained(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def by_hand(model, tokenizer, examples, two_sided=False):
    """The Fisher information from log-probabilities picked token by token, in float64 sums."""
    model.eval()
    sums = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in trained(model).items()}
    for example in examples:
        row = {key: torch.tensor([value]) for key, value in encode(tokenizer, example, 48, two_sided).items()}
        logits = model(**row).logits[0].log_softmax(-1)
        answer = [(i, t) for i, t in enumerate(row["labels"][0].tolist()) if t != -100]
        log_p = sum(logits[i if two_sided else i - 1, token] for i, token in answer)
        model.zero_grad()
        log_p.backward()
        for name, value in trained(model).items():
            sums[name] += value.grad.double() ** 2 / len(examples)
    model.zero_grad()
    return sums


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_fisher_is_the_mean_of_each_example_s_squared_gradient(
    tiny_llama, tiny_t5, tiny_tokenizer, stream, two_sided
):
    # dropout must not matter: the Fisher is taken in evaluation mode
    model = moved(EWC(adapter=LoRA(r=2, dropout=0.5)), tiny_t5(0) if two_sided else tiny_llama(1)).train().double()
    examples, calls = stream[1].train[:6], []
    handle = model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    found = empirical_fisher(model, tiny_tokenizer, examples, 48)
    handle.remove()
    assert len(calls) == 2, "one to see what reads the parameters, and one for all examples"
    assert model.training
    expected = by_hand(model, tiny_tokenizer, examples, two_sided)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # logits and gradients are rounded to float32 (6e-8), a hundred times that where parts of a gradient cancel
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-9 * float(value.max()))
    # squaring the mean gradient is the usual mistake
    named = trained(model)
    rows = [{k: torch.tensor([v]) for k, v in encode(tiny_tokenizer, e, 48, two_sided).items()} for e in examples]
    mean = sum(model.eval()(**row).loss for row in rows) / len(rows)
    squares = torch.autograd.grad(mean, list(named.values()))
    assert any(not torch.allclose(found[n].double(), g**2, rtol=0.5) for n, g in zip(named, squares, strict=True))


def test_the_fisher_of_an_adapter_that_has_no_layers_of_ours(tiny_llama, tiny_tokenizer, stream):
    model = EWC(adapter=peft.LoraConfig(r=2, init_lora_weights=False)).start(tiny_llama(1)).double()
    found = empirical_fisher(model, tiny_tokenizer, stream[1].train[:4], 48)
    expected = by_hand(model, tiny_tokenizer, stream[1].train[:4])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-9 * float(value.max()))


def test_penalty_and_gradient_are_zero_at_the_anchor_and_quadratic_beside_it(tiny_llama, tiny_tokenizer, stream):
    method = EWC(adapter=LoRA(r=2), ewc_lambda=10.0)
    model = moved(method, tiny_llama(1))
    method.prepare(model, tiny_tokenizer, stream, 0)
    assert method.penalty(model) is None, "the first task has nothing to keep"
    carried = method.finish(model, tiny_tokenizer, stream, 0)
    method.prepare(model, tiny_tokenizer, stream, 1)
    value = method.penalty(model)
    value.backward()
    assert value.item() == 0
    assert not any(p.grad.any() for p in trained(model).values())
    expected = by_hand(model, tiny_tokenizer, stream[0].train)
    assert len(carried) == 2 * len(expected)
    for parameter in trained(model).values():
        parameter.data += 0.1
    total = sum(float(fisher.sum()) for fisher in expected.values())
    assert method.penalty(model).item() == pytest.approx(10 / 2 * total * 0.1**2, rel=1e-3)


def test_one_quadratic_pulls_as_all_of_them_do():
    draw = torch.Generator().manual_seed(0)
    fishers = torch.rand(4, 50, generator=draw)
    fishers[:, :5], fishers[:3, 5:10] = 0, 0
    anchors, theta = torch.randn(4, 50, generator=draw), torch.randn(50, generator=draw)
    separate, online = EWC(), EWC(online=True, fisher_decay=0.9)
    for fisher, anchor in zip(fishers, anchors, strict=True):
        separate.consolidate("p", fisher, anchor)
        online.consolidate("p", fisher, anchor)
    pull = separate._fisher["p"] * (theta - separate._anchor["p"])
    torch.testing.assert_close(pull, (fishers * (theta - anchors)).sum(0), rtol=1e-5, atol=1e-5)
    weights = torch.tensor([0.9**3, 0.9**2, 0.9, 1.0])
    torch.testing.assert_close(online._fisher["p"], weights @ fishers)
    torch.testing.assert_close(online._anchor["p"], anchors[-1])
    # where all anchors are one, the forms are one
    separate, online = EWC(), EWC(online=True)
    for fisher in fishers:
        separate.consolidate("p", fisher, theta)
        online.consolidate("p", fisher, theta)
    torch.testing.assert_close(separate._fisher["p"], online._fisher["p"])
    torch.testing.assert_close(separate._anchor["p"], online._anchor["p"])


def test_on_quadratic_losses_it_ends_at_the_weighted_mean():
    # the task's own loss is Σ h (θ - c)² / 2; with λ = 1 the minimum is (h c + F θ̄) / (h + F)
    draw = torch.Generator().manual_seed(1)
    h, c, fisher, old = torch.rand(4, 20, generator=draw) + 0.1
    theta = torch.nn.Parameter(torch.zeros(20))
    method = EWC(ewc_lambda=1.0)
    method._held = [(theta, fisher, old)]
    optimizer = torch.optim.LBFGS([theta], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (h * (theta - c).square()).sum() / 2 + method.penalty(None)
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(theta.detach(), (h * c + fisher * old) / (h + fisher), rtol=1e-3, atol=1e-3)


def test_the_fisher_of_a_softmax_is_its_closed_form(tiny_llama, tiny_tokenizer, stream):
    # of the logits' bias, ∂ log p(y) / ∂ b = onehot(y) - p; here for a head bias that the adapter trains
    model = tiny_llama(1)
    model.lm_head = torch.nn.Linear(32, 128)
    method = EWC(adapter=LoRA(r=1, target_modules=["lm_head"], train_bias=True))
    adapted = method.start(model).eval()
    examples = [example for example in stream[0].train if example.completion == " yes"][:4]
    found = empirical_fisher(adapted, tiny_tokenizer, examples, 48)
    expected = torch.zeros(128)
    for example in examples:
        row = {key: torch.tensor([value]) for key, value in encode(tiny_tokenizer, example, 48).items()}
        count = int((row["labels"] != -100).sum())
        p = adapted(input_ids=row["input_ids"]).logits[0, -count - 1 : -1].softmax(-1)
        expected += (F.one_hot(row["labels"][0, -count:], 128) - p).detach().sum(0) ** 2 / 4
    (bias,) = (value for name, value in found.items() if name.endswith("bias_change"))
    torch.testing.assert_close(bias, expected, rtol=1e-4, atol=1e-6)


def test_without_weight_it_is_seq_lora_and_what_is_carried_is_counted(teach):
    plain, none = teach("seq-lora", "seq"), teach("ewc", "none", ewc_lambda=0)
    assert (none["losses"], none["matrix"]) == (plain["losses"], plain["matrix"])
    some = teach("ewc", "some", ewc_lambda=1e4, fisher_examples=8)
    assert some["losses"] != plain["losses"]
    assert some["stored_parameters"] == 3 * some["trainable_parameters"]


def test_a_huge_weight_holds_what_matters(tiny_llama, tiny_tokenizer, stream, tmp_path):
    distance = {}
    for weight in (0.0, 1e7):
        method = EWC(adapter=LoRA(r=2), ewc_lambda=weight)
        model = moved(method, tiny_llama(1))
        method.finish(model, tiny_tokenizer, stream, 0)
        method.prepare(model, tiny_tokenizer, stream, 1)
        settings = TrainSettings(learning_rate=1e-2, epochs=10, batch_size=8, max_length=48, schedule="cosine")
        train_task(model, tiny_tokenizer, method, stream[1].train, settings, seed=0, folder=tmp_path)
        heavy = {name: fisher > 1e-3 for name, fisher in method._fisher.items()}
        assert sum(int(mask.sum()) for mask in heavy.values()) > 50
        moves = [(value - method._anchor[name])[heavy[name]].detach().abs() for name, value in trained(model).items()]
        distance[weight] = torch.cat(moves).mean().item()
    # AdamW's steps have the size of the learning rate whatever the force, so they end near the anchor, not on it
    assert distance[1e7] < distance[0.0] / 20


def test_a_stopped_run_goes_on_to_the_same_results_over_another_adapter(teach, tmp_path):
    method = EWC(adapter=KaSA(r=2, alpha=8.0), fisher_examples=8)
    whole = teach(method, "whole")
    assert teach(method, "stopped", stop_in=1) == whole
    kept = sorted(path.parent.name for path in (tmp_path / "whole").rglob("carried.safetensors"))
    assert kept == ["task-002"], "what is carried is kept once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ewc_lambda": -1.0}, "ewc_lambda must be at least 0"),
        ({"fisher_examples": 0}, "fisher_examples must be at least 1"),
        ({"fisher_decay": 1.5, "online": True}, "between 0 and 1"),
        ({"fisher_decay": 0.9}, "set online=true too"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        EWC(**options)


def test_an_adapter_without_gradients_is_refused_before_any_training(tiny_llama, tiny_tokenizer, stream, tmp_path):
    told, options = [], {"adapter": "factorllm", "max_length": 48}
    given = {"tokenizer": tiny_tokenizer, "out": tmp_path / "run", "options": options}
    with pytest.raises(ValueError, match=r"does not depend on what is trained .* choose another adapter"):
        learn(tiny_llama(2), stream, "ewc", progress=lambda event, **more: told.append(event), **given)
    assert told
    assert "train" not in told
