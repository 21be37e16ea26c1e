"""The rows of kernel.py: which adapters a training step is measured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from peft import LoraConfig, PeftConfig

from folklora import SORSA, AMLoRA, KaSA, LoRA, PiSSA, SoMA

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DECOMPOSING = (KaSA, PiSSA, SORSA, SoMA)


@dataclass(frozen=True)
class Contender:
    """One row: an adapter (None for the base) and how its step is run."""

    name: str
    config: Callable[[], PeftConfig] | None = None
    float32: bool = True  # PEFT's autocast_adapter_dtype: a float32 adapter over a base of lower precision
    autocast: bool = False  # the forward pass runs under autocast to bfloat16
    decomposes: bool = False  # the weights, for its start values
    same_start: bool = False  # all such start from the same A and B: their losses and gradients must agree
    compiled: bool = False  # each decoder block is
    together: int = 1  # so many adapters of this kind are active
    rows: bool = False  # each for rows of its own
    apart: bool = False  # layers that read one input share nothing


PLAIN = Contender("frozen base")


def contenders(rank: int, mixed: bool, compiled: bool) -> list[Contender]:
    """The rows in order; `mixed`: the base is bfloat16 on a GPU, so that the adapter's precision is a choice."""
    common = {"r": rank, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    theirs = Contender("PEFT LoRA", partial(LoraConfig, lora_alpha=2 * rank, **common), same_start=True)
    low = replace(theirs, name="PEFT LoRA, bf16 adapters", float32=False)
    ours = Contender("Folklora LoRA", partial(LoRA, alpha=2 * rank, **common), same_start=True)
    token = partial(AMLoRA, dropout=0.0, granularity="token", gate_init="linear", **common)
    four = Contender("Folklora AM-LoRA, 4 tasks, token gate", partial(token, tasks=4))
    eight = Contender("Folklora LoRA, rank 8", partial(LoRA, **common | {"r": 8}))
    rows = [theirs, ours]
    if mixed:
        under = [replace(row, name=f"{row.name}, autocast", autocast=True) for row in rows]
        rows = [theirs, under[0], low, ours, under[1]]
    rows += [
        replace(ours, name="Folklora LoRA, each layer apart", apart=True),
        replace(ours, name="Folklora LoRA, dropout 0.1", config=partial(LoRA, dropout=0.1, **common), same_start=False),
        eight,
        replace(eight, name="Folklora LoRA, 32 of rank 8 at once", together=32),
        replace(eight, name="Folklora LoRA, 8 of rank 8, a row each", together=8, rows=True),
        *(Contender(f"Folklora {one.__name__}", partial(one, **common), decomposes=True) for one in DECOMPOSING),
        Contender("Folklora AM-LoRA, 4 tasks", partial(AMLoRA, dropout=0.0, tasks=4, **common)),
        Contender("Folklora AM-LoRA, 1 task, token gate", token),
        four,
        Contender("Folklora AM-LoRA, 4 tasks, token gate, dropout 0.1", partial(token, tasks=4, dropout=0.1)),
    ]
    again = [PLAIN, low if mixed else theirs, ours, four] if compiled else []
    return rows + [replace(row, name=f"{row.name}, compiled", compiled=True) for row in again]
