"""O-LoRA: IncLoRA whose new adapter is kept orthogonal to the old ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.host.layer import layers_of
from folklora.continual.inc_lora import IncLoRA
from folklora.continual.overlap import trained_rows
from folklora.stream.tasks import Task

_NORMS = {
    "l1": lambda old, new: (old @ new.T).abs().sum(),
    "l2": lambda old, new: (old @ new.T).square().sum(),
    "cosine": lambda old, new: (F.normalize(old, dim=1) @ F.normalize(new, dim=1).T).abs().sum(),
}


@dataclass
class OLoRA(IncLoRA):
    r"""Orthogonal LoRA: a new adapter for each task, pushed to read other directions than the old ones do.

    As in IncLoRA, W_t = W₀ + Σ_{i ≤ t} s B_i A_i, of which only A_t [r, in] and B_t [out, r] are trained. The rows
    of A_i span what task i's update reads. With A_prev = (A_1; ...; A_{t-1}) [(t-1) r, in], the loss of task t is
        L_task + λ₁ Σ_layers ‖A_prev A_tᵀ‖₁₁ + λ₂ Σ_layers (‖A_t‖_F + ‖B_t‖_F)
    where ‖·‖₁₁ is the sum of the entries' magnitudes and ‖·‖_F is not squared. A_t starts Kaiming-uniform, B_t at 0,
    so a task begins with the function that the one before left. Nothing is added for the first task but the λ₂ term.
    λ₁ = λ₂ = 0 is IncLoRA. r (in + out) trained parameters a weight and task.

    The paper writes the sum of squares, its code sums magnitudes; `ortho_norm` offers both. The sum grows with
    layers · (t-1) r · r, and it can be lowered by shorter rows as well as by orthogonal ones; "cosine" takes the rows
    at length 1 and so leaves only the second way. λ₁ has to be tuned for other sizes. Its weight does not depend on
    the number of micro-batches a step, as it does in the reference code. The old adapters are kept one by one, not
    concatenated. λ₁ is the same for all tasks; the reference scripts change it and λ₂ within the long orders.

    How orthogonal the rows come out is in the results, by task: `reading_overlap`, the mean squared cosine of the
    angles between the spaces that a new and an old A's rows span, (1/r) ‖Q_i Q_tᵀ‖_F² with orthonormal bases Q of them;
    0 is orthogonal, 1 the same space, and r/in what random rows have on average. IncLoRA reports it too.

    Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP Findings 2023,
    arXiv 2310.14152.

    When to choose:
        Old examples may not be kept and the task is not known at test time, and the result must be one fixed,
        mergeable update. It keeps old tasks better than IncLoRA; orthogonal rows do not bound the interference on
        inputs that lie in both subspaces. Where 2 % of the old examples may be kept, compare `replay`.

    Equation:
        W_t = W_0 + s \sum_{i \le t} B_i A_i
        L_t = L_{\text{task}} + \lambda_1 \sum_{i < t} \lVert A_i A_t^\top \rVert_{1,1} + \lambda_2 R_t
        R_t = \lVert A_t \rVert_F + \lVert B_t \rVert_F

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lambda_1": 0.1}
        run = learn(model_folder(), tasks, method="o-lora", out="runs/o-lora", options=options)
        print(run.results["methods"]["o-lora"]["average_accuracy"])

    Args:
        adapter: The adapter of each task; one whose update trains an A [r, in], as LoRA does.
        lambda_1: λ₁, weight of the orthogonality.
        lambda_2: λ₂, weight of the new adapter's size.
        ortho_norm: How A_prev A_tᵀ is measured: "l1" sums magnitudes, "l2" squares, "cosine" the magnitudes of the
            cosines between rows.
    """

    lambda_1: float = 0.5
    lambda_2: float = 0.0
    ortho_norm: Literal["l1", "l2", "cosine"] = "l1"

    method: ClassVar[str] = "o-lora"
    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2310.14152"
    trains: ClassVar[str] = "a new adapter a task, orthogonal to the old"

    def __post_init__(self) -> None:
        if self.lambda_1 < 0 or self.lambda_2 < 0:
            raise ValueError(f"lambda_1 and lambda_2 must be at least 0, not {self.lambda_1} and {self.lambda_2}")
        if self.ortho_norm not in _NORMS:
            raise ValueError(f"ortho_norm must be {', '.join(_NORMS)}, not {self.ortho_norm!r}")
        self._pairs: list[tuple[Tensor, nn.Parameter]] = []
        self._new: list[nn.Parameter] = []

    def start(self, model: PreTrainedModel, adapter_name: str = "task_0") -> PeftModel:
        """Put the first task's adapter on the base model.

        Raises:
            ValueError: The adapter's update does not train an A [r, in].
        """
        adapted = super().start(model, adapter_name)
        updates = [layer.folklora_updates[adapter_name] for layer in layers_of(adapted)]
        if not updates or any(trained_rows(update) is None for update in updates):
            name = getattr(self.adapter, "method", "") or type(self.adapter).__name__
            raise ValueError(
                f"o-lora keeps the rows of the trained A of each adapter apart, and '{name}' has no such A; "
                "choose an adapter that trains one, for instance adapter=lora"
            )
        return adapted

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Add the task's adapter, and find once which old rows its rows have to avoid."""
        super().prepare(model, tokenizer, tasks, index)
        updates = [layer.folklora_updates for layer in layers_of(model)]
        new = [update[f"task_{index}"] for update in updates]
        self._new = [p for update in new for p in update.parameters() if p.requires_grad]
        old = [[update[f"task_{i}"].A.detach() for i in range(index)] for update in updates]
        self._pairs = [(torch.cat(rows), update.A) for rows, update in zip(old, new, strict=True) if rows]

    def penalty(self, model: PeftModel) -> Tensor | None:
        """λ₁ times the orthogonality and λ₂ times the size of the new adapter."""
        parts = []
        if self.lambda_1 and self._pairs:
            norm = _NORMS[self.ortho_norm]
            parts.append(self.lambda_1 * _total([norm(old, new) for old, new in self._pairs]))
        if self.lambda_2:
            parts.append(self.lambda_2 * _total([torch.linalg.vector_norm(parameter) for parameter in self._new]))
        return sum(parts) if parts else None


def _total(values: Sequence[Tensor]) -> Tensor:
    """Their sum; layers may lie on several devices."""
    return torch.stack([value.to(values[0].device) for value in values]).sum()
