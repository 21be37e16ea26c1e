"""What a model tells of each example: how hard it finds it, and which way it would learn from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from folklora.adapters.host.blocks import block_of
from folklora.continual.answers import answers_of
from folklora.continual.per_example import HELD, TOKENS, ExampleGradients, Row, batches
from folklora.selection import random_projection, zero_order_gradient
from folklora.stream.tasks import Example
from folklora.stream.tokens import encode

SCORES = ("perplexity", "el2n", "entropy", "grand", "grounding")
VECTORS = ("gradient", "sign", "zero-order")


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
        tokens: Of a batch, with its padding; an example that is longer is one by itself.
    """

    max_length: int
    vectors: Literal["gradient", "sign", "zero-order"] = "gradient"
    width: int = 8192
    block: int | None = None
    probes: int = 16
    seed: int = 0
    tokens: int = TOKENS

    def of(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        without: Sequence[Example | None],
    ) -> Measured:
        """Measure examples with a model as it is, in evaluation mode and in batches of like length.

        Args:
            model: With its adapters; its own mode is restored.
            tokenizer: Its tokenizer.
            examples: What to measure.
            without: Each example without its passage, for "grounding"; None where there is no such thing.
        """
        two_sided = bool(model.config.is_encoder_decoder)
        parameters = block_parameters(model, self.block)
        # a task's examples have one question, and so differ in their answers alone
        bare = list(dict.fromkeys(example for example in without if example is not None))
        rows, bare_rows = (
            [encode(tokenizer, example, self.max_length, two_sided) for example in some] for some in (examples, bare)
        )
        training = model.training
        model.eval()
        try:
            alone = dict(zip(bare, self._perplexities(model, bare_rows), strict=True))
            vectors, scores = self._measured(model, rows, parameters)
        finally:
            model.train(training)
        blind = torch.tensor([alone.get(example, math.nan) for example in without], dtype=torch.float64)
        scores["grounding"] = (blind - scores["perplexity"]).exp()
        return Measured(vectors, {name: scores[name] for name in SCORES})

    def _measured(
        self, model: PeftModel, rows: Sequence[Row], parameters: list[nn.Parameter]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The vectors and the scores, but for "grounding"."""
        size = sum(parameter.numel() for parameter in parameters)
        if not rows:
            return torch.zeros(0, min(size, self.width)), {name: torch.zeros(0).double() for name in SCORES}
        read_gradients = partial(self._estimated, model, parameters)
        if self.vectors != "zero-order":
            read_gradients = ExampleGradients(model, parameters, rows[0])
        parts = batches(rows, max(1, HELD // size), self.tokens)
        found, scores, held = [], [], []
        for batch in parts:
            gradients, read = read_gradients([rows[i] for i in batch])
            held.append(gradients.nan_to_num())
            scores.append(_scores(read, held[-1]))
            if sum(map(len, held)) * size >= HELD or batch is parts[-1]:
                found.append(self._projected(torch.cat(held)))
                held = []
        order = torch.tensor([i for batch in parts for i in batch]).argsort()
        return torch.cat(found)[order], {name: torch.cat([own[name] for own in scores])[order] for name in scores[0]}

    @torch.no_grad()
    def _perplexities(self, model: PeftModel, rows: Sequence[Row]) -> list[float]:
        """The logs of them."""
        found = [math.nan] * len(rows)
        for batch in batches(rows, len(rows), self.tokens):
            read = answers_of(model, [rows[i] for i in batch])
            values = torch.stack([log_perplexity(*each) for each in read]).tolist()
            for i, value in zip(batch, values, strict=True):
                found[i] = value
        return found

    @torch.no_grad()
    def _estimated(
        self, model: PeftModel, parameters: list[nn.Parameter], rows: Sequence[Row]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The gradients of the rows, [rows, numbers of all parameters], and what is read of their answers."""

        def losses() -> Tensor:
            return torch.stack([F.cross_entropy(*each) for each in answers_of(model, rows)])

        # the same directions for all examples
        generator = torch.Generator(parameters[0].device).manual_seed(self.seed)
        parts = zero_order_gradient(losses, parameters, generator, probes=self.probes)
        return torch.cat([part.flatten(1).float() for part in parts], dim=1), answers_of(model, rows)

    def _projected(self, gradients: Tensor) -> Tensor:
        if self.vectors == "sign":
            gradients = gradients.sign()
        if gradients.shape[1] > self.width:
            gradients = random_projection(gradients, self.width, self.seed)
        return F.normalize(gradients, dim=1).cpu()


def _scores(read: Sequence[tuple[Tensor, Tensor]], gradients: Tensor) -> dict[str, Tensor]:
    """What is read of each row of a batch, [rows] float64 on the CPU."""
    found = {
        "perplexity": torch.stack([log_perplexity(*each) for each in read]),
        "el2n": torch.stack([el2n(*each) for each in read]),
        "entropy": torch.stack([token_entropy(logits) for logits, _ in read]),
        "grand": gradients.norm(dim=1),
    }
    return {name: values.double().cpu() for name, values in found.items()}


def log_perplexity(logits: Tensor, answer: Tensor) -> Tensor:
    """log of the mean of 1 / p over the answer's tokens, as the code of Adapt-∞ has it (not the mean of log 1 / p).

    Args:
        logits: [n, vocabulary].
        answer: The tokens [n].
    """
    losses = F.cross_entropy(logits, answer, reduction="none").double()
    return losses.logsumexp(0) - math.log(len(losses))


def el2n(logits: Tensor, answer: Tensor) -> Tensor:
    """The mean over the answer's tokens of ‖onehot(y) - softmax(z)‖₂: 0 where all are certain, √2 where wrongly so.

    Args:
        logits: z [n, vocabulary].
        answer: y [n].
    """
    missed = F.one_hot(answer, logits.shape[1]) - logits.softmax(-1)
    return missed.norm(dim=-1).mean()


def token_entropy(logits: Tensor) -> Tensor:
    """The mean over positions of the entropy (nats) of the model's distribution, from logits [n, vocabulary]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


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
