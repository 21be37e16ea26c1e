"""Adapt-∞: scores against their closed forms, vectors against autograd, what is chosen and kept, runs end to end."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from folklora import KaSA, LoRA
from folklora.continual import AdaptInfty
from folklora.continual.answers import answer_of
from folklora.continual.scores import (
    SCORES,
    Measure,
    Measured,
    block_parameters,
    el2n,
    log_perplexity,
    token_entropy,
    without_passage,
)
from folklora.selection import random_projection, water_filling
from folklora.stream.tasks import Example, Task

SMALL = {"budget": 16, "pool": 30, "n_clusters": 3, "proj_dim": 64}


def moved(model, adapter=None, seed=0):
    """An adapted model off its start."""
    adapted = AdaptInfty(adapter=adapter or LoRA(r=2)).start(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapted


def measured(model, tokenizer, examples, without=None, **options):
    return Measure(48, **options).of(model, tokenizer, examples, without or [None] * len(examples))


def made_up(n, seed=0, **scores):
    """n examples in four groups of very different size, most of them much alike."""
    draw = torch.Generator().manual_seed(seed)
    group = torch.arange(n) % 37 % 4
    vectors = torch.eye(4, 12)[group] + 0.1 * torch.randn(n, 12, generator=draw)
    values = {name: torch.randn(n, generator=draw).double() for name in SCORES} | scores
    return Measured(F.normalize(vectors, dim=1), values)


def test_el2n_in_closed_form():
    V, answer = 7, torch.tensor([2, 5, 0])
    certain = 200.0 * F.one_hot(answer, V)
    assert el2n(certain, answer) == pytest.approx(0, abs=1e-6)
    assert el2n(torch.zeros(3, V), answer) == pytest.approx(math.sqrt((1 - 1 / V) ** 2 + (V - 1) / V**2), rel=1e-6)
    assert el2n(certain, (answer + 1) % V) == pytest.approx(math.sqrt(2), rel=1e-6)


def test_perplexity_and_entropy_in_closed_form():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    assert log_perplexity(p.log(), torch.tensor([1, 0])) == pytest.approx(math.log((4 + 10) / 2), rel=1e-6)
    assert log_perplexity(torch.zeros(2, 8), torch.tensor([0, 3])) == pytest.approx(math.log(8), rel=1e-6)
    first = 1.5 * math.log(2)
    second = -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))
    assert token_entropy(p.log()) == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("two_sided", [False, True])
def test_vectors_and_scores_are_those_of_single_passes(tiny_llama, tiny_t5, tiny_tokenizer, stream, two_sided):
    adapter = LoRA(r=2, dropout=0.5)
    model = moved(tiny_t5() if two_sided else tiny_llama(1), adapter).train()
    examples = [*stream[0].train[:3], *stream[1].train[:2]]
    found = measured(model, tiny_tokenizer, examples, width=8192)
    assert model.training
    model.eval()
    parameters = block_parameters(model)
    for row, example in enumerate(examples):
        logits, answer = answer_of(model, tiny_tokenizer, example, 48)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(logits, answer), parameters)])
        assert found.scores["grand"][row].item() == pytest.approx(gradient.norm().item(), rel=1e-5)
        torch.testing.assert_close(found.vectors[row], gradient / gradient.norm(), rtol=1e-4, atol=1e-6)
        assert found.scores["el2n"][row].item() == pytest.approx(float(el2n(logits.detach(), answer)), rel=1e-5)
        assert found.scores["perplexity"][row].item() == pytest.approx(
            float(log_perplexity(logits.detach(), answer)), rel=1e-5
        )
    assert found.scores["grounding"].isnan().all()


def test_wide_gradients_are_projected_and_signs_are_signs(tiny_llama, tiny_tokenizer, stream):
    model, examples = moved(tiny_llama(1)), stream[0].train[:4]
    whole = measured(model, tiny_tokenizer, examples)
    narrow = measured(model, tiny_tokenizer, examples, width=16, seed=5)
    expected = F.normalize(random_projection(whole.vectors, 16, 5), dim=1)
    torch.testing.assert_close(narrow.vectors, expected, rtol=1e-4, atol=1e-5)
    signs = measured(model, tiny_tokenizer, examples, vectors="sign").vectors
    torch.testing.assert_close(signs, F.normalize(whole.vectors.sign(), dim=1))


def test_zero_order_vectors_are_near_the_gradient_and_leave_the_model_alone(tiny_llama, tiny_tokenizer, stream):
    model, examples = moved(tiny_llama(1)), stream[0].train[:1]
    before = {name: value.clone() for name, value in model.named_parameters()}
    found = measured(model, tiny_tokenizer, examples, vectors="zero-order", probes=100)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    exact = measured(model, tiny_tokenizer, examples)
    # of d numbers with n probes the cosine is about √(n / (n + d))
    d = exact.vectors.shape[1]
    cosine = (found.vectors * exact.vectors).sum(1)
    assert (cosine - math.sqrt(100 / (100 + d))).abs().max() < 0.15


def test_the_block_is_the_middle_one_or_the_one_asked_for(tiny_llama):
    model = moved(tiny_llama(num_hidden_layers=5))
    names = {id(value): name for name, value in model.named_parameters()}

    def blocks(number=None):
        return {names[id(p)].split("layers.")[1][0] for p in block_parameters(model, number)}

    assert blocks() == {"2"}
    assert blocks(4) == {"4"}
    assert len(block_parameters(moved(tiny_llama(), LoRA(r=1, target_modules=["lm_head"])))) == 2
    with pytest.raises(ValueError, match="block 5 of layers has no trained parameters; there are 5"):
        block_parameters(model, 5)


def test_the_passage_is_what_differs_between_a_task_s_prompts():
    def bare(*prompts):
        return [None if e is None else e.prompt for e in without_passage([Example(p, " x") for p in prompts])]

    assert bare("Is it so?\na b c\nAnswer:", "Is it so?\nad\nAnswer:") == 2 * ["Is it so?\n\nAnswer:"]
    # whole words alone, though these share more
    assert bare("Say xab\nIn:", "Say xcab\nIn:") == 2 * ["Say \nIn:"]
    assert bare("one thing", "another") == [None, None]
    assert bare("What is it? That", "What is it? This") == 2 * ["What is it?"]
    assert bare("the same", "the same") == 2 * ["the same"]


def test_grounding_is_one_where_the_passage_is_ignored(tiny_llama, tiny_tokenizer, stream):
    model = moved(tiny_llama(1))
    examples = list(stream[0].train[:6])
    without = without_passage(examples)
    assert without[0].prompt != examples[0].prompt
    assert without[0].completion == examples[0].completion
    found = measured(model, tiny_tokenizer, examples, without).scores
    for row, (whole, bare) in enumerate(zip(examples, without, strict=True)):
        # the paper's ratio of two perplexities
        with torch.no_grad():
            alone, given = (math.exp(log_perplexity(*answer_of(model, tiny_tokenizer, e, 48))) for e in (bare, whole))
        assert found["grounding"][row].item() == pytest.approx(alone / given, rel=1e-4)
    assert (found["grounding"] - 1).abs().max() > 1e-3
    with torch.no_grad():
        # a head that answers the same to everything
        for value in model.get_base_model().lm_head.parameters():
            value.zero_()
    blind = measured(model, tiny_tokenizer, examples, without).scores["grounding"]
    torch.testing.assert_close(blind, torch.ones(6).double(), rtol=1e-6, atol=0)


def test_what_is_chosen_follows_the_paper_step_by_step():
    n = 300
    # "el2n" tells all apart, "grand" hardly any
    even = torch.linspace(0, 1, n).double()[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    found = made_up(n, el2n=even, grand=(torch.arange(n) % 2).double())
    found.vectors[200:240] = found.vectors[100:140]
    method = AdaptInfty(budget=60, pool=200, n_clusters=4, selectors=["grand", "el2n"])
    kept, chosen = method.choose(found, torch.Generator().manual_seed(0))
    assert (len(kept), len(chosen)) == (200, 60)
    assert set(chosen.tolist()) <= set(kept.tolist())
    assert len(kept.unique()) == 200
    # duplicates go first, the later ones of each pair
    assert not set(range(200, 240)) & set(kept.tolist())
    groups = torch.arange(n) % 37 % 4
    groups[200:240] = groups[100:140]
    # every cluster is as large as its share of the budget
    assert torch.bincount(groups[chosen]).tolist() == [15, 15, 15, 15]
    room = water_filling(torch.bincount(groups).tolist(), 200)
    assert torch.bincount(groups[kept]).tolist() == room
    # spread over the range of the sharper score
    assert even[chosen].std() > 0.2
    again = method.choose(found, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], kept)
    assert torch.equal(again[1], chosen)


def test_a_score_that_is_not_known_of_all_takes_no_part():
    found = made_up(60, grounding=torch.full((60,), torch.nan).double())
    _, chosen = AdaptInfty(budget=20, pool=40, n_clusters=3).choose(found, torch.Generator().manual_seed(0))
    assert len(chosen) == 20


def test_the_pool_never_grows_beyond_its_size_and_duplicates_leave_it(tiny_llama, tiny_tokenizer, stream):
    method = AdaptInfty(adapter=LoRA(r=2), **SMALL)
    method.max_length = 48
    doubled = dataclasses.replace(stream[0], train=stream[0].train + stream[0].train)
    tasks = [doubled, stream[1]]
    torch.manual_seed(0)
    model = method.start(tiny_llama(1))
    method.prepare(model, tiny_tokenizer, tasks, 0)
    pool = method.finish(model, tiny_tokenizer, tasks, 0)["pool"]
    assert tuple(pool.shape) == (30, 2)
    texts = [doubled.train[row] for _, row in pool.tolist()]
    assert len(set(texts)) == len(set(doubled.train)) < 24 < 30, "each text is kept before any is kept twice"
    assert len(method.examples(tasks, 0, 0)) == 16
    method.prepare(model, tiny_tokenizer, tasks, 1)
    after = method.finish(model, tiny_tokenizer, tasks, 1)["pool"]
    assert tuple(after.shape) == (30, 2)
    assert set(after[:, 0].tolist()) == {0, 1}
    assert {tuple(place) for place in after.tolist() if place[0] == 0} <= {tuple(place) for place in pool.tolist()}
    drawn = method.examples(tasks, 1, 0)
    assert len(drawn) == 16
    assert {e.prompt[:2] for e in drawn} == {"xx", "yy"}, "old and new examples are trained"


def test_the_rare_skill_is_not_drowned(tiny_llama, tiny_tokenizer):
    """A task of which one example in sixteen is of another kind: sharing out by skills trains it far more often."""
    common = [Example(f"xx: {'ab'[i % 2] * (1 + i % 5)}\nAnswer:", " yes") for i in range(75)]
    rare = [Example(f"xx: {'cd'[i % 2] * (1 + i % 3)}\nAnswer:", " negative") for i in range(5)]
    task = Task("xx", tuple(common + rare), (), None)
    method = AdaptInfty(adapter=LoRA(r=2), budget=16, pool=40, n_clusters=2)
    method.max_length = 48
    torch.manual_seed(0)
    model = method.start(tiny_llama(1))
    method.prepare(model, tiny_tokenizer, [task], 0)
    assert sum(example.completion == " negative" for example in method.examples([task], 0, 0)) >= 4


def test_it_learns_keeps_the_pool_on_disk_and_counts_it(teach, tmp_path):
    found = teach("adapt-infty", "run", **SMALL, epochs=4, learning_rate=0.05)
    first = [point["loss"] for point in found["losses"] if point["task"] == 0]
    assert len(first) == 8, "four epochs of the budget of 16, not of the 24 examples that there are"
    assert first[-1] < first[0] - 0.3
    file = tmp_path / "run/adapt-infty/task-002/carried.safetensors"
    pool = load_file(file)["pool"]
    assert tuple(pool.shape) == (30, 2)
    assert found["stored_parameters"] == found["trainable_parameters"] + pool.numel()
    assert found["stored_examples"] == 30
    assert not (tmp_path / "run/adapt-infty/task-001/carried.safetensors").exists()


def test_a_stopped_run_goes_on_to_the_same_results_over_another_adapter(teach):
    method = AdaptInfty(adapter=KaSA(r=2, alpha=8.0), **SMALL)
    assert teach(method, "stopped", stop_in=1) == teach(method, "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1, not 0"),
        ({"budget": 10, "pool": 9}, r"pool must be at least budget \(10\)"),
        ({"selectors": ["loss"]}, r"selectors must be some of perplexity, el2n.*not \['loss'\]"),
        ({"selectors": ["grounding"]}, "another one beside grounding"),
        ({"sampling": "all"}, "sampling must be one of coverage, random, not 'all'"),
        ({"vectors": "hidden"}, "vectors must be one of gradient, sign, zero-order"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptInfty(**options)
