"""AM-LoRA over a stream: a LoRA and a gate are appended for each task; see `folklora.adapters.am_lora`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from folklora.adapters.am_lora import AMLoRA, AMLoRAUpdate, add_task
from folklora.adapters.host.layer import layers_of
from folklora.continual.base import OBSERVED, ContinualMethod
from folklora.encoders import padded
from folklora.stream.tasks import Task


@dataclass
class AMLoRAStream(ContinualMethod):
    r"""Attentional mixture of LoRAs: append (A_t, B_t, w_t, b_t) in every adapted layer, freeze the rest, train.

    The equations, options and open questions are those of the adapter, `folklora.AMLoRA`. No replay, no teacher, no
    task id at test time.

    Source: Liu, Wu, Liu, Duan, "Learning Attentional Mixture of LoRAs for Language Model Continual Learning", 2024,
    arXiv 2409.19611.

    When to choose:
        Tasks come one after another, no old examples may be kept, and at test time nobody says which task it is. Each
        task stores a LoRA and gates, and the adapter neither merges nor exports. Where the task is known, `per-task` is
        simpler and better.

    Equation:
        a = \mathrm{softmax}(e_0, \ldots, e_t), \quad y = W x + b + \sum_{i \geq 1} a_i\, s\,B_i A_i x

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        run = learn(model_folder(), tasks, method="am-lora", out="runs/am-lora", options=options)
        print(run.results["methods"]["am-lora"]["average_accuracy"])

    Args:
        adapter: Options of the layers.
    """

    adapter: AMLoRA = field(default_factory=AMLoRA)

    method: ClassVar[str] = "am-lora"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2409.19611"
    trains: ClassVar[str] = "a new LoRA and its gate a task; attention mixes them"

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, AMLoRA):
            raise ValueError(f"am-lora needs an AMLoRA adapter, not {type(self.adapter).__name__}")

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Append a LoRA and a gate (the first task finds one there already); place the gate by the task's prompts."""
        if index > 0:
            add_task(model)
        if self.adapter.placed:
            for update, mean in _ends_of(model, tokenizer, tasks[index]):
                update.place_gate(mean)

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """Note what the gates read on the task now that it is learnt, for the gates of later tasks."""
        if self.adapter.placed:
            for update, mean in _ends_of(model, tokenizer, tasks[index]):
                update.remember(mean)
        return {}

    def observe(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
    ) -> dict[str, Any] | None:
        """The mean attention to each slot, by task and layer, over the tokens of up to 48 test prompts."""
        prompts = [[example.prompt for example in task.test[:OBSERVED]] for task in tasks]
        names = [task.name for task in tasks]
        mean = [_attention(model, tokenizer, some) for some in prompts]
        return {**self._names(model, names), "tasks": names, "mean": mean}

    def explain(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tasks: Sequence[str]
    ) -> dict[str, Any] | None:
        """The mean attention to each slot over the tokens of each prompt, by layer."""
        return {
            **self._names(model, tasks),
            "weights": [_attention(model, tokenizer, [prompt]) for prompt in prompts],
        }

    def _names(self, model: PeftModel, tasks: Sequence[str]) -> dict[str, list[str]]:
        slots = [*(["none"] if self.adapter.zero_slot else []), *tasks]
        return {"layers": [layer.name for layer in layers_of(model)], "slots": slots}


def _attention(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[float]]:
    """The mean attention to each slot over the prompts' tokens, [layers][slots]."""
    seen = _watch(model, tokenizer, prompts, _updates(model), lambda update, mask: _mean(update.attention, mask))
    return [[round(value, 6) for value in row.tolist()] for row in seen]


def _updates(model: PeftModel) -> list[AMLoRAUpdate]:
    return [layer.folklora_updates["default"] for layer in layers_of(model)]


def _ends_of(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Iterator[tuple[AMLoRAUpdate, Tensor]]:
    """(update, the mean of what its gates read at the end of the task's training prompts), layer by layer."""
    updates = _updates(model)
    prompts = [example.prompt for example in task.train[:OBSERVED]]
    means = _watch(model, tokenizer, prompts, updates, lambda update, mask: _last(update.read, mask))
    return zip(updates, means, strict=True)


@torch.no_grad()
def _watch(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    updates: Sequence[AMLoRAUpdate],
    look: Callable[[AMLoRAUpdate, Tensor], Tensor],
) -> list[Tensor]:
    """What `look` gives of each update and the positions' mask, [rows, ...], averaged over the prompts."""
    training = model.training
    model.eval()
    totals = [torch.zeros((), dtype=torch.float64)] * len(updates)
    for update in updates:
        update.record = True
    try:
        rows = [tokenizer(prompt, truncation=True)["input_ids"] for prompt in prompts]
        for ids, mask in padded(tokenizer, rows, model.device):
            inputs = {"input_ids": ids, "attention_mask": mask}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = ids[:, :1]
            model(**inputs)
            seen = [look(update, mask).double().sum(0).cpu() for update in updates]
            totals = [total + part for total, part in zip(totals, seen, strict=True)]
    finally:
        model.train(training)
        for update in updates:
            update.record, update.attention, update.read = False, None, None
    return [total / len(prompts) for total in totals]


def _last(values: Tensor, mask: Tensor) -> Tensor:
    """[rows, positions, ...] at each row's last real position; values of other positions than the mask's are whole."""
    if values.shape[:2] != mask.shape:
        return values[:, -1]
    return values[torch.arange(len(values), device=values.device), mask.sum(1) - 1]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """[rows, positions, ...] averaged over each row's real positions."""
    if values.shape[:2] != mask.shape:
        return values.mean(1)
    weights = mask.to(values.dtype).unsqueeze(-1)
    return (values * weights).sum(1) / weights.sum(1)
