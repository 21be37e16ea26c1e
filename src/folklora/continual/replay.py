"""Replay: a small memory of every old task is mixed into later training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from folklora.continual.base import ContinualMethod
from folklora.stream.tasks import Example, Task


@dataclass
class Replay(ContinualMethod):
    r"""Task t is trained on D_t and the memories M_1, ..., M_{t-1}, shuffled; M_i is a random part of D_i.

    |M_i| = max(1, memory · |D_i|), as evenly over the labels as the counts allow; drawn from training examples by the
    run's seed and the task's name, so that methods compared at one seed share their memories. One adapter is trained
    on and on, as in SeqLoRA. The memories are saved with each task, and their bytes count as stored.

    Source: baseline in Wang et al. 2023, arXiv 2310.14152; mixing as in the implementations of Razdaibiedina et al.,
    "Progressive Prompts", ICLR 2023, arXiv 2301.12314 (their memory is 1 %; the value behind the first is unknown).

    When to choose:
        Where some examples of each task may be kept: 2 % of them already hold back much of the forgetting, with any
        adapter and at no cost in use. Where old data must not be stored, it is out.

    Equation:
        L_t = \sum_{z \in D_t \cup M_1 \cup \ldots \cup M_{t-1}} \ell(z)
        \lvert M_i \rvert = \max(1, m \lvert D_i \rvert)

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "memory": 0.1}
        run = learn(model_folder(), tasks, method="replay", out="runs/replay", options=options)
        print(run.results["methods"]["replay"]["average_accuracy"])

    Args:
        adapter: The adapter; LoRA by default.
        memory: Share of each task that is kept.
        share: Share of the training examples that memories make up; above their natural share the memories are
            repeated to reach it. None mixes each once.
    """

    memory: float = 0.02
    share: float | None = None

    method: ClassVar[str] = "replay"
    paper: ClassVar[str] = "baseline in Wang et al. 2023, arXiv 2310.14152"
    trains: ClassVar[str] = "one adapter on new tasks and old examples"

    def __post_init__(self) -> None:
        if not 0 <= self.memory <= 1:
            raise ValueError(f"memory is the share of each task that is kept, from 0 to 1, not {self.memory}")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, not {self.share}")

    def examples(self, tasks: Sequence[Task], index: int, seed: int) -> list[Example]:
        """The task's own examples and the memories of the earlier tasks."""
        own = list(tasks[index].train)
        old = self.kept(tasks, index - 1, seed)
        if self.share is not None and old:
            wanted = round(self.share / (1 - self.share) * len(own))
            old = [old[i % len(old)] for i in range(max(wanted, len(old)))]
        return own + old

    def kept(self, tasks: Sequence[Task], index: int, seed: int) -> list[Example]:
        """The memories of the tasks so far."""
        return [example for task in tasks[: index + 1] for example in self.remember(task, seed)]

    def remember(self, task: Task, seed: int) -> list[Example]:
        """The memory of one task: label after label in turn, each label's examples in random order."""
        if self.memory == 0:
            return []
        draw = random.Random(f"{seed}:{task.name}")
        by_label: dict[str, list[Example]] = {}
        for example in task.train:
            by_label.setdefault(example.completion if task.labels else "", []).append(example)
        for examples in by_label.values():
            draw.shuffle(examples)
        queues = list(by_label.values())
        draw.shuffle(queues)
        size = max(1, int(self.memory * len(task.train)))
        taken: list[Example] = []
        while len(taken) < size:
            for queue in queues:
                if queue and len(taken) < size:
                    taken.append(queue.pop())
        return taken
