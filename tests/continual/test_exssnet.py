"""ExSSNeT over a stream: nothing is forgotten, to the bit; transfer by neighbours; the same results after a stop."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from peft import PeftModel

from folklora import ExSSNeT, LoRA
from folklora.adapters.exssnet import choose_task
from folklora.adapters.host.layer import updates_of
from folklora.continual import ExSSNeTStream
from folklora.continual.exssnet import nearest_vote, read
from folklora.stream.evaluate import evaluate

TARGETS = ["v_proj", "down_proj"]
QUICK = {"r": None, "target_modules": TARGETS, "density": 0.3}


def logits(model: PeftModel, tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor([tokenizer("xx: abc\nAnswer: yes")["input_ids"]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def started(method, base):
    # the first scores are drawn here
    torch.manual_seed(0)
    return method.start(base)


def teach_all(method, model, tokenizer, tasks, drill, after=None, count=4):
    """The stream by hand; `after` is called after each task."""
    for index, task in enumerate(tasks):
        torch.manual_seed(index)
        method.prepare(model, tokenizer, tasks, index)
        for phase in range(len(method.phases)):
            method.enter(model, tokenizer, tasks, index, phase)
            drill(model, task, count)
        carried = method.finish(model, tokenizer, tasks, index)
        if after is not None:
            after(index, carried)


def test_answers_of_earlier_tasks_stay_to_the_bit(tiny_llama, tiny_tokenizer, stream, drill):
    method = ExSSNeTStream(ExSSNeT(density=0.3, target_modules=TARGETS), transfer="always")
    model = started(method, tiny_llama(1))
    seen, scores = [], []

    def after(index, carried):
        for task, (answer, known) in enumerate(zip(seen, scores, strict=True)):
            method.route(model, task, index + 1)
            assert torch.equal(logits(model, tiny_tokenizer), answer)
            assert all(torch.equal(carried[name], value) for name, value in known.items()), "old scores stay"
        method.route(model, index, index + 1)
        seen.append(logits(model, tiny_tokenizer))
        scores.append({name: value.clone() for name, value in carried.items()})

    third = dataclasses.replace(stream[0], name="zz")
    teach_all(method, model, tiny_tokenizer, [*stream, third], drill, after)
    assert not torch.equal(seen[0], seen[1])
    method.route(model, 2, 2)
    assert torch.equal(logits(model, tiny_tokenizer), logits(tiny_llama(1), tiny_tokenizer)), "not learnt: the base's"
    assert len(scores[2]) == 3 * 4, "those of each task and layer"


def test_a_stopped_run_goes_on_to_the_same_results(teach):
    whole = teach("exssnet", "whole", **QUICK)
    assert teach("exssnet", "stopped", stop_in=1, phase="weights", **QUICK) == whole
    assert whole["matrix"][0][0] == whole["matrix"][1][0]
    assert whole["trainable_parameters"] == 2 * (16 * 32 + 32 * 64)


def test_without_a_weights_phase_only_masks_are_learnt(tiny_llama, tiny_tokenizer, stream, drill):
    method = ExSSNeTStream(ExSSNeT(density=0.3, target_modules=TARGETS), weight_epochs=0, transfer="none")
    assert [phase.name for phase in method.phases] == ["mask"]
    model = started(method, tiny_llama(1))
    teach_all(method, model, tiny_tokenizer, stream, drill)
    assert method.finish(model, tiny_tokenizer, stream, 1) == {}, "nothing is carried where nothing starts from it"
    for layer, update in updates_of(model, "default"):
        assert len(update.masks) == 2
        assert not any(values.any() for values in update.values)
        choose_task(model, 1)
        change = update.dense(layer.get_base_layer().weight)
        weight = layer.get_base_layer().weight.detach()
        assert torch.equal(weight + change, weight * update.mask())


def test_the_mask_has_its_own_learning_rate_and_epochs():
    method = ExSSNeTStream(mask_epochs=3, weight_epochs=1.5, mask_learning_rate=0.1)
    assert [(p.epochs, p.learning_rate) for p in method.phases] == [(3, 0.1), (1.5, None)]


def brute_force(known, labels, asked, votes):
    found = []
    for point in asked.double():
        order = sorted(range(len(known)), key=lambda i: (float((known[i].double() - point).square().sum()), i))
        voted = [int(labels[i]) for i in order[:votes]]
        found.append(min(set(voted), key=lambda label: (-voted.count(label), label)))
    return torch.tensor(found)


@pytest.mark.parametrize("votes", [1, 4, 15])
def test_neighbours_vote_as_an_independent_count_says(votes):
    draw = torch.Generator().manual_seed(votes)
    labels = torch.randint(4, (60,), generator=draw)
    known = torch.randn(60, 5, generator=draw) + labels[:, None]
    asked = torch.randn(25, 5, generator=draw) + torch.randint(4, (25, 1), generator=draw)
    found = nearest_vote(known, labels, asked, votes)
    assert torch.equal(found, brute_force(known, labels, asked, votes))
    assert len(set(found.tolist())) > 2


@pytest.mark.parametrize("votes", [1, 4, 15])
def test_neighbours_vote_as_in_scikit_learn(votes):
    neighbours = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    draw = torch.Generator().manual_seed(votes)
    labels = torch.randint(4, (60,), generator=draw)
    known, asked = torch.randn(60, 5, generator=draw) + labels[:, None], torch.randn(25, 5, generator=draw)
    oracle = neighbours.KNeighborsClassifier(votes).fit(known.double().numpy(), labels.numpy())
    assert nearest_vote(known, labels, asked, votes).tolist() == oracle.predict(asked.double().numpy()).tolist()


def test_with_random_answers_the_vote_is_right_as_often_as_chance():
    draw, right, asked = torch.Generator().manual_seed(0), 0, 0
    for _ in range(200):
        features, labels = torch.randn(40, 3, generator=draw), torch.randint(4, (40,), generator=draw)
        found = nearest_vote(features[:26], labels[:26], features[26:], 5)
        right, asked = right + int((found == labels[26:]).sum()), asked + 14
    # four standard deviations of a share of a quarter
    assert abs(right / asked - 1 / 4) < 4 * (3 / 16 / asked) ** 0.5


@pytest.fixture(scope="module")
def three(tiny_llama, tiny_tokenizer, stream, drill):
    """A method after two tasks, the second of random answers; its model; and a stream that goes on with the first."""
    method = ExSSNeTStream(ExSSNeT(density=0.3, target_modules=TARGETS), transfer_share=1.0)
    model = started(method, tiny_llama(1))
    draw = random.Random(0)
    noise = tuple(dataclasses.replace(e, completion=draw.choice((" yes", " no"))) for e in stream[0].train)
    tasks = [stream[0], dataclasses.replace(stream[1], train=noise, labels=(" yes", " no"))]
    teach_all(method, model, tiny_tokenizer, tasks, drill, count=30)
    return method, model, [*tasks, dataclasses.replace(stream[0], name="copy")]


def test_scores_start_from_the_task_whose_features_tell_the_answers(three, tiny_tokenizer):
    method, model, tasks = three
    rates = method.transfer_rates(model, tiny_tokenizer, tasks, 2)
    assert rates[0] > max(rates[1], 1 / 2)
    names = [layer.name for layer, _ in updates_of(model, "default")]
    found = method.transferred(model, tiny_tokenizer, tasks, 2)
    assert all(torch.equal(found[name], method._scores[f"0.{name}"]) for name in names)
    assert all(found[name].data_ptr() != method._scores[f"0.{name}"].data_ptr() for name in names)


def test_other_ways_to_start(three, tiny_tokenizer):
    method, model, tasks = three
    everything = dataclasses.replace(method, transfer="all")
    everything._scores = before = {name: value.clone() for name, value in method._scores.items()}
    # chance is lower, the more answers there may be: both pass
    many = [*tasks[:2], dataclasses.replace(tasks[2], labels=(" yes", " no", " a", " b", " c", " d"))]
    assert min(method.transfer_rates(model, tiny_tokenizer, many, 2)) > 1 / 6
    for name, value in everything.transferred(model, tiny_tokenizer, many, 2).items():
        torch.testing.assert_close(value, (method._scores[f"0.{name}"] + method._scores[f"1.{name}"]) / 2)
    assert all(torch.equal(before[name], value) for name, value in method._scores.items())
    # a rate that is chance itself does not pass
    one = dataclasses.replace(tasks[2], train=tasks[2].train[:1] * 8, labels=(" yes",))
    assert method.transfer_rates(model, tiny_tokenizer, [*tasks[:2], one], 2) == [1.0, 1.0]
    assert method.transferred(model, tiny_tokenizer, [*tasks[:2], one], 2) is None
    always = dataclasses.replace(method, transfer="always")
    always._scores = method._scores
    assert always.transferred(model, tiny_tokenizer, [*tasks[:2], one], 2) is not None
    assert dataclasses.replace(method, transfer="none").transferred(model, tiny_tokenizer, tasks, 2) is None


@pytest.mark.parametrize("two_sided", [False, True])
def test_features_are_what_the_head_is_given(tiny_llama, tiny_t5, tiny_tokenizer, two_sided):
    base, targets = (tiny_t5(), ["v", "wo"]) if two_sided else (tiny_llama(1), TARGETS)
    model = started(ExSSNeTStream(ExSSNeT(density=0.9, target_modules=targets)), base)
    given = []
    handle = base.lm_head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0, -1].detach()))
    found = read(model.train(), tiny_tokenizer, ["xx: a\nAnswer:", "a longer prompt\nAnswer:"])
    handle.remove()
    assert model.training
    # T5 scales what it gives to a tied head
    scale = base.model_dim**-0.5 if two_sided and base.config.tie_word_embeddings else 1.0
    torch.testing.assert_close(scale * found, torch.stack(given))


def test_it_learns_and_forgets_nothing(tiny_llama, tiny_tokenizer, opposed, drill):
    method = ExSSNeTStream(ExSSNeT(density=0.5, target_modules=TARGETS))
    model, rows = started(method, tiny_llama(1)), []

    def after(index, carried):
        rows.append([])
        for number, task in enumerate(opposed[: index + 1]):
            method.route(model, number, index + 1)
            rows[-1].append(evaluate(model, tiny_tokenizer, task, max_length=48))

    teach_all(method, model, tiny_tokenizer, opposed, drill, after, count=40)
    assert rows[0][0] == rows[1][0] >= 90
    assert rows[1][1] >= 90


def test_options_are_checked():
    with pytest.raises(ValueError, match="exssnet needs an ExSSNeT adapter, not LoRA"):
        ExSSNeTStream(LoRA())
    with pytest.raises(ValueError, match="exssnet sets searching and counts as the stream goes by"):
        ExSSNeTStream(ExSSNeT(searching=False))
    with pytest.raises(ValueError, match="transfer must be best, always, all or none, not 'worst'"):
        ExSSNeTStream(transfer="worst")
    with pytest.raises(ValueError, match="neighbours must be at least 1 and transfer_share above 0"):
        ExSSNeTStream(neighbours=0)
    with pytest.raises(ValueError, match="mask_epochs must be above 0, not 0"):
        ExSSNeTStream(mask_epochs=0)
    with pytest.raises(ValueError, match="weight_epochs must be at least 0, not -1"):
        ExSSNeTStream(weight_epochs=-1)
