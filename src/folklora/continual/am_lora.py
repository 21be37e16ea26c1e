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
from folklora.continual.base import ContinualMethod
from folklora.stream.tasks import Task

_OBSERVED = 48


@dataclass
class AMLoRAStream(ContinualMethod):
    """Attentional mixture of LoRAs: append (A_t, B_t, w_t, b_t) in every adapted layer, freeze the rest, train.

    The equations, options and open questions are those of the adapter, `folklora.AMLoRA`. No replay, no teacher, no
    task id at test time.

    Source: Liu, Wu, Liu, Duan, "Learning Attentional Mixture of LoRAs for Language Model Continual Learning", 2024,
    arXiv 2409.19611.

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
        updates, mean = _updates(model), []
        for task in tasks:
            prompts = [example.prompt for example in task.test[:_OBSERVED]]
            seen = _watch(model, tokenizer, prompts, updates, lambda update: update.attention.flatten(0, -2).mean(0))
            mean.append([[round(value, 6) for value in row.tolist()] for row in seen])
        slots = [*(["none"] if self.adapter.zero_slot else []), *(task.name for task in tasks)]
        names = [layer.name for layer in layers_of(model)]
        return {"layers": names, "slots": slots, "tasks": [task.name for task in tasks], "mean": mean}


def _updates(model: PeftModel) -> list[AMLoRAUpdate]:
    return [layer.folklora_updates["default"] for layer in layers_of(model)]


def _ends_of(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Iterator[tuple[AMLoRAUpdate, Tensor]]:
    """(update, the mean of what its gates read at the end of the task's training prompts), layer by layer."""
    updates = _updates(model)
    prompts = [example.prompt for example in task.train[:_OBSERVED]]
    means = _watch(model, tokenizer, prompts, updates, lambda update: update.read.flatten(0, -2)[-1])
    return zip(updates, means, strict=True)


@torch.no_grad()
def _watch(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    updates: Sequence[AMLoRAUpdate],
    look: Callable[[AMLoRAUpdate], Tensor],
) -> list[Tensor]:
    """What `look` gives for each update, averaged over prompts read one by one."""
    training = model.training
    model.eval()
    totals = [torch.zeros((), dtype=torch.float64)] * len(updates)
    for update in updates:
        update.record = True
    try:
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", truncation=True).to(model.device)
            inputs.pop("token_type_ids", None)
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = inputs["input_ids"][:, :1]
            model(**inputs)
            totals = [total + look(update).double().cpu() for total, update in zip(totals, updates, strict=True)]
    finally:
        model.train(training)
        for update in updates:
            update.record, update.attention, update.read = False, None, None
    return [total / len(prompts) for total in totals]
