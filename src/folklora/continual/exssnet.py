"""ExSSNeT over a stream: a mask a task, weights that no other task trains, and scores taken over from like tasks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.exssnet import ExSSNeT, choose_task, fix_mask, next_task
from folklora.adapters.host.layer import updates_of
from folklora.continual.answers import prompt_inputs
from folklora.continual.base import ContinualMethod, Phase
from folklora.stream.tasks import Task

_TRANSFERS = ("best", "always", "all", "none")
_FITTED = 0.66


@dataclass
class ExSSNeTStream(ContinualMethod):
    r"""Exclusive supermask subnetworks with KNN-based knowledge transfer: nothing that an old task uses is changed.

    Task t takes two phases, each with a new optimiser:
    - mask: scores S_t are trained, and with them which share `density` of each target's weights the task uses, M_t;
    - weights: of M_t's weights, those that no earlier mask has are trained, E_t = M_t ∧ ¬(M_1 ∨ ... ∨ M_{t-1}).
    Task i computes with (W + D) ⊙ M_i, which later tasks never change: its answers stay, to the bit. The task is known
    at test time; tasks not yet learnt are answered by the base model. `weight_epochs` 0 is SupSup. What the adapter
    does, and how a pretrained W differs from the paper's random network: `folklora.ExSSNeT`.

    Transfer before task t > 1: a share of its training prompts is read with each earlier mask, and what the output
    head is given at the last token is kept. On 66 % of it nearest neighbours (Euclidean, a majority vote, of equal
    votes the answer that sorts first) are found for the others; a_i is how often the vote is right. "best": S_t starts
    from the scores of the task with the highest a_i, if that is above chance, 1 / (number of the task's answers);
    "always" asks for no chance; "all" takes the mean of all above chance. Otherwise, and with "none", S_t is drawn.
    The more masks overlap, the less is left to train: see |E_t| in the saved adapter's `counts`.

    On the demo's first two tasks (120 examples, 3 epochs, query and value projections) density 0.1 hardly learnt, while
    0.5 with a `mask_learning_rate` of 0.01 and a learning rate of 0.001 did.

    Of `neighbours` at most a fifth of the examples vote (ours: with the authors' 200 and few examples all would).
    Old scores, which "none" does without, are carried to later tasks: as many numbers as the targets have, a task.
    Set weight_decay to 0, as it is by default: it would pull scores and D to 0, though no earlier task's.

    Source: Yadav and Bansal, "Exclusive Supermask Subnetwork Training for Continual Learning", ACL Findings 2023,
    arXiv 2210.10209.

    When to choose:
        The task is known at test time, nothing may be forgotten, and one network of fixed size is to hold all tasks. A
        LoRA a task (`per-task`) forgets nothing either and leaves a pretrained weight whole.

    Equation:
        f_t(x) = f(x; (W + D) \odot M_t)
        D \leftarrow D - \eta \, E_t \odot \nabla_D L_t, \quad E_t = M_t \wedge \neg \bigvee_{i<t} M_i

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"density": 0.5, "target_modules": ["q_proj", "v_proj"], "mask_learning_rate": 0.01}
        run = learn(model_folder(), tasks, method="exssnet", out="runs/exssnet", options=options)
        print(run.results["methods"]["exssnet"]["average_accuracy"])

    Args:
        adapter: The ExSSNeT adapter of all tasks.
        transfer: Where a task's scores start: "best", "always", "all" or "none".
        neighbours: How many neighbours vote.
        transfer_share: Share of a task's training examples that transfer is judged on.
        mask_epochs: Epochs of the mask phase; None takes those of the training.
        weight_epochs: Epochs of the weights phase; None takes those of the training, 0 leaves it out.
        mask_learning_rate: Learning rate of the scores; None takes that of the training.
    """

    adapter: ExSSNeT = field(default_factory=ExSSNeT)
    transfer: Literal["best", "always", "all", "none"] = "best"
    neighbours: int = 200
    transfer_share: float = 0.2
    mask_epochs: float | None = None
    weight_epochs: float | None = None
    mask_learning_rate: float | None = None

    method: ClassVar[str] = "exssnet"
    paper: ClassVar[str] = "Yadav and Bansal 2023, arXiv 2210.10209"
    trains: ClassVar[str] = "a mask a task and its own weights; the task is known"
    knows_task: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, ExSSNeT):
            raise ValueError(f"exssnet needs an ExSSNeT adapter, not {type(self.adapter).__name__}")
        if not self.adapter.searching or self.adapter.counts:
            raise ValueError("exssnet sets searching and counts as the stream goes by: leave them out")
        if self.transfer not in _TRANSFERS:
            raise ValueError(f"transfer must be {', '.join(_TRANSFERS[:-1])} or none, not {self.transfer!r}")
        if self.neighbours < 1 or not 0 < self.transfer_share <= 1:
            raise ValueError(
                "neighbours must be at least 1 and transfer_share above 0 and at most 1, "
                f"not {self.neighbours} and {self.transfer_share}"
            )
        for name in ("mask_epochs", "mask_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if self.weight_epochs is not None and self.weight_epochs < 0:
            raise ValueError(f"weight_epochs must be at least 0, not {self.weight_epochs}")
        self._scores: dict[str, Tensor] = {}

    @property
    def phases(self) -> Sequence[Phase]:
        """The mask, then the weights."""
        mask = Phase("mask", self.mask_epochs, self.mask_learning_rate)
        return (mask,) if self.weight_epochs == 0 else (mask, Phase("weights", self.weight_epochs))

    def start(self, model: PreTrainedModel, adapter_name: str = "default") -> PeftModel:
        """Put the adapter on the base model, with the first task's scores."""
        self._scores = {}
        return super().start(model, adapter_name)

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Begin the task's scores, from those of earlier tasks that its inputs are told apart by."""
        model.base_model.enable_adapter_layers()
        if index > 0:
            next_task(model, self.transferred(model, tokenizer, tasks, index))

    def enter(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int, phase: int
    ) -> None:
        """Fix the mask before the weights are trained."""
        if phase == 1:
            self._fix(model, index)

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """The scores of all tasks so far, where later ones may start from them."""
        if model.peft_config["default"].searching:
            self._fix(model, index)
        return dict(self._scores)

    def resume(self, model: PeftModel, index: int, carried: dict[str, Tensor]) -> None:
        """Take up what `finish` gave."""
        self._scores = dict(carried)

    def route(self, model: PeftModel, task: int, trained: int) -> None:
        """The task's own mask, or the base model if it was not learnt yet."""
        if task < trained:
            model.base_model.enable_adapter_layers()
            choose_task(model, task)
        else:
            model.base_model.disable_adapter_layers()

    def transferred(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor] | None:
        """The scores that task `index` starts from, by layer; None where they are to be drawn."""
        if self.transfer == "none":
            return None
        rates = self.transfer_rates(model, tokenizer, tasks, index)
        answers = tasks[index].labels or {example.completion for example in tasks[index].train}
        sources = [i for i, rate in enumerate(rates) if self.transfer == "always" or rate > 1 / len(answers)]
        if not sources:
            return None
        if self.transfer != "all":
            sources = [max(sources, key=lambda i: rates[i])]
        names = [layer.name for layer, _ in updates_of(model, "default")]
        return {name: torch.stack([self._scores[f"{i}.{name}"] for i in sources]).mean(0) for name in names}

    def transfer_rates(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> list[float]:
        """a_i of each earlier task: how well its network's features tell the answers of task `index`."""
        task = tasks[index]
        count = min(len(task.train), math.ceil(self.transfer_share * len(task.train)) + 1)
        drawn = random.Random(f"transfer:{task.name}").sample(task.train, count)
        answers = sorted({example.completion for example in drawn})
        labels = torch.tensor([answers.index(example.completion) for example in drawn])
        rates = []
        for i in range(index):
            choose_task(model, i)
            features = read(model, tokenizer, [example.prompt for example in drawn])
            rates.append(self.vote_rate(features, labels))
        return rates

    def vote_rate(self, features: Tensor, labels: Tensor) -> float:
        """How often the nearest of the first 66 % of the points, [n, d] with labels [n], are right about the others."""
        fitted = max(1, int(_FITTED * len(labels)))
        if fitted == len(labels):
            return 0.0
        votes = min(self.neighbours, max(1, fitted // 5))
        found = nearest_vote(features[:fitted], labels[:fitted], features[fitted:], votes)
        return float((found == labels[fitted:]).double().mean())

    def _fix(self, model: PeftModel, index: int) -> None:
        if self.transfer != "none":
            for layer, update in updates_of(model, "default"):
                self._scores[f"{index}.{layer.name}"] = update.scores.detach().clone()
        fix_mask(model)


@torch.no_grad()
def read(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """What the output head is given at the end of each prompt, [prompts, width], float32 on the CPU."""
    training = model.training
    model.eval()
    key = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
    try:
        outputs = (
            model(**prompt_inputs(model, tokenizer, prompt), output_hidden_states=True, use_cache=False)
            for prompt in prompts
        )
        return torch.stack([output[key][-1][0, -1].float().cpu() for output in outputs])
    finally:
        model.train(training)


def nearest_vote(known: Tensor, labels: Tensor, asked: Tensor, votes: int) -> Tensor:
    """The label that most of the nearest known points have, for each point asked; of equal counts the lowest.

    Args:
        known: [n, d].
        labels: [n], whole numbers from 0.
        asked: [m, d].
        votes: How many neighbours vote, at most n.
    """
    distances = torch.cdist(asked.double(), known.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.argsort(dim=1, stable=True)[:, :votes]
    counts = torch.nn.functional.one_hot(labels[nearest], int(labels.max()) + 1).sum(1)
    return counts.argmax(1)
