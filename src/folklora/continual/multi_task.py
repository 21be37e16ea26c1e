"""Multi-task: all tasks at once, the usual upper bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from folklora.continual.base import ContinualMethod
from folklora.stream.tasks import Example, Task


@dataclass
class MultiTask(ContinualMethod):
    r"""One adapter trained on the shuffled union of all tasks' examples, each example once an epoch.

    As many optimiser steps as a sequence takes over the same tasks; tasks are drawn in proportion to their size. Only
    the last row of its accuracy matrix exists, so measures that need other rows, such as forgetting, are empty.

    Source: reference row "MTL" in Wang et al. 2023, arXiv 2310.14152.

    When to choose:
        Where all tasks are there at once, and as the upper bound of a stream over them. A new task means training on
        everything again.

    Equation:
        L = \sum_{t=1}^{T} \sum_{z \in D_t} \ell(z)

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        run = learn(model_folder(), tasks, method="multi-task", out="runs/multi-task", options=options)
        print(run.results["methods"]["multi-task"]["average_accuracy"])

    Args:
        adapter: The adapter, of rank r (not r times the number of tasks); LoRA by default.
    """

    method: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "reference in Wang et al. 2023, arXiv 2310.14152"
    trains: ClassVar[str] = "one adapter on all tasks at once"
    joint: ClassVar[bool] = True

    def examples(self, tasks: Sequence[Task], index: int, seed: int) -> list[Example]:
        """Every task's examples, in an order that does not depend on the tasks' order."""
        return [example for task in sorted(tasks, key=lambda task: task.name) for example in task.train]
