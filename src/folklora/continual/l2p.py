"""L2P: a pool of soft prompts that all tasks share; each input takes those whose keys fit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from folklora.continual.base import ContinualMethod
from folklora.encoders import padded
from folklora.prompts import PromptPool, prompts_of
from folklora.prompts.pool import PromptPoolVectors
from folklora.stream.tasks import Task
from folklora.stream.tokens import prompt_tokens


@dataclass
class L2P(ContinualMethod):
    r"""Learning to Prompt: prompts P_1, ..., P_M [L_p, d] with keys k_j [d]; each input x takes N of them.

    The query q(x) [d] is the mean over x's tokens of the frozen model's last hidden states, taken without prompts: of
    the encoder, or of a causal model over the question alone (its answer does not count, in training either). The N
    keys of the highest cos(q(x), k_j) choose the prompts, which stand before the text, or with `place` of "answer"
    within the question before its last token (as for `progprompt`), the most similar first. The loss
        L_task - λ · mean over inputs of Σ_{chosen j} cos(q(x), k_j)
    trains prompts and keys; the keys by the second term alone, since choosing has no gradient. M (L_p d + d) trained
    parameters, whatever the number of tasks. What is not chosen has gradient 0 (AdamW may still move it by the
    momentum of earlier steps, and by weight decay). Each input costs a second forward pass, without gradients.
    With `diversify`, task t's training takes the keys of the smallest (1 - cos(q(x), k_j)) h_j, where h_j is key j's
    share of the choices of all earlier tasks (every key counted once more, so that none has 0). Tests never do so.

    Each row chooses for itself; the reference code can take a batch's majority, which tells the task where batches hold
    one alone. Its keys start in U(0, 0.01), which all point one way, and its query is an image model's [CLS]; here keys
    start at random directions and prompts at the embeddings of random tokens. Its configuration for CIFAR-100 gives
    M, L_p, N (and λ = 1 in place of the paper's 0.5). Settings for language models are not known. On the demo's model
    fewer choices learnt better: its first task (3 answers, 630 steps of 8 examples, `place` "answer", one seed) came to
    68 % with N = 1 and L_p = 10, to 54 % with N = 2 and 5, to 41 % with N = 4 and 5 (rate 0.03), and to 35 % with N = 2
    and 10 (rate 0.05). The first is what the demo takes; ProgPrompt's one prompt came to 93 % there.

    Source: Wang, Zhang, Lee, Zhang, Sun, Ren, Su, Perot, Dy, Pfister, "Learning to Prompt for Continual Learning",
    CVPR 2022, arXiv 2112.08654.

    When to choose:
        As the baseline of prompts without a task id: it never grows, and stores little. Hidden states of a language
        model point much the same way for all texts, so a few keys tend to win every choice, and tasks then share their
        prompts and disturb one another; `diversify` works against it. Where tasks conflict, compare `am-lora`.

    Equation:
        S(x) = \operatorname{top-N}_j \; \cos(q(x), k_j)
        L = L_{\text{task}}\left([P_{S(x)}; \mathrm{embed}(x)]\right) - \lambda \sum_{j \in S(x)} \cos(q(x), k_j)

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"pool_size": 6, "top_k": 1, "place": "answer", "learning_rate": 0.03, "max_length": 96}
        run = learn(model_folder(), tasks, method="l2p", out="runs/l2p", options=options)
        print(run.results["methods"]["l2p"]["average_accuracy"])

    Args:
        adapter: The pool, a `folklora.prompts.PromptPool`. Its options: pool_size, M (10); prompt_length, L_p (10);
            top_k, N (4); place, "front" (the paper's) or "answer".
        pull_weight: λ.
        diversify: Turn later tasks away from the keys that earlier ones chose.
    """

    adapter: PromptPool = field(default_factory=PromptPool)
    pull_weight: float = 0.5
    diversify: bool = False

    method: ClassVar[str] = "l2p"
    paper: ClassVar[str] = "Wang et al. 2022, arXiv 2112.08654"
    trains: ClassVar[str] = "a pool of soft prompts and their keys"

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, PromptPool):
            raise ValueError(f"l2p needs a PromptPool, not {type(self.adapter).__name__}")
        if self.pull_weight < 0:
            raise ValueError(f"pull_weight must be at least 0, not {self.pull_weight}")
        self._chosen = torch.zeros(self.adapter.pool_size, dtype=torch.long)

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Count the task's choices from 0, and turn it away from the keys chosen before if it is to be."""
        pool = _pool(model)
        pool.chosen.zero_()
        smoothed = self._chosen.double() + 1
        pool.frequency = smoothed / smoothed.sum() if self.diversify and index > 0 else None

    def penalty(self, model: PeftModel) -> Tensor | None:
        """-λ times the similarity of the inputs to the keys that they chose, from -λ N to λ N."""
        pull = _pool(model).pull()
        return None if pull is None else -self.pull_weight * pull

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """Add the task's choices, of all processes, to those of the earlier tasks."""
        if not self.diversify:
            return {}
        self._chosen = self._chosen + reduce(_pool(model).chosen.to(model.device), "sum").cpu()
        return {"chosen": self._chosen}

    def resume(self, model: PeftModel, index: int, carried: dict[str, Tensor]) -> None:
        """Take up the choices of the earlier tasks."""
        if self.diversify:
            self._chosen = carried["chosen"]

    @torch.no_grad()
    def explain(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tasks: Sequence[str]
    ) -> dict[str, Any] | None:
        """Which of the pool's prompts each text takes: 1 / N each, and 0 for the others."""
        pool, two_sided = _pool(model), bool(model.config.is_encoder_decoder)
        rows = prompt_tokens(tokenizer, prompts, self.max_length, encoder_decoder=two_sided)
        shares: list[list[float]] = []
        for ids, mask in padded(tokenizer, rows, model.device):
            picked = pool.similarity(model.base_model.query(ids, mask)).topk(pool.top_k, dim=1).indices
            shares += (F.one_hot(picked, len(pool.keys)).sum(1) / pool.top_k).tolist()
        slots = [f"prompt {number + 1}" for number in range(len(pool.keys))]
        return {"layers": ["input"], "slots": slots, "weights": [[row] for row in shares]}


def _pool(model: PeftModel) -> PromptPoolVectors:
    return prompts_of(model)["default"]
