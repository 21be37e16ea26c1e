"""What a model tells of each example: how hard it finds it, and which way it would learn from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from folklora.adapters.host.blocks import block_of
from folklora.continual.answers import answer_of
from folklora.selection import random_projection, zero_order_gradient
from folklora.stream.tasks import Example

SCORES = ("perplexity", "el2n", "entropy", "grand", "grounding")
VECTORS = ("gradient", "sign", "zero-order")
# numbers of unprojected gradients that are held at once
_HELD = 2**26


@dataclass(frozen=True)
class Measured:
    """What was found of n examples.

    Attributes:
        vectors: [n, d] float32 of length 1, on the CPU: the direction in which each example would move the model.
        scores: By name, [n] float64 on the CPU; NaN where a score is not defined for an example.
    """

    vectors: Tensor
    scores: dict[str, Tensor]


@dataclass(frozen=True)
class Measure:
    """How examples are measured.

    Args:
        max_length: Tokens of prompt and answer, as in training.
        vectors: What an example's vector is made of: its gradient, the gradient's signs, or an estimate of it from
            the loss's values alone.
        width: Numbers a vector is projected to; shorter ones are left as they are.
        block: Number of the block of layers whose trained parameters the gradient is of; None takes the middle one.
        probes: Directions of the estimate.
        seed: Of the projection and of the directions, which are the same for all examples.
    """

    max_length: int
    vectors: Literal["gradient", "sign", "zero-order"] = "gradient"
    width: int = 8192
    block: int | None = None
    probes: int = 16
    seed: int = 0

    def of(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        without: Sequence[Example | None],
    ) -> Measured:
        """Measure examples with a model as it is, one forward and backward pass each, in evaluation mode.

        Args:
            model: With its adapters; its own mode is restored.
            tokenizer: Its tokenizer.
            examples: What to measure.
            without: Each example without its passage, for "grounding"; None where there is no such thing.
        """
        parameters = block_parameters(model, self.block)
        size = sum(parameter.numel() for parameter in parameters)
        scores: dict[str, list[float]] = {name: [] for name in SCORES}
        found, held = [], []
        training = model.training
        model.eval()
        try:
            for example, bare in zip(examples, without, strict=True):
                gradient, own = self._one(model, tokenizer, example, bare, parameters)
                held.append(gradient)
                for name, value in own.items():
                    scores[name].append(value)
                if len(held) * size >= _HELD:
                    found.append(self._projected(torch.stack(held)))
                    held = []
        finally:
            model.train(training)
        if held:
            found.append(self._projected(torch.stack(held)))
        vectors = torch.cat(found) if found else torch.zeros(0, min(size, self.width))
        return Measured(vectors, {name: torch.tensor(values).double() for name, values in scores.items()})

    def _one(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        example: Example,
        bare: Example | None,
        parameters: list[nn.Parameter],
    ) -> tuple[Tensor, dict[str, float]]:
        """The gradient, flat, and the scores of one example."""
        read = answer_of(model, tokenizer, example, self.max_length)
        if self.vectors == "zero-order":
            gradients = self._estimated(model, tokenizer, example, parameters)
        else:
            gradients = torch.autograd.grad(F.cross_entropy(*read), parameters, materialize_grads=True)
        gradient = torch.cat([part.flatten().float() for part in gradients]).nan_to_num()
        logits, answer = (part.detach() for part in read)
        perplexity, alone = log_perplexity(logits, answer), math.nan
        if bare is not None:
            with torch.no_grad():
                alone = log_perplexity(*answer_of(model, tokenizer, bare, self.max_length))
        return gradient, {
            "perplexity": perplexity,
            "el2n": el2n(logits, answer),
            "entropy": token_entropy(logits),
            "grand": float(gradient.norm()),
            "grounding": math.exp(alone - perplexity),
        }

    def _estimated(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        example: Example,
        parameters: list[nn.Parameter],
    ) -> list[Tensor]:
        def loss() -> Tensor:
            return F.cross_entropy(*answer_of(model, tokenizer, example, self.max_length))

        generator = torch.Generator(parameters[0].device).manual_seed(self.seed)
        return zero_order_gradient(loss, parameters, generator, probes=self.probes)

    def _projected(self, gradients: Tensor) -> Tensor:
        if self.vectors == "sign":
            gradients = gradients.sign()
        if gradients.shape[1] > self.width:
            gradients = random_projection(gradients, self.width, self.seed)
        return F.normalize(gradients, dim=1).cpu()


def log_perplexity(logits: Tensor, answer: Tensor) -> float:
    """log of the mean of 1 / p over the answer's tokens, as the code of Adapt-∞ has it (not the mean of log 1 / p).

    Args:
        logits: [n, vocabulary].
        answer: The tokens [n].
    """
    losses = F.cross_entropy(logits, answer, reduction="none").double()
    return float(losses.logsumexp(0)) - math.log(len(losses))


def el2n(logits: Tensor, answer: Tensor) -> float:
    """The mean over the answer's tokens of ‖onehot(y) - softmax(z)‖₂: 0 where all are certain, √2 where wrongly so.

    Args:
        logits: z [n, vocabulary].
        answer: y [n].
    """
    missed = F.one_hot(answer, logits.shape[1]) - logits.softmax(-1)
    return float(missed.norm(dim=-1).mean())


def token_entropy(logits: Tensor) -> float:
    """The mean over positions of the entropy (nats) of the model's distribution, from logits [n, vocabulary]."""
    log_p = logits.log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def block_parameters(model: PeftModel, number: int | None = None) -> list[nn.Parameter]:
    """The trained parameters in one block of layers of a model.

    Args:
        model: With its adapters.
        number: Of the blocks that have trained parameters, in the model's order, from 0; None takes the middle one.

    Raises:
        ValueError: There is no such block.
    """
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # what lies outside all blocks, such as an adapted head, counts as one
            blocks.setdefault(block_of(name) if re.search(r"\.\d+\.", name) else "", []).append(parameter)
    number = len(blocks) // 2 if number is None else number
    if not 0 <= number < len(blocks):
        raise ValueError(f"block {number} of layers has no trained parameters; there are {len(blocks)}, from 0")
    return list(blocks.values())[number]


def without_passage(examples: Sequence[Example]) -> list[Example | None]:
    """Each example of one task with what its prompts have in common alone: the question without the text it is about.

    What is common is whole words, at the beginning and at the end; None where nothing is.

    Args:
        examples: Of one task, which has one template for its prompts, or none.
    """
    prompts = [example.prompt for example in examples]
    head = _common_start(prompts)
    if all(prompt == head for prompt in prompts):
        return list(examples)
    head = head[: max(head.rfind(" "), head.rfind("\n")) + 1]
    tail = _common_start([prompt[len(head) :][::-1] for prompt in prompts])[::-1]
    words = re.search(r"\s", tail)
    common = (head + (tail[words.start() :] if words else "")).rstrip()
    return [Example(common, example.completion) if common else None for example in examples]


def _common_start(texts: Sequence[str]) -> str:
    # in sorted order whatever the first and the last have in common, all have
    first, last = min(texts), max(texts)
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differing, min(len(first), len(last)))]
