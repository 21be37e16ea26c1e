"""LwF: on the new task's inputs the model keeps the answers that it gave before the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedTokenizerBase

from folklora.adapters.host.layer import layers_of
from folklora.continual.answers import at_answers
from folklora.continual.base import ContinualMethod
from folklora.stream.tasks import Task


@dataclass
class LwF(ContinualMethod):
    r"""Learning without forgetting: the model before the task teaches the model that learns it, on the task's inputs.

    One adapter is trained on and on, as in SeqLoRA. The teacher is the same base with the adapter as it was before
    task t, frozen and in evaluation mode. With the logits z_T of the teacher and z of the model at an answer's token,
    the loss of task t > 1 is
        L_task + w τ² mean over answer tokens of KL( softmax(z_T / τ) ‖ softmax(z / τ) )
    on the examples of task t alone. It is 0 at a task's first step (without dropout). w = 0 is SeqLoRA. Nothing is
    carried to later tasks beside the adapter; while a task is learnt, a second copy of the adapter is held, and each
    step costs one more forward pass and holds the logits.

    The paper has an output head for each old task and distils those. A text model has one head for all: the divergence
    is over the whole vocabulary here, so it also resists new answers. The loss is that of teacher forcing: the teacher
    reads the right answer so far.

    Source: Li and Hoiem, "Learning without Forgetting", ECCV 2016, arXiv 1606.09282. The values of w and τ behind the
    rows for language models in Wang et al. 2023, arXiv 2310.14152, are not known; the defaults are ours.

    When to choose:
        New inputs resemble the old ones, and nothing of the old tasks may be kept. Where they tell nothing of the
        old tasks (topics after opinions), it hardly helps; then prefer O-LoRA, EWC or a small replay.

    Equation:
        p_\theta = \mathrm{softmax}(z_\theta / \tau)
        L_t = L_{\text{task}} + w \tau^2 \, \mathrm{KL}(p_{\theta_{t-1}} \,\Vert\, p_\theta)

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "distillation_weight": 2.0}
        run = learn(model_folder(), tasks, method="lwf", out="runs/lwf", options=options)
        print(run.results["methods"]["lwf"]["average_accuracy"])

    Args:
        adapter: The adapter; LoRA by default.
        distillation_weight: w.
        distillation_temperature: τ; above 1, the teacher's small probabilities count more.
    """

    distillation_weight: float = 1.0
    distillation_temperature: float = 2.0

    method: ClassVar[str] = "lwf"
    paper: ClassVar[str] = "Li and Hoiem 2016, arXiv 1606.09282"
    trains: ClassVar[str] = "one adapter, taught by its former self"

    def __post_init__(self) -> None:
        if self.distillation_weight < 0:
            raise ValueError(f"distillation_weight must be at least 0, not {self.distillation_weight}")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be above 0, not {self.distillation_temperature}")
        self._teacher: dict[str, Tensor] = {}

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Keep the adapter as it is now: the teacher. The first task has none."""
        # a stopped run starts again at the beginning of a task, where the saved adapter is the teacher
        self._teacher = _copy_of_what_moves(model) if index > 0 else {}

    @property
    def reads_logits(self) -> bool:
        """Whether there is a teacher to agree with."""
        return bool(self._teacher) and self.distillation_weight > 0

    def logits_penalty(self, model: PeftModel, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
        """w τ² KL(teacher ‖ model), the mean over the answers' tokens."""
        two_sided = bool(model.config.is_encoder_decoder)
        student, _ = at_answers(logits, inputs["labels"], encoder_decoder=two_sided)
        teacher, _ = at_answers(self.teach(model, inputs), inputs["labels"], encoder_decoder=two_sided)
        return self.distillation_weight * distillation(teacher, student, self.distillation_temperature)

    @torch.no_grad()
    def teach(self, model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
        """The teacher's logits [rows, positions, vocabulary] on a batch; the model is left as it was."""
        known = {key: value for key, value in inputs.items() if key != "labels"}
        training = model.training
        model.eval()
        try:
            return functional_call(model, self._teacher, (), {**known, "use_cache": False}).logits
        finally:
            model.train(training)


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """τ² KL( softmax(teacher / τ) ‖ softmax(student / τ) ), the mean over rows.

    Args:
        teacher: Logits [n, vocabulary].
        student: Logits [n, vocabulary].
        temperature: τ.
    """
    old, new = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(new, old, reduction="batchmean", log_target=True)


def _copy_of_what_moves(model: PeftModel) -> dict[str, Tensor]:
    """All parameters that training changes, by gradients or by what a method does after a step."""
    moving = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for layer in layers_of(model):
        for update in layer.folklora_updates.values():
            moving |= {id(update.get_parameter(key)) for key in update.stepped}
    return {name: value.detach().clone() for name, value in model.named_parameters() if id(value) in moving}
