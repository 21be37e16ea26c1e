"""IncLoRA: a new adapter for each task, the old ones frozen, all outputs summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftModel

from folklora.continual.base import AdapterPerTask


@dataclass
class IncLoRA(AdapterPerTask):
    r"""W_t = W₀ + Σ_{i ≤ t} s B_i A_i, of which only task t's A_t, B_t are trained.

    Old parameters are protected, old behaviour is not: every LoRA acts on every input. It is AM-LoRA with every gate
    at 1, and O-LoRA without its penalty. r (in + out) trained parameters a weight and task.

    Source: baseline of Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP
    Findings 2023, arXiv 2310.14152.

    When to choose:
        As a baseline: it shows what keeping the old parameters alone is worth. All adapters act on all inputs, so tasks
        whose answers contradict each other disturb one another; `am-lora` chooses among them.

    Equation:
        W_t = W_0 + \sum_{i \leq t} s\,B_i A_i

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        run = learn(model_folder(), tasks, method="inc-lora", out="runs/inc-lora", options=options)
        print(run.results["methods"]["inc-lora"]["average_accuracy"])

    Args:
        adapter: The adapter of each task; LoRA by default.
    """

    method: ClassVar[str] = "inc-lora"
    paper: ClassVar[str] = "baseline in Wang et al. 2023, arXiv 2310.14152"
    trains: ClassVar[str] = "a new adapter a task; all are summed"

    def activate(self, model: PeftModel, index: int) -> None:
        """All adapters so far."""
        model.base_model.set_adapter([f"task_{i}" for i in range(index + 1)])
