"""CoDyRA over a stream: each task is learnt with as few components as it needs, which are then kept for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from folklora.adapters.codyra import CoDyRA, compact, next_task, set_steps
from folklora.continual.base import ContinualMethod
from folklora.stream.tasks import Task


@dataclass
class CoDyRAStream(ContinualMethod):
    r"""Continual dynamic rank-selective LoRA: each task learns an update of as low a rank as it needs, which is kept.

    W_t = W₀ + B' A' + B (w ⊙ A): A [r, in], B [out, r] and the gates w [r] are the task's; thresholds κ that rise over
    its steps shrink the gates after each optimizer step, see the adapter, `folklora.CoDyRA`. At the end of a task the
    components whose gate is 0 are dropped. When the next task comes, the others are appended to A' and B', which are
    frozen, and A, B, w start anew at full rank, where they add nothing. The paper adds them to W; here W₀ is never
    written to, and the function is the same. No replay, no task id, no choice at test time: all that is kept acts on
    every input, and it merges into one plain model.

    A' and B' grow by the components that survive, and never hold more than min(in, out) of them, as many numbers as W
    and an identity. r (in + out + 1) trained parameters a weight and task.

    The stream counts the steps of each task and spreads the thresholds over them. κ is absolute: over T steps the
    thresholds sum to about `kappa_max` T / 4, which with the paper's T = 500 is 0.65, where half of the gates that
    learn nothing vanish. So a task of fewer steps needs a larger `kappa_max` for the same. The authors train with
    AdamW, betas (0.9, 0.9999), and a cosine schedule; the stream's AdamW has (0.9, 0.999), and its schedule is an
    option.

    Source: Lu, Zhao, Xue, Yao, Moore, Gong, "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual
    Learning Vision-Language Models with Dynamic Rank-Selective LoRA", 2024, arXiv 2412.01004.

    When to choose:
        One plain model has to come out of the stream, no old examples may be kept, and what the base model knew has
        to stay. It moves the weights less than `seq-lora` does and so forgets less; a task that needs a large change
        is learned less well. The thresholds want some hundred steps a task.

    Equation:
        W_t = W_0 + \sum_{k < t} \sum_{i : w_{k,i} \neq 0} w_{k,i} B_{k,:,i} A_{k,i,:} + B_t \, \mathrm{diag}(w_t) A_t
        w \leftarrow \mathrm{sign}(w) \max(|w| - \kappa_j, 0)

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "kappa_max": 0.5, "batch_size": 2}
        run = learn(model_folder(), tasks, method="codyra", out="runs/codyra", options=options)
        print(run.results["methods"]["codyra"]["stored_parameters"])

    Args:
        adapter: The adapter; its `steps` is set by the stream.
    """

    adapter: CoDyRA = field(default_factory=CoDyRA)

    method: ClassVar[str] = "codyra"
    paper: ClassVar[str] = "Lu et al. 2024, arXiv 2412.01004"
    trains: ClassVar[str] = "A, B, gates that shrink; what survives is kept"

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, CoDyRA):
            raise ValueError(f"codyra needs a CoDyRA adapter, not {type(self.adapter).__name__}")
        if self.adapter.steps != CoDyRA().steps:
            raise ValueError("codyra spreads its thresholds over the steps that a task has: leave steps out")

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Keep what the last task left, and start anew at full rank."""
        if index > 0:
            next_task(model)

    def begin(self, model: PeftModel, steps: int) -> None:
        """Spread the thresholds over the task's steps."""
        set_steps(model, steps)

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """Drop the components that the thresholds closed."""
        compact(model)
        return {}
