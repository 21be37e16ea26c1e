"""What a continual-learning method is: how it prepares for a task, what it trains on, how it answers afterwards."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters import LoRA
from folklora.continual.overlap import reading_overlap
from folklora.stream.tasks import Example, Task

OBSERVED = 48
"""Test prompts of a task that the report's shares are the mean over."""


@dataclass(frozen=True)
class Phase:
    """One of the trainings that a task takes, each with a new optimiser.

    Args:
        name: What it is called while it runs; none where a task takes one alone.
        epochs: Passes over the task's examples; None takes the stream's settings.
        learning_rate: None takes the stream's settings.
    """

    name: str = ""
    epochs: float | None = None
    learning_rate: float | None = None


@dataclass
class ContinualMethod:
    """A way of learning a stream of tasks over any adapter method.

    The stream calls, for each task: `prepare`; for each of its `phases`, `enter` and training on `examples` with
    `begin` before its first step and `penalty` in the loss; `finish`, and `kept` for the old examples that stay;
    `route` before each evaluation; and `measures` for the report. A run that was stopped begins its task anew. Where
    `reads_logits`, `logits_penalty` is in the loss as well. A method overrides what it does differently; the base
    class trains one adapter on and on.

    Args:
        adapter: Options of the adapter that is trained, any `peft.PeftConfig`.
    """

    adapter: PeftConfig = field(default_factory=LoRA)

    method: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    trains: ClassVar[str] = ""
    knows_task: ClassVar[bool] = False
    """Whether `route` uses the task's identity, which the other methods do not see."""
    joint: ClassVar[bool] = False
    """Whether all tasks are learnt in one stage."""
    max_length: ClassVar[int] = 512
    """Tokens of prompt and answer together that training reads; the stream sets it to that of its settings."""

    def start(self, model: PreTrainedModel, adapter_name: str = "default") -> PeftModel:
        """Put the first adapter on the base model."""
        config = copy.deepcopy(self.adapter)
        if config.task_type is None:
            encoder_decoder = bool(model.config.is_encoder_decoder)
            config.task_type = TaskType.SEQ_2_SEQ_LM if encoder_decoder else TaskType.CAUSAL_LM
        return get_peft_model(model, config, adapter_name=adapter_name)

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Make the model ready to learn task number `index` (from 0); called before its training."""

    @property
    def phases(self) -> Sequence[Phase]:
        """The trainings of each task, in order."""
        return (Phase(),)

    def enter(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int, phase: int
    ) -> None:
        """Make the model ready for number `phase` of the `phases` of task number `index`, both from 0."""

    def examples(self, tasks: Sequence[Task], index: int, seed: int) -> list[Example]:
        """What to train on for task number `index`.

        Args:
            tasks: The whole stream; a method may look back, and never ahead unless it is `joint`.
            index: The task that is learnt now.
            seed: Of the run; whatever is drawn depends on it and on the task alone.
        """
        return list(tasks[index].train)

    def kept(self, tasks: Sequence[Task], index: int, seed: int) -> list[Example]:
        """The examples of old tasks that later ones will be trained on; called after the training of task `index`.

        The stream stores them beside what `finish` gives, and counts their bytes.

        Args:
            tasks: The whole stream.
            index: The task that was learnt last.
            seed: As for `examples`.
        """
        return []

    def begin(self, model: PeftModel, steps: int) -> None:
        """Told just before the first step of a task's training how many optimizer steps there will be."""

    def penalty(self, model: PeftModel) -> Tensor | None:
        """What is added to the loss of every micro-batch beside the adapters' own penalties."""
        return None

    @property
    def reads_logits(self) -> bool:
        """Whether there is a `logits_penalty` at present; only then does training hold the logits."""
        return False

    def logits_penalty(self, model: PeftModel, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
        """What is added to the loss of a micro-batch because of what the model answers in it.

        Args:
            model: It has just answered; it may be run again.
            inputs: What it was called with, and labels; -100 is the label of a position that is not learnt.
            logits: Its answer, [rows, positions, vocabulary].

        Returns:
            A mean over the positions that are learnt.
        """
        raise NotImplementedError

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """What is carried on to the later tasks beside the adapters; called after the training of task `index`."""
        return {}

    def measures(self, model: PeftModel, index: int) -> dict[str, float]:
        """What the method measures of itself once task `index` is learnt, by name, for the results and the report."""
        return {}

    def changed(self, model: PeftModel, index: int) -> Collection[str]:
        """Names of the adapters that learning task `index` may have changed; the others' files are not written anew."""
        return list(model.peft_config)

    def resume(self, model: PeftModel, index: int, carried: dict[str, Tensor]) -> None:
        """Put the model, with its adapters loaded, into its state after task `index` was finished."""

    def route(self, model: PeftModel, task: int, trained: int) -> None:
        """Set the model to answer task number `task`, after `trained` tasks were learnt."""

    def observe(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
    ) -> dict[str, Any] | None:
        """What the report shows of the method's inner choices: the mean of `explain` over up to 48 test prompts a task.

        Returns:
            "layers", "slots" and "tasks" are names, "mean" [tasks][layers][slots]; None where there are no choices.
        """
        names, mean = [task.name for task in tasks], []
        for task in tasks:
            found = self.explain(model, tokenizer, [example.prompt for example in task.test[:OBSERVED]], names)
            if found is None:
                return None
            parts = torch.tensor(found["weights"], dtype=torch.float64).mean(0)
            mean.append([[round(value, 6) for value in row] for row in parts.tolist()])
        return {"layers": found["layers"], "slots": found["slots"], "tasks": names, "mean": mean}

    def explain(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tasks: Sequence[str]
    ) -> dict[str, Any] | None:
        """How much what was learnt in each task takes part in the answer to each prompt.

        Args:
            model: With the adapters that were learnt.
            tokenizer: Its tokenizer.
            prompts: What is asked.
            tasks: Names of the tasks that were learnt.

        Returns:
            "layers" and "slots" are names, "weights" [prompts][layers][slots] numbers from 0 to 1; a slot is a task,
            or a part that tasks share. None where the method does not choose by the prompt.
        """
        return None


@dataclass
class AdapterPerTask(ContinualMethod):
    """Shared by the methods that add an adapter for each task, or several; they are named task_0, task_1, ..."""

    def names(self, index: int) -> list[str]:
        """The adapters of task number `index`."""
        return [f"task_{index}"]

    def start(self, model: PreTrainedModel, adapter_name: str | None = None) -> PeftModel:
        """Put the first task's (first) adapter on the base model."""
        return super().start(model, adapter_name or self.names(0)[0])

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Add the task's adapters; only they are trained."""
        own = self.names(index)
        for name in own:
            if name not in model.peft_config:
                config = copy.deepcopy(self.adapter)
                config.task_type = next(iter(model.peft_config.values())).task_type
                model.add_adapter(name, config)
        self.activate(model, index)
        others = [other for other in model.peft_config if other not in own]
        model.set_requires_grad(others, requires_grad=False)
        model.set_requires_grad(own, requires_grad=True)

    def measures(self, model: PeftModel, index: int) -> dict[str, float]:
        """How far what the task's adapters read overlaps with what older ones read; see `reading_overlap`."""
        return reading_overlap(model, self.names(index), [name for task in range(index) for name in self.names(task)])

    def changed(self, model: PeftModel, index: int) -> Collection[str]:
        """The task's own; the older ones are frozen."""
        return self.names(index)

    def resume(self, model: PeftModel, index: int, carried: dict[str, Tensor]) -> None:
        """Nothing of the past is trained again."""
        self.activate(model, index)
        model.set_requires_grad(list(model.peft_config), requires_grad=False)

    def activate(self, model: PeftModel, index: int) -> None:
        """Choose the adapters that take part while task `index` is learnt."""
        raise NotImplementedError
