"""OSFT over a stream: before each task the strongest directions of the current weights are protected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.osft import OSFT, next_task
from folklora.continual.answers import prompt_inputs
from folklora.continual.base import ContinualMethod
from folklora.stream.tasks import Task

_OBSERVED = 48
_RETENTIONS = ("adaptive", "budget", "fixed")


@dataclass
class OSFTStream(ContinualMethod):
    r"""Adaptive SVD: one adapter is trained on and on, each task off the subspace that is protected when it comes.

    Before task t each adapted layer's current weight W + ΔW is decomposed; its k_t strongest triplets are protected
    and the q - k_t others trained, q = min(in, out); see the adapter, `folklora.OSFT`. How k_t is found:
    - "adaptive", the paper's: the layer's importance I = the mean cosine similarity of its inputs and outputs (their
      first q coordinates) on 48 of the task's prompts, over the mean of all layers;
      k_t = round(q (min_retention + I (target_retention - min_retention))), from 1 to q - 1.
    - "budget": k_t = ⌊q (t - 1) / T⌋ for T tasks, so nothing is protected in the first.
    - "fixed": what the adapter's own options say, the same for all tasks.
    k never becomes smaller from one task to the next. The paper and its code are silent on negative similarities; here
    they count as 0, and where all of them do the layers count alike. A new optimiser begins each task. No replay, no
    task id at test time; the result merges into one plain model. Memory: see the adapter.

    Source: Nayak, Killamsetty, Han, Bhandwaldar, Chanda, Xu, Wang, Pareja, Silkin, Eyceoz, Srivastava, "Sculpting
    Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", ICLR 2026, arXiv 2504.07097.

    When to choose:
        When one plain model has to come out of the stream, and each task may need more than a low rank. With many tasks
        and "budget" the last ones have little left to train. Where memory is short, an adapter a task costs less.

    Equation:
        I_l = \frac{\overline{\cos}(X_l, Y_l)}{\frac{1}{L} \sum_j \overline{\cos}(X_j, Y_j)}
        k_l = \mathrm{round}\left( q_l \left( r_{\min} + I_l (r_{\mathrm{target}} - r_{\min}) \right) \right)

    Example:
        from folklora import OSFT
        from folklora.continual import OSFTStream

        method = OSFTStream(OSFT(target_modules=["q_proj", "v_proj"]), min_retention=0.1, target_retention=0.8)
        print(method.retained({"first": 0.6, "second": 0.2}))

    Args:
        adapter: The adapter; its rank options count for "fixed" alone, and are refused otherwise.
        retention: How the number of protected directions is found.
        min_retention: Share of a layer's directions that is protected whatever its importance; of "adaptive". The
            authors' commented code has 1/2 and 1 in place of 0.1 and 0.8, which the paper reports.
        target_retention: Share that is protected in a layer of mean importance; of "adaptive".
    """

    adapter: OSFT = field(default_factory=OSFT)
    retention: Literal["adaptive", "budget", "fixed"] = "adaptive"
    min_retention: float = 0.1
    target_retention: float = 0.8

    method: ClassVar[str] = "osft"
    paper: ClassVar[str] = "Nayak et al. 2025, arXiv 2504.07097"
    trains: ClassVar[str] = "the weights' weak directions, off the strong ones"

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, OSFT):
            raise ValueError(f"osft needs an OSFT adapter, not {type(self.adapter).__name__}")
        if self.retention not in _RETENTIONS:
            raise ValueError(f"retention must be {', '.join(_RETENTIONS[:-1])} or fixed, not {self.retention!r}")
        if not 0 <= self.min_retention <= self.target_retention <= 1:
            raise ValueError(
                "min_retention and target_retention are shares with 0 <= min_retention <= target_retention <= 1, "
                f"not {self.min_retention} and {self.target_retention}"
            )
        plain, names = OSFT(), ("r", "unfreeze_rank_ratio", "rank_pattern")
        given = [name for name in names if getattr(self.adapter, name) != getattr(plain, name)]
        if given and self.retention != "fixed":
            raise ValueError(
                f"retention={self.retention!r} finds the ranks itself: leave {', '.join(given)} out, or set "
                "retention='fixed'"
            )

    def start(self, model: PreTrainedModel, adapter_name: str = "default") -> PeftModel:
        """Put the adapter on the base model.

        Raises:
            ValueError: "adaptive" is to rank a layer that is no linear one.
        """
        adapted = super().start(model, adapter_name)
        others = [layer.name for layer, _ in updates_of(adapted, adapter_name) if layer.kind.name != "linear"]
        if others and self.retention == "adaptive":
            raise ValueError(
                f"retention='adaptive' compares a linear layer's input with its output, and {', '.join(others)} is "
                "none: leave it out of target_modules, or set retention='budget'"
            )
        return adapted

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Protect the strongest directions of the current weights, and train the others."""
        if self.retention == "fixed" and index == 0:
            return
        pairs = list(updates_of(model, "default"))
        limits = {layer.name: len(update.s) + update.protected_count for layer, update in pairs}
        before = {layer.name: update.protected_count if index else 0 for layer, update in pairs}
        if self.retention == "fixed":
            wanted = before
        elif self.retention == "budget":
            wanted = {name: q * index // len(tasks) for name, q in limits.items()}
        else:
            shares = self.retained(similarities(model, tokenizer, tasks[index]))
            wanted = {name: min(max(round(shares[name] * q), 1), q - 1) for name, q in limits.items()}
        next_task(model, {name: q - max(wanted[name], before[name]) for name, q in limits.items()})

    def retained(self, similarity: dict[str, float]) -> dict[str, float]:
        """The share of its directions that "adaptive" protects in each layer, by the layers' similarities.

        Args:
            similarity: Mean cosine of a layer's inputs and outputs, by name.
        """
        counted = {name: max(value, 0.0) for name, value in similarity.items()}
        mean = sum(counted.values()) / len(counted)
        spread = self.target_retention - self.min_retention
        return {name: self.min_retention + (value / mean if mean else 1.0) * spread for name, value in counted.items()}


@torch.no_grad()
def similarities(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> dict[str, float]:
    """The mean cosine of each adapted layer's inputs and outputs over the tokens of up to 48 training prompts."""
    layers = {layer.name: layer for layer, _ in updates_of(model, "default")}
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def look(layer: FolkloraLayer, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = arguments[0].double(), output.double()
        width = min(x.shape[-1], y.shape[-1])
        seen[layer.name].append(F.cosine_similarity(x[..., :width], y[..., :width], dim=-1).flatten())

    handles = [layer.register_forward_hook(look) for layer in layers.values()]
    training = model.training
    model.eval()
    try:
        for example in task.train[:_OBSERVED]:
            model(**prompt_inputs(model, tokenizer, example.prompt))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: float(torch.cat(values).mean()) for name, values in seen.items()}
