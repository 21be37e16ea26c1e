"""Adapters measured by a few examples, and open data found by them: against definitions, and with real models."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from folklora import LoRA, tiny
from folklora.continual.answers import answer_of
from folklora.expertise import (
    answer_perplexities,
    augment,
    bank_similarity,
    choose_group,
    measure,
    tensor_cosines,
    update_cosines,
)
from folklora.factored import Factors
from folklora.stream.tasks import Example
from folklora.stream.tokens import encode

SHOTS = [Example(f"{word}\nAnswer:", answer) for word, answer in [("aaaaa", " yes"), ("bbbbb", " no"), ("ccc", " yes")]]


def mean_of_pairs(similarity: Tensor, group: Sequence[int]) -> float:
    pairs = [float(similarity[i, j]) for i, j in itertools.combinations(group, 2)]
    return sum(pairs) / max(1, len(pairs))


@pytest.mark.parametrize("seed", range(20))
def test_the_group_is_that_of_a_search_by_hand(seed: int) -> None:
    draw = random.Random(seed)
    n, size, candidates = 7, draw.randint(1, 4), draw.randint(4, 9)
    perplexity, accuracy = [draw.choice([1.5, 2, 3, 9]) for _ in range(n)], [draw.choice([0, 20, 40]) for _ in range(n)]
    similarity = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    similarity = (similarity + similarity.T) / 2
    ranks = [1 + sum(p < own for p in perplexity) for own in perplexity]
    ranks = [rank + 1 + sum(a > own for a in accuracy) for rank, own in zip(ranks, accuracy, strict=True)]
    kept = sorted(sorted(range(n), key=lambda i: ranks[i])[:candidates])
    groups = list(itertools.combinations(kept, size))
    means = [mean_of_pairs(similarity, group) for group in groups]

    def total(i: int) -> tuple[int, float]:
        # a mean that differs by rounding alone is another
        alike = 1 + sum(mean < means[i] - 1e-12 for mean in means)
        return sum(ranks[m] for m in groups[i]) + alike, means[i]

    expected = groups[min(range(len(groups)), key=total)]
    given = torch.tensor(perplexity, dtype=torch.float64), torch.tensor(accuracy, dtype=torch.float64), similarity
    assert choose_group(*given, size=size, candidates=candidates) == list(expected)


def test_of_two_alike_only_one_is_chosen_and_what_diverged_is_not() -> None:
    perplexity = torch.tensor([1.1, 1.1, 1.2, 1.3, torch.nan])
    accuracy = torch.tensor([90.0, 90.0, 80.0, 70.0, 60.0])
    similarity = torch.eye(5)
    similarity[0, 1] = similarity[1, 0] = 1.0
    assert choose_group(perplexity, accuracy, similarity, size=2, candidates=4) in ([0, 2], [1, 2])
    assert choose_group(perplexity, accuracy, torch.eye(5), size=4, candidates=5) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="a group of 6 cannot be chosen from 5 adapters"):
        choose_group(perplexity, accuracy, similarity, size=6)


def parts(count: int = 3, ranks: Sequence[int] = (2, 3, 2)) -> list[Factors]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(rank, 7, 5) for rank in ranks[:count]]
    return [
        Factors(torch.randn(r, i, generator=draw).double(), 0.5, torch.randn(o, r, generator=draw).double())
        for r, i, o in shapes
    ]


def test_cosines_of_updates_are_those_of_the_dense_ones_whatever_the_factors() -> None:
    given = parts()
    dense = F.normalize(torch.stack([part.dense().flatten() for part in given]), dim=1)
    found = update_cosines(given)
    torch.testing.assert_close(found, dense @ dense.T, rtol=0, atol=1e-12)
    turned = []
    for part in given:
        R = torch.randn(part.rank, part.rank, generator=torch.Generator().manual_seed(2)).double()
        turned.append(replace(part, A=R @ part.A, B=part.B @ R.inverse()))
    torch.testing.assert_close(update_cosines(turned), found, rtol=0, atol=1e-10)
    assert not torch.allclose(tensor_cosines(turned[::2]), tensor_cosines(given[::2]))
    nothing = Factors(torch.zeros(0, 7), 1.0, torch.zeros(5, 0))
    assert update_cosines([given[0], nothing])[1].tolist() == [0.0, 0.0]


def test_cosines_of_tensors_are_symmetric_and_count_a_duplicate_once_a_tensor() -> None:
    one, _, other = parts()
    found = tensor_cosines([one, other, replace(one, A=-one.A)])
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found[0, 2], torch.tensor(2.0).double())
    expected = F.cosine_similarity(one.A.flatten(), other.A.flatten(), dim=0).abs()
    expected = expected + F.cosine_similarity(one.B.flatten(), other.B.flatten(), dim=0).abs()
    torch.testing.assert_close(found[0, 1], expected)
    with pytest.raises(ValueError, match=r"ranks \[2, 3, 2\]"):
        tensor_cosines(parts())


@pytest.fixture(scope="module")
def bank(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, str]:
    """Four LoRAs: one that learnt the shots, its twin in other factors, one that knows half, and noise."""
    folder = tmp_path_factory.mktemp("bank")
    for seed, (name, steps) in enumerate({"solver": 40, "half": 8, "noise": 0}.items()):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_llama(initializer_range=0.2), LoRA(r=2, target_modules="all-linear"))
        if not steps:
            tiny.moved(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(steps):
            sum(F.cross_entropy(*answer_of(model, tiny_tokenizer, shot, 64)) for shot in SHOTS).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)
        if name == "solver":
            for value in model.parameters():
                if value.requires_grad:
                    value.data.neg_()
            model.save_pretrained(folder / "twin")
    return {name: str(folder / name) for name in ("noise", "half", "solver", "twin")}


def test_adapters_are_measured_and_the_base_is_as_it_was(
    bank: dict[str, str], tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(initializer_range=0.2)
    found = measure(model, tiny_tokenizer, bank, SHOTS, labels=[" yes", " no"])
    assert found.names == list(bank)
    noise, half, solver, twin = range(4)
    assert found.accuracy[[solver, twin]].tolist() == [100.0, 100.0]
    assert 1 <= found.perplexity[solver] < found.perplexity[half] < found.perplexity[noise]
    torch.testing.assert_close(found.perplexity[twin], found.perplexity[solver])
    # some fourteen layers' cosines of float32 factors
    assert float(found.similarity[solver, twin]) == pytest.approx(1.0, abs=1e-6)
    assert float(found.similarity[solver, noise]) < 0.5
    assert set(found.choose(size=2, candidates=3)) == {"half", "solver"}
    fresh = tiny_llama(initializer_range=0.2)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    exact = measure(model, tiny_tokenizer, {"solver": bank["solver"]}, SHOTS, reasoned=SHOTS[:1])
    assert exact.accuracy.tolist() == [100.0]
    assert exact.perplexity < found.perplexity[half]
    raw = bank_similarity(model, bank, "tensors")
    assert float(raw[solver, twin]) == pytest.approx(2 * 14, abs=1e-4)


def test_perplexity_is_of_the_answer_alone(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(initializer_range=0.2).train()
    found = answer_perplexities(model, tiny_tokenizer, SHOTS)
    assert model.training
    for shot, value in zip(SHOTS, found, strict=True):
        row = encode(tiny_tokenizer, shot, 64)
        logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0].double()
        answer = [i for i, label in enumerate(row["labels"]) if label != -100]
        logits = logits.detach()
        losses = [-logits[i - 1].log_softmax(0)[row["input_ids"][i]] for i in answer]
        assert float(value) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert (found >= 1).all()


def test_open_examples_near_the_shots_come_before_them(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pool = [*SHOTS, Example("9 + 9 =", " 18"), Example("x", " y"), SHOTS[0]]
    model = tiny_llama(initializer_range=0.2)
    found = augment(model, tiny_tokenizer, SHOTS, pool, count=5, threshold=0.99999, prefix="")
    assert found[-3:] == SHOTS
    # each shot is its own nearest, and its copy in the pool goes
    assert sorted(map(str, found[:3])) == sorted(map(str, SHOTS))
    assert len(found) <= 3 + 4
    assert augment(model, tiny_tokenizer, SHOTS, pool, count=2, scorer="density", threshold=1.0, seed=1)[2:] == SHOTS
    with pytest.raises(ValueError, match="there are none"):
        augment(model, tiny_tokenizer, [], pool)


def test_what_cannot_be_measured_is_named(
    bank: dict[str, str],
    tmp_path: Path,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    def measured(folder: str, **options: Any) -> None:
        measure(tiny_llama(initializer_range=0.2), tiny_tokenizer, {"one": folder}, SHOTS, **options)

    with pytest.raises(ValueError, match="there are none"):
        measure(tiny_llama(initializer_range=0.2), tiny_tokenizer, bank, [])
    with pytest.raises(FileNotFoundError, match="one: "):
        measured(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="likeness must be one of update, tensors"):
        measured(bank["half"], likeness="cosine")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(tiny_llama(initializer_range=0.2), config).save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="one trained whole modules too"):
        measured(str(tmp_path / "head"))
    get_peft_model(tiny.TwoLayers(), LoRA(r=2, target_modules=["q"])).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="no layer of this model"):
        measured(str(tmp_path / "other"))
