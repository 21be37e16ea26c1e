"""PerTask: an independent adapter for each task, chosen by a known task identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftModel

from folklora.continual.base import AdapterPerTask


@dataclass
class PerTask(AdapterPerTask):
    r"""Task i is learnt from W₀ by an adapter of its own and answered by that adapter: no interference, no transfer.

    An upper reference that is told at test time which task it is asked; tasks not yet learnt are answered by the base
    model. Backward transfer and forgetting are 0 by construction. r (in + out) trained parameters a weight and task.

    Source: reference row "PerTaskFT" in Wang et al. 2023, arXiv 2310.14152.

    When to choose:
        Where whoever asks also says which task it is: then nothing is forgotten. Otherwise as an upper reference for
        methods that are not told. No task learns from another.

    Equation:
        W_i = W_0 + s\,B_i A_i

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        run = learn(model_folder(), tasks, method="per-task", out="runs/per-task", options=options)
        print(run.results["methods"]["per-task"]["average_accuracy"])

    Args:
        adapter: The adapter of each task; LoRA by default.
    """

    method: ClassVar[str] = "per-task"
    paper: ClassVar[str] = "reference in Wang et al. 2023, arXiv 2310.14152"
    trains: ClassVar[str] = "a new adapter a task; the task is known"
    knows_task: ClassVar[bool] = True

    def activate(self, model: PeftModel, index: int) -> None:
        """The task's own adapter."""
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(f"task_{index}")

    def route(self, model: PeftModel, task: int, trained: int) -> None:
        """The task's own adapter, or none if it was not learnt yet."""
        if task < trained:
            self.activate(model, task)
        else:
            model.base_model.disable_adapter_layers()
