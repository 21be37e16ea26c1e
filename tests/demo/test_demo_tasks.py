import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import folklora.demo
from folklora.demo.tasks import PROMPTS, demo_tasks
from folklora.demo.world import World, pretraining_text, texts

MODEL = Path(folklora.demo.__file__).with_name("model")
shipped = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the model is not trained yet")


@pytest.fixture(scope="module")
def tasks():
    return demo_tasks(0)


def test_a_seed_decides_the_examples(tasks):
    assert demo_tasks(0) == tasks
    assert all(a.train != b.train and a.name == b.name for a, b in zip(tasks, demo_tasks(1), strict=True))


def test_five_tasks_of_balanced_labels(tasks):
    assert len({task.name for task in tasks}) == 5
    for task in tasks:
        for examples in (task.train, task.test):
            counts = Counter(example.completion for example in examples)
            assert set(counts) == set(task.labels)
            assert max(counts.values()) - min(counts.values()) <= 1
        assert len(task.train) == 420
        assert len(task.test) == 120


def test_train_and_test_share_no_example_and_no_name(tasks):
    world = World()
    for task in tasks:
        prompts = [example.prompt for example in task.train + task.test]
        assert len(set(prompts)) == len(prompts)
        assert not _words(task.train) & world.exam.names
        assert not _words(task.test) & world.practice.names


def test_every_example_names_somebody_the_model_never_read_about(tasks):
    world = World()
    for task in tasks:
        for part, examples in ((world.practice, task.train), (world.exam, task.test)):
            assert all(_words([example]) & part.names for example in examples)
            assert not _words(examples) & world.known.names


def test_no_text_of_a_task_occurs_in_the_pretraining_text(tasks):
    chunks = [pretraining_text(World(), start, 2_000) for start in range(0, 8_000, 2_000)]
    read = "\n".join(text for chunk in chunks for text in chunk)
    bodies = {e.prompt.split("\n")[1] for task in tasks for e in task.train + task.test}
    assert not [body for body in bodies if body in read]
    instructions = {prompt.split("\n")[0].replace("{a} to {b}", "") for prompt in PROMPTS.values()}
    assert not [line for line in instructions if line.partition(": ")[2] in read]


def test_the_text_does_not_depend_on_the_label_by_its_length(tasks):
    for task in tasks:
        by_label = {label: [] for label in task.labels}
        for example in task.train:
            by_label[example.completion].append(len(example.prompt.split()))
        means = [sum(lengths) / len(lengths) for lengths in by_label.values()]
        assert max(means) < 1.35 * min(means)


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="at least 6"):
        demo_tasks(0, train=5)


@shipped
def test_prompts_are_short_and_labels_differ_in_their_first_token(tasks):
    tokenizer = _tokenizer()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    for task in tasks:
        rows = [example.prompt + example.completion for example in task.train + task.test]
        assert max(map(len, tokenizer(rows).input_ids)) <= 64
        assert len({tokenizer(label).input_ids[0] for label in task.labels}) == len(task.labels)


@shipped
def test_names_are_never_one_token(tasks):
    world = World()
    tokenizer = _tokenizer()
    for part in (world.known, world.exam):
        lengths = [len(ids) for ids in tokenizer([f" {name}" for name in sorted(part.names)]).input_ids]
        assert min(lengths) >= 2
        assert sum(lengths) / len(lengths) < 2.5


@shipped
def test_the_shipped_model_is_small_and_says_how_it_was_made():
    record = json.loads((MODEL / "training.json").read_text())
    model = _model()
    assert sum(p.numel() for p in model.parameters()) == record["parameters"] <= 4_000_000
    assert (MODEL / "model.safetensors").stat().st_size <= 8_000_000
    assert record["tokens_read"] >= record["distinct_tokens"] > 1_000_000


@shipped
def test_the_shipped_model_has_learned_the_language_not_the_names():
    tokenizer = _tokenizer()
    read = [token for text in pretraining_text(World(), 0, 1_000) for token in tokenizer(text).input_ids]
    counts = Counter(read)
    unread = list(texts(World().exam, 9, 150))
    total, unigram, number = 0.0, 0.0, 0
    model = _model().eval()
    for text in unread:
        ids = torch.tensor([[0, *tokenizer(text).input_ids]])
        with torch.inference_mode():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size = len(read) + len(tokenizer)
        unigram -= sum(math.log((counts[token] + 1) / size) for token in ids[0, 1:].tolist())
        number += ids.shape[1] - 1
    assert math.exp(total / number) < 0.1 * math.exp(unigram / number)


@shipped
def test_before_learning_the_model_does_not_know_the_tasks(tasks):
    tokenizer, model = _tokenizer(), _model().eval()
    for task in tasks:
        labels = [tokenizer(label).input_ids[0] for label in task.labels]
        hits = 0
        for example in task.test:
            with torch.inference_mode():
                scores = model(input_ids=torch.tensor([tokenizer(example.prompt).input_ids])).logits[0, -1, labels]
            hits += task.labels[int(scores.argmax())] == example.completion
        assert hits / len(task.test) < 0.6, task.name


def _words(examples):
    return {word for example in examples for word in re.findall(r"[A-Za-z]+", example.prompt)}


def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def _model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
