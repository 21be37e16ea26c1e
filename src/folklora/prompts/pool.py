"""A pool of soft prompts with keys, of which each row of a batch takes those that fit it best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from folklora.prompts.base import Prompt, PromptConfig, vocabulary


@dataclass
class PromptPool(PromptConfig):
    """M prompts P_j [L_p, d] with keys k_j [d]; each row takes the N whose keys are most like its query.

    The prompts start at the embeddings of random tokens, the keys at random directions. See `folklora.continual.L2P`.

    Args:
        prompt_length: L_p, positions of each prompt; a row gets N L_p of them.
        pool_size: M.
        top_k: N.
    """

    method: str = "prompt-pool"
    pool_size: int = 10
    top_k: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sizes("pool_size", "top_k")
        if self.top_k > self.pool_size:
            raise ValueError(f"top_k {self.top_k} is above pool_size {self.pool_size}: there are no more prompts")

    def prompt(self, embedding: nn.Module) -> Prompt:
        """The pool at its start."""
        drawn = vocabulary(embedding, self.pool_size * self.prompt_length)
        return PromptPoolVectors(drawn.view(self.pool_size, self.prompt_length, -1), self.top_k)


class PromptPoolVectors(Prompt):
    """The pool's prompts and keys, and which it chose.

    Args:
        start: The prompts [M, L_p, d].
        top_k: N.
    """

    reads_query: ClassVar[bool] = True

    def __init__(self, start: Tensor, top_k: int) -> None:
        count, length, width = start.shape
        super().__init__(top_k * length)
        self.top_k = top_k
        self.embeddings = nn.Parameter(start)
        self.keys = nn.Parameter(torch.randn(count, width).to(start.device))
        self.frequency: Tensor | None = None
        """Shares h [M] with which keys were chosen in earlier tasks; while training it turns rows to the others."""
        self.chosen = torch.zeros(count, dtype=torch.long)
        """How often each key was chosen in training, [M]; whoever reads it sets it back."""
        self._similarity: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a pass whose pull nobody took leaves a part of its graph, which can neither be copied nor pickled
        return {**self.__dict__, "_similarity": None}

    def vectors(self, query: Tensor | None = None) -> Tensor:
        """The chosen prompts, the most similar first, [rows, N L_p, d]."""
        similarity = self.similarity(query)
        picked = self.choose(similarity.detach())
        if self.training and torch.is_grad_enabled():
            self._similarity = similarity.gather(1, picked)
            self.chosen = self.chosen.to(picked.device) + F.one_hot(picked, len(self.keys)).sum((0, 1))
        return self.embeddings[picked].flatten(1, 2)

    def similarity(self, query: Tensor) -> Tensor:
        """Cosines of queries [rows, d] and keys, [rows, M] in float32."""
        return F.normalize(query.float(), dim=1) @ F.normalize(self.keys.float(), dim=1).T

    def choose(self, similarity: Tensor) -> Tensor:
        """The N chosen prompts of each row [rows, N], the most similar first.

        Args:
            similarity: Cosines of queries and keys, [rows, M].
        """
        score = similarity
        if self.training and self.frequency is not None:
            # of the paper: the smallest distances, weighted by how often the keys were chosen before
            score = (similarity - 1) * self.frequency.to(similarity)
        picked = score.topk(self.top_k, dim=1).indices
        order = similarity.gather(1, picked).argsort(dim=1, descending=True, stable=True)
        return picked.gather(1, order)

    def pull(self) -> Tensor | None:
        """Mean over the rows of the last training pass of Σ over the chosen keys of cos(q, k); can be taken once."""
        similarity, self._similarity = self._similarity, None
        return None if similarity is None else similarity.sum(dim=1).mean()
