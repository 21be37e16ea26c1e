"""SeqLoRA: one adapter trained on one task after another, nothing protected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from folklora.continual.base import ContinualMethod


@dataclass
class SeqLoRA(ContinualMethod):
    r"""The same adapter is trained on task 1, 2, ..., T in turn: the lower bound that shows forgetting.

    W = W₀ + s B A; for each task training of the same A, B goes on with a new optimiser; no memory, no penalty.
    r (in + out) trained parameters a weight, whatever the number of tasks.

    Source: baseline of Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP
    Findings 2023, arXiv 2310.14152.

    When to choose:
        As the row that every other method must beat, and to see how much a stream makes a model forget. For use only
        where old tasks do not matter any more.

    Equation:
        W = W_0 + s\,B A

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        run = learn(model_folder(), tasks, method="seq-lora", out="runs/seq-lora", options=options)
        print(run.results["methods"]["seq-lora"]["average_accuracy"])

    Args:
        adapter: The adapter; LoRA by default.
    """

    method: ClassVar[str] = "seq-lora"
    paper: ClassVar[str] = "baseline in Wang et al. 2023, arXiv 2310.14152"
    trains: ClassVar[str] = "one adapter, on and on"
