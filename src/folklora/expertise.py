"""What a few checked examples of a new task tell: which adapters of a bank solve it, and which open data is like it.

    bank = {"arc": "adapters/arc", "race": "adapters/race", ...}
    found = measure(model, tokenizer, bank, shots)
    chosen = found.choose(size=4)
    data = augment(model, tokenizer, shots, open_examples, count=1000)
    expert = get_peft_model(model, Rocket(sources={name: bank[name] for name in chosen}))

Source: Yang et al., "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models", 2024, arXiv
2408.15915; its third stage is the adapter `Rocket`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.task_vectors import adapters_of
from folklora.continual.answers import answer_of
from folklora.encoders import BaseEncoder, Encoder, encode_prompts
from folklora.factored import Factors
from folklora.selection import Scorer, near_and_diverse
from folklora.stream.evaluate import evaluate
from folklora.stream.tasks import Example, Task

PREFIX = "Represent the following sentence for similar task retrieval: "
"""What the authors put before each text that is encoded, as their encoder was trained to read it."""
Likeness = Literal["update", "tensors"]
_NAME = "measured"


@dataclass(frozen=True)
class Expertise:
    """What was found of n adapters.

    Args:
        names: Theirs.
        perplexity: [n] float64, of the shots' answers: the mean over shots of exp(mean cross-entropy of a token).
        accuracy: [n] float64, percent of the shots that are answered rightly.
        similarity: [n, n] float64, of the adapters to one another.
    """

    names: list[str]
    perplexity: Tensor
    accuracy: Tensor
    similarity: Tensor

    def choose(self, size: int = 4, candidates: int = 8) -> list[str]:
        """The names of `choose_group`."""
        group = choose_group(self.perplexity, self.accuracy, self.similarity, size=size, candidates=candidates)
        return [self.names[index] for index in group]


def choose_group(
    perplexity: Tensor, accuracy: Tensor, similarity: Tensor, *, size: int = 4, candidates: int = 8
) -> list[int]:
    """The group of adapters that solve the shots and differ from one another.

    With R_P the rank of an adapter's perplexity and R_A that of its accuracy (1 is the best, equals share a rank), the
    `candidates` with the smallest R_P + R_A are kept. Of all their groups G of a size, R_D ranks the mean similarity of
    the pairs in it (1 is the least), and the group with the smallest Σ_{m ∈ G} (R_P + R_A) + R_D is chosen; of equal
    ones that of less similarity. Ranks do not know how far apart things are, so nothing is weighed.

    Args:
        perplexity: [n].
        accuracy: [n].
        similarity: [n, n].
        size: N, adapters in the group.
        candidates: M; all where there are fewer.

    Returns:
        Indices, ascending.

    Raises:
        ValueError: There are not as many adapters or candidates as the group needs.
    """
    n = len(perplexity)
    if not 1 <= size <= min(n, candidates):
        raise ValueError(f"a group of {size} cannot be chosen from {n} adapters and {candidates} candidates")
    # what diverged has no perplexity
    ranks = _rank(perplexity.nan_to_num(nan=torch.inf, posinf=torch.inf)) + _rank(-accuracy)
    kept = sorted(ranks.argsort(stable=True)[:candidates].tolist())
    groups = list(itertools.combinations(kept, size))
    pairs = max(1, size * (size - 1) // 2)
    alike = torch.stack([similarity[list(g)][:, list(g)].triu(1).sum() / pairs for g in groups])
    totals = torch.stack([ranks[list(group)].sum() for group in groups]) + _rank(alike)
    return list(groups[min(range(len(groups)), key=lambda i: (int(totals[i]), float(alike[i])))])


def _rank(values: Tensor) -> Tensor:
    """1 + how many are smaller, [n]."""
    return 1 + torch.searchsorted(values.sort().values.contiguous(), values.contiguous())


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bank: Mapping[str, str | Path],
    shots: Sequence[Example],
    *,
    reasoned: Sequence[Example] = (),
    labels: Sequence[str] | None = None,
    likeness: Likeness = "update",
    batch_size: int = 32,
    max_length: int = 512,
) -> Expertise:
    """How well each adapter of a bank solves a few examples, and how much they are alike.

    Args:
        model: The base; adapters are put on it and taken off again, one by one.
        tokenizer: Its tokenizer.
        bank: Name → the folder of a LoRA, PEFT's or of a Folklora adapter that has factors.
        shots: K checked examples, whose answers are compared.
        reasoned: The same with the reasons in their answers, of which the perplexity is: it tells those that solve them
            from those that guess. Without any, the perplexity is of the plain answers.
        labels: The answers to rank; None compares greedy answers.
        likeness: "update" is the mean over layers of the cosine of the ΔW. "tensors" is the authors' sum over layers of
            the |cosine| of A and that of B, which tells LoRAs apart that compute the same, and asks for equal ranks.
        batch_size: Prompts read at once.
        max_length: Tokens of prompt and answer.

    Raises:
        ValueError: There are no shots, an adapter is none that can be mixed, or ranks differ.
        FileNotFoundError: A folder holds no adapter.
    """
    if not shots:
        raise ValueError("adapters are measured by examples of the task, and there are none")
    folders = {name: str(folder) for name, folder in bank.items()}
    similarity = bank_similarity(model, folders, likeness)
    whole = [name for name, folder in folders.items() if PeftConfig.from_pretrained(folder).modules_to_save]
    if whole:
        raise ValueError(f"{', '.join(whole)} trained whole modules too (modules_to_save), which are not mixed")
    task = Task("shots", (), tuple(shots), None if labels is None else tuple(labels))
    perplexities, accuracies = [], []
    for folder in folders.values():
        adapted = PeftModel.from_pretrained(model, folder, adapter_name=_NAME)
        try:
            found = answer_perplexities(adapted, tokenizer, reasoned or shots, max_length)
            perplexities.append(found.mean())
            accuracies.append(evaluate(adapted, tokenizer, task, batch_size=batch_size, max_length=max_length))
        finally:
            adapted.unload()
    return Expertise(list(folders), torch.stack(perplexities), torch.tensor(accuracies).double(), similarity)


@torch.no_grad()
def answer_perplexities(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int = 512
) -> Tensor:
    """exp of the mean cross-entropy of a token of each example's answer given its prompt, [n] float64, at least 1.

    Args:
        model: It is read in evaluation mode; its own mode is restored.
        tokenizer: Its tokenizer.
        examples: Encoded as in training, with an end of text.
        max_length: As in training.
    """
    training = model.training
    model.eval()
    try:
        read = [answer_of(model, tokenizer, example, max_length) for example in examples]
        return torch.stack([F.cross_entropy(*each).double().exp().cpu() for each in read])
    finally:
        model.train(training)


def bank_similarity(model: nn.Module, bank: Mapping[str, str], likeness: Likeness = "update") -> Tensor:
    """How much the adapters of a bank are alike, [n, n] float64; see `measure`.

    Args:
        model: The base.
        bank: Name → folder.
        likeness: "update" or "tensors".
    """
    if likeness not in get_args(Likeness):
        raise ValueError(f"likeness must be one of {', '.join(get_args(Likeness))}, not {likeness!r}")
    vectors = adapters_of(bank, model)
    layers = [layer for layer in vectors.layers() if layer in vectors.shapes]
    if not layers:
        raise ValueError("the adapters adapt no layer of this model: they are of another base")
    alike = update_cosines if likeness == "update" else tensor_cosines
    found = [alike(vectors.factors(list(bank), layer, vectors.shapes[layer])) for layer in layers]
    total = torch.stack(found).sum(0)
    return total / len(layers) if likeness == "update" else total


def update_cosines(parts: Sequence[Factors]) -> Tensor:
    """The cosines of the ΔW_i = B_i diag(s_i) A_i of one layer, [n, n] float64; 0 beside one that is 0.

    ⟨ΔW_i, ΔW_j⟩ = Σ (A_i A_jᵀ) ⊙ (B_iᵀ B_j): no ΔW is built, and A → R A, B → B R⁻¹ changes nothing.

    Args:
        parts: Of n adapters.
    """
    A = torch.cat([part.A.double() for part in parts])
    B = torch.cat([(part.B * part.s).double() for part in parts], dim=1)
    of = torch.repeat_interleave(torch.eye(len(parts)).double(), torch.tensor([part.rank for part in parts]), dim=1)
    inner = of @ ((A @ A.mT) * (B.mT @ B)) @ of.mT
    norms = inner.diagonal().clamp_min(0).sqrt()
    norms = torch.where(norms > 0, norms, torch.inf)
    return inner / (norms[:, None] * norms)


def tensor_cosines(parts: Sequence[Factors]) -> Tensor:
    """|cos(A_i, A_j)| + |cos(B_i, B_j)| of one layer, [n, n] float64, as the authors' code has it.

    Args:
        parts: Of n adapters of one rank.

    Raises:
        ValueError: Their ranks differ.
    """
    ranks = [part.rank for part in parts]
    if len(set(ranks)) > 1:
        raise ValueError(f'adapters of ranks {ranks} on one layer are compared by likeness="update" alone')
    stacks = ([part.A for part in parts], [part.B for part in parts])
    rows = [F.normalize(torch.stack(stack).double().flatten(1), dim=1) for stack in stacks]
    return sum((row @ row.mT).abs() for row in rows)


def augment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shots: Sequence[Example],
    pool: Sequence[Example],
    *,
    count: int = 1000,
    scorer: Scorer = "max-cosine",
    threshold: float = 0.9,
    bandwidth: float = 2.0,
    encoder: Encoder | None = None,
    prefix: str = PREFIX,
    max_length: int = 512,
    seed: int = 0,
) -> list[Example]:
    """The open examples that are nearest to the shots and do not repeat each other, nearest first, then the shots.

    The paper takes the largest cosine to a shot, its code the distance to the shots' mean (`scorer="centroid"`); it
    also tries their convex hull and their density. The threshold belongs to an encoder: the authors' 0.9 is BGE's
    (which reads the first hidden state, where `SentenceEncoder` takes the mean), and texts are far more alike to a
    model that was not trained to compare them.

    Args:
        model: Its own mean hidden states encode the texts where no encoder is given.
        tokenizer: The model's.
        shots: K checked examples.
        pool: Open ones.
        count: C, the nearest that are taken before repetitions go.
        scorer: See `folklora.selection.nearness`.
        threshold: τ, the cosine above which an example repeats a nearer one; 1 keeps all.
        bandwidth: Of the density.
        encoder: What makes a vector of a text, such as a `SentenceEncoder`.
        prefix: Put before each text.
        max_length: Tokens of a text; longer ones are cut on the left.
        seed: Of "density".

    Raises:
        ValueError: There are no shots; see `folklora.selection.near_and_diverse` too.
    """
    if not shots:
        raise ValueError("open examples are compared with those of the task, and there are none")
    texts = [f"{prefix}{example.prompt}{example.completion}" for example in (*shots, *pool)]
    vectors = encode_prompts(model, tokenizer, encoder or BaseEncoder(model), texts, max_length)
    options = {"scorer": scorer, "threshold": threshold, "bandwidth": bandwidth}
    generator = torch.Generator().manual_seed(seed)
    chosen = near_and_diverse(vectors[len(shots) :], vectors[: len(shots)], count, generator=generator, **options)
    return [*(pool[index] for index in chosen.tolist()), *shots]
