"""L2P: what its loss adds, how it counts choices, runs end to end. What is chosen is tested with the pool."""

from __future__ import annotations

import pytest
import torch

from folklora import LoRA, learn
from folklora.continual import L2P
from folklora.prompts import PromptPool, SoftPrompt, prompts_of
from folklora.stream.explain import explain
from folklora.stream.train import TrainSettings, train_task

SIZES = {"pool_size": 5, "top_k": 2, "prompt_length": 3}
OPTIONS = {"r": None, "dropout": None, **SIZES, "learning_rate": 0.1}
COUNT = 5 * (3 * 32 + 32)


def started(method, model, tokenizer, stream, index=0):
    torch.manual_seed(0)
    adapted = method.start(model)
    method.prepare(adapted, tokenizer, stream, index)
    return adapted


def test_the_penalty_is_the_mean_similarity_to_the_chosen_keys(tiny_llama, tiny_tokenizer, stream):
    method = L2P(PromptPool(**SIZES), pull_weight=0.7)
    model = started(method, tiny_llama(1), tiny_tokenizer, stream).train()
    ids = torch.randint(2, 128, (4, 7), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :5] = -100
    model(input_ids=ids, labels=labels)
    states = tiny_llama(1).model(ids[:, :5]).last_hidden_state.mean(1)
    pool = prompts_of(model)["default"]
    cosine = torch.nn.functional.cosine_similarity(states[:, None], pool.keys, dim=-1)
    value = method.penalty(model)
    assert value.item() == pytest.approx(-0.7 * cosine.topk(2, dim=1).values.sum(1).mean().item(), abs=1e-5)
    assert abs(value.item()) <= 0.7 * 2
    value.backward()
    assert pool.keys.grad.any(dim=1).sum() >= 2
    assert method.penalty(model) is None
    assert method.finish(model, tiny_tokenizer, stream, 0) == {}


def test_the_pull_brings_chosen_keys_to_the_inputs(tiny_llama, tiny_tokenizer, stream, tmp_path):
    similarity = {}
    for weight in (0.0, 1.0):
        method = L2P(PromptPool(**SIZES), pull_weight=weight)
        model = started(method, tiny_llama(1), tiny_tokenizer, stream)
        pool = prompts_of(model)["default"]
        keys = pool.keys.detach().clone()
        settings = TrainSettings(learning_rate=0.1, epochs=2, batch_size=8, max_length=48)
        train_task(model, tiny_tokenizer, method, stream[0].train, settings, seed=0, folder=tmp_path)
        assert torch.equal(pool.keys, keys) == (weight == 0)
        asked = tiny_tokenizer([example.prompt for example in stream[0].test])["input_ids"]
        with torch.no_grad():
            query = torch.stack([tiny_llama(1).model(torch.tensor([ids]))[0][0].mean(0) for ids in asked])
        found = torch.nn.functional.cosine_similarity(query[:, None], pool.keys.detach(), dim=-1)
        similarity[weight] = found.topk(2, dim=1).values.mean().item()
    assert similarity[1.0] > similarity[0.0] + 0.1
    fresh = tiny_llama(1).state_dict()
    assert all(torch.equal(model.get_base_model().state_dict()[name], value) for name, value in fresh.items())


def test_later_tasks_take_other_keys_where_it_diversifies(tiny_llama, tiny_tokenizer, stream, tmp_path):
    method = L2P(PromptPool(**SIZES), diversify=True)
    model = started(method, tiny_llama(1), tiny_tokenizer, stream)
    pool = prompts_of(model)["default"]
    assert pool.frequency is None
    settings = TrainSettings(learning_rate=0.1, epochs=2, batch_size=8, max_length=48)
    train_task(model, tiny_tokenizer, method, stream[0].train, settings, seed=0, folder=tmp_path)
    carried = method.finish(model, tiny_tokenizer, stream, 0)
    assert carried["chosen"].sum() == 2 * 24 * 2, "two of each example and epoch"
    other = L2P(PromptPool(**SIZES), diversify=True)
    other.resume(model, 0, carried)
    for one in (method, other):
        one.prepare(model, tiny_tokenizer, stream, 1)
        shares = (carried["chosen"].double() + 1) / (2 * 24 * 2 + 5)
        torch.testing.assert_close(pool.frequency, shares)
    assert pool.chosen.sum() == 0
    train_task(model, tiny_tokenizer, method, stream[1].train, settings, seed=0, folder=tmp_path)
    most = carried["chosen"].argmax()
    assert pool.chosen[most] < carried["chosen"][most]
    assert method.finish(model, tiny_tokenizer, stream, 1)["chosen"].sum() == 2 * 2 * 24 * 2


def test_a_stopped_run_goes_on_to_the_same_results_and_counts_what_it_stores(teach):
    options = {**OPTIONS, "diversify": True, "epochs": 1}
    whole = teach("l2p", "whole", **options)
    assert teach("l2p", "stopped", stop_in=1, **options) == whole
    assert whole["trainable_parameters"] == COUNT
    assert whole["stored_parameters"] == COUNT + 5, "how often each key was chosen is carried"


def test_it_learns_a_task_and_then_another(tiny_llama, tiny_tokenizer, contradicting, tmp_path):
    options = {**SIZES, "learning_rate": 0.1, "batch_size": 8, "max_length": 48, "epochs": 4}
    asked = {"out": tmp_path / "run", "options": options, "tokenizer": tiny_tokenizer}
    entry = learn(tiny_llama(1, initializer_range=0.2), contradicting, "l2p", **asked).results["methods"]["l2p"]
    # nobody tells it which of the two is asked, so the same questions have one answer
    assert entry["matrix"] == [[100, 0], [0, 100]]
    assert entry["stored_parameters"] == COUNT


def test_it_says_which_prompts_a_text_takes(tiny_llama, tiny_tokenizer, stream, tmp_path):
    asked = {"out": tmp_path / "run", "options": {**SIZES, "max_length": 48, "epochs": 1}, "tokenizer": tiny_tokenizer}
    base = tiny_llama(1, initializer_range=0.2)
    run = learn(base, stream, "l2p", **asked)
    questions = [example.prompt for example in stream[0].test]
    shares = explain(run, questions, model=base, tokenizer=tiny_tokenizer)["l2p"]
    assert (shares["layers"], shares["slots"]) == (["input"], [f"prompt {j + 1}" for j in range(5)])
    model, _ = run.load_adapters("l2p", base)
    keys = prompts_of(model)["default"].keys.detach()
    for question, (found,) in zip(questions, shares["weights"], strict=True):
        ids = torch.tensor(tiny_tokenizer([question])["input_ids"])
        query = tiny_llama(1, initializer_range=0.2).model(ids).last_hidden_state.mean(1)
        chosen = torch.nn.functional.cosine_similarity(query, keys, dim=-1).topk(2).indices
        assert found == [0.5 if j in chosen else 0 for j in range(5)]
    seen = run.results["methods"]["l2p"]["attention"]
    mean = torch.tensor(shares["weights"], dtype=torch.float64).mean(0)
    torch.testing.assert_close(torch.tensor(seen["mean"][0], dtype=torch.float64), mean, rtol=0, atol=1e-6)


def test_micro_batches_do_not_change_its_loss(tiny_llama, tiny_tokenizer, stream, tmp_path):
    losses = []
    for accumulation in (1, 4):
        method = L2P(PromptPool(**SIZES), pull_weight=5.0)
        model = started(method, tiny_llama(1), tiny_tokenizer, stream)
        settings = TrainSettings(batch_size=8, accumulation=accumulation, max_length=48)
        rows = stream[1].train[:8]
        losses += train_task(model, tiny_tokenizer, method, rows, settings, seed=0, folder=tmp_path)
    first, second = (point["loss"] for point in losses)
    # rows of a micro-batch count alike, and micro-batches by their tokens: answers of one token and of several
    assert second == pytest.approx(first, rel=2e-3)


def test_options_are_checked():
    with pytest.raises(ValueError, match="pull_weight must be at least 0, not -1"):
        L2P(pull_weight=-1)
    for config in (LoRA(r=2), SoftPrompt()):
        with pytest.raises(ValueError, match=f"l2p needs a PromptPool, not {type(config).__name__}"):
            L2P(config)
