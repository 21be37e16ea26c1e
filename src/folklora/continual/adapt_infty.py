"""Adapt-∞: before each task a small part of the old and new examples is chosen by the model that will learn it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from folklora.continual.base import ContinualMethod
from folklora.continual.scores import SCORES, VECTORS, Measure, Measured, without_passage
from folklora.selection import coverage_sample, deduplicate, kmeans, random_sample, sharpest, water_filling
from folklora.stream.tasks import Example, Task

Place = tuple[int, int]
"""Where an example is: the number of its task, and its row in the task's training examples."""


@dataclass
class AdaptInfty(ContinualMethod):
    r"""Adapt-∞: choose what to learn from all that is there, skill by skill, and throw away what is redundant.

    One adapter is trained on and on, as in SeqLoRA. Before task t the candidates are the pool of old examples P_{t-1}
    and the new ones D_t, and the model f_{t-1} measures each of them, in evaluation mode:
    1. Vector: the gradient of the example's loss by the trained parameters of the middle block of layers, projected by
       random signs to `proj_dim` numbers, at length 1. Scores, from the same pass over the answer's tokens:
       "perplexity", log mean 1 / p(token); "el2n", mean ‖onehot - softmax‖₂; "entropy", the mean token entropy;
       "grand", the gradient's norm; "grounding", below.
    2. Skills: k-means of the vectors into `n_clusters` clusters.
    3. Pool: P_t = in each cluster the examples that repeat earlier ones the least (SemDeDup, by the cosine of their
       vectors), `pool` in all, shared out over the clusters as equally as their sizes allow (water-filling).
    4. Selector: in each cluster the score whose standardised histogram (50 bins from -4 to 4) has the most entropy.
    5. Training: `budget` examples of P_t in all, shared out likewise; in each cluster drawn evenly over the range of
       its selector's score, the 5 % at either end left out (CCS).
    So the old examples that are trained again are chosen by what the model finds of them now. Each task costs a
    forward pass over pool + new data and a backward pass down to the block, in batches, and the block's adapted layers
    once more for each example; "grounding" adds a forward pass for each answer that a task's examples differ in.

    The paper is about images, and its own score, image grounding, is the perplexity without the image over that with
    it. "grounding" is the same for text: a task's prompts without what differs between them, that is the template
    without the passage. It is above 1 where the passage helps, 1 where it is ignored; clusters with examples whose
    prompts have nothing in common do without it. Other departures: shares sum to the budget, where the authors' code
    rounds each up; the histogram's edges are those of standardised scores; a quantile cut is narrowed where the
    budget would not be reached. Vectors are made anew at each task, since old ones are stale. `sampling` "random" and a
    single selector are the paper's ablations, as are the other kinds of vectors. The published code has no driver: the
    order of the steps is that of its parts' inputs and of the abstract.

    What is kept is the pool: which examples are in it, two numbers each, and their texts, saved with each task.

    Source: Maharana, Yoon, Chen, Bansal, "Adapt-∞: Scalable Continual Multimodal Instruction Tuning via Dynamic Data
    Selection", ICLR 2025, arXiv 2410.10636.

    When to choose:
        Old examples may be kept, data sets are large and overlap, and training time is what is short: the cost of a
        task does not grow with the stream. Where everything old fits beside the new task, `replay` is simpler. Each
        task's data should be much larger than `budget`, or there is little to choose.

    Equation:
        \mathrm{IG}(z) = \mathrm{PPL}(y \mid q) / \mathrm{PPL}(y \mid q, \text{passage})
        s^*_c = \arg\max_{s} H\!\left( \mathrm{hist}(s(z) : z \in c) \right)
        \sum_c \min(\lvert c \rvert, \ell) = N

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "budget": 12, "pool": 20, "n_clusters": 3}
        run = learn(model_folder(), tasks, method="adapt-infty", out="runs/adapt-infty", options=options)
        print(run.results["methods"]["adapt-infty"]["average_accuracy"])

    Args:
        adapter: The adapter; LoRA by default.
        budget: N, examples that a task trains on, old and new; the paper's is 25,000.
        pool: Examples that are kept, at least `budget`.
        n_clusters: Skills.
        selectors: The scores to choose from; a single one is no choice.
        sampling: "coverage" is CCS; "random" passes over the scores.
        vectors: "gradient"; "sign", the signs of it; or "zero-order", an estimate from `probes` pairs of losses.
        proj_dim: Numbers of a projected vector; gradients with fewer are taken as they are.
        gradient_block: Number of the block of layers whose gradient is taken, from 0; None takes the middle one.
        probes: Random directions of "zero-order".
    """

    budget: int = 500
    pool: int = 2000
    n_clusters: int = 10
    selectors: Sequence[str] = field(default_factory=lambda: list(SCORES))
    sampling: Literal["coverage", "random"] = "coverage"
    vectors: Literal["gradient", "sign", "zero-order"] = "gradient"
    proj_dim: int = 8192
    gradient_block: int | None = None
    probes: int = 16

    method: ClassVar[str] = "adapt-infty"
    paper: ClassVar[str] = "Maharana et al. 2024, arXiv 2410.10636"
    trains: ClassVar[str] = "one adapter on chosen old and new examples"

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in ("budget", "n_clusters", "proj_dim", "probes")
            if getattr(self, name) < 1
        ]
        if self.pool < self.budget:
            problems.append(f"pool must be at least budget ({self.budget}), which is drawn from it, not {self.pool}")
        unknown = [name for name in self.selectors if name not in SCORES]
        if unknown or not self.selectors:
            problems.append(f"selectors must be some of {', '.join(SCORES)}, not {list(self.selectors)}")
        elif list(self.selectors) == ["grounding"]:
            problems.append("selectors needs another one beside grounding, for prompts that have nothing in common")
        for name, choices in (("sampling", ("coverage", "random")), ("vectors", VECTORS)):
            if getattr(self, name) not in choices:
                problems.append(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if problems:
            raise ValueError("\n".join(problems))
        self._pool: list[Place] = []
        self._chosen: tuple[int, list[Place]] | None = None

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Measure the pool and the new examples, choose what is trained, and prune the pool."""
        candidates = [*self._pool, *((index, row) for row in range(len(tasks[index].train)))]
        # the stream seeds the generator for each task
        seed = int(torch.randint(2**31, ()))
        found = self._measured(model, tokenizer, tasks, candidates, seed)
        kept, chosen = self.choose(found, torch.Generator().manual_seed(seed))
        places = [[candidates[i] for i in rows.tolist()] for rows in (kept, chosen)]
        # rounding may differ between devices, and all processes have to train on the same
        self._pool, drawn = broadcast_object_list(places)
        self._chosen = index, drawn

    def _measured(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        candidates: Sequence[Place],
        seed: int,
    ) -> Measured:
        examples = [tasks[task].train[row] for task, row in candidates]
        without: list[Example | None] = [None] * len(examples)
        if "grounding" in self.selectors:
            for task in {task for task, _ in candidates}:
                rows = [i for i, place in enumerate(candidates) if place[0] == task]
                for i, bare in zip(rows, without_passage([examples[i] for i in rows]), strict=True):
                    without[i] = bare
        measure = Measure(self.max_length, self.vectors, self.proj_dim, self.gradient_block, self.probes, seed)
        return measure.of(model, tokenizer, examples, without)

    def choose(self, found: Measured, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which of the measured candidates are kept, and which of those are trained on; indices, ascending.

        Args:
            found: What was measured, older candidates first.
            generator: On the CPU.
        """
        labels = kmeans(found.vectors, self.n_clusters, generator)
        clusters = [(labels == label).nonzero().flatten() for label in labels.unique()]
        room = water_filling([len(rows) for rows in clusters], self.pool)
        clusters = [rows[deduplicate(found.vectors[rows], keep)] for rows, keep in zip(clusters, room, strict=True)]
        shares = water_filling([len(rows) for rows in clusters], self.budget)
        chosen = [rows[self._draw(found, rows, n, generator)] for rows, n in zip(clusters, shares, strict=True)]
        return torch.cat(clusters).sort().values, torch.cat(chosen).sort().values

    def _draw(self, found: Measured, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
        own = {name: found.scores[name][rows] for name in self.selectors}
        scores = own[sharpest(own)]
        draw = coverage_sample if self.sampling == "coverage" else random_sample
        return draw(scores, count, generator)

    def examples(self, tasks: Sequence[Task], index: int, seed: int) -> list[Example]:
        """What was chosen for the task; all of it where nothing is chosen yet, as for an adapter's statistics."""
        if self._chosen is None or self._chosen[0] != index:
            return list(tasks[index].train)
        return [tasks[task].train[row] for task, row in self._chosen[1]]

    def kept(self, tasks: Sequence[Task], index: int, seed: int) -> list[Example]:
        """The pool."""
        return [tasks[task].train[row] for task, row in self._pool]

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """The pool: task and row of each example."""
        return {"pool": torch.tensor(self._pool)}

    def resume(self, model: PeftModel, index: int, carried: dict[str, Tensor]) -> None:
        """Take up the pool."""
        self._pool = [(task, row) for task, row in carried["pool"].tolist()]
