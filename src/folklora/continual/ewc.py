"""EWC: one adapter, each of whose parameters is held to its old value by its importance for the old tasks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from folklora.continual.base import ContinualMethod
from folklora.continual.per_example import HELD, ExampleGradients, batches
from folklora.stream.tasks import Example, Task
from folklora.stream.tokens import encode


@dataclass
class EWC(ContinualMethod):
    r"""Elastic weight consolidation: a quadratic pull towards the old values, weighted by the Fisher information.

    One adapter is trained on and on, as in SeqLoRA. After task k, with its parameters at θ_k, the diagonal of the
    empirical Fisher information is taken over N of its training examples, each by its own gradient:
        F_k[p] = (1/N) Σ_n (∂ log p(y_n | x_n) / ∂θ_p)²        log p(y | x): the sum over the answer's tokens
    in float32 and in evaluation mode. The loss of task t is
        L_task + (λ/2) Σ_{k < t} Σ_p F_k[p] (θ_p - θ_k[p])²
    The sum of quadratics is itself one quadratic, up to a constant that has no gradient: with F = Σ_k F_k and
    θ̄ = Σ_k F_k θ_k / F it is (λ/2) Σ_p F[p] (θ_p - θ̄[p])². So two numbers a trained parameter are carried, however
    many tasks there were, and the loss shown leaves out the constant. `online` is the other common form: the anchor
    is the last θ_k and the Fisher decays, F ← γ F + F_k. λ = 0 is SeqLoRA. The first task has no penalty, and its
    adapter may start at zero gradient (B = 0): importance is measured after a task, where it no longer is.

    The paper's Fisher is an expectation over the model's own answers; the empirical one takes the given answers, as
    most implementations do. The paper consolidates a whole network, this the adapter. The default λ is the one of a
    small experiment; from 10² to 10⁶ are in use, since it depends on the Fisher's scale.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796.

    When to choose:
        Nothing may grow with the tasks and no examples may be kept. A large λ stops forgetting by stopping learning,
        so look at the learning accuracy too. O-LoRA and a small replay usually keep more.

    Equation:
        F_k = \frac{1}{N} \sum_{n=1}^{N} \left( \nabla_\theta \log p(y_n \mid x_n, \theta_k) \right)^2
        L_t = L_{\text{task}} + \frac{\lambda}{2} \sum_{k < t} \sum_p F_k[p] \left( \theta_p - \theta_k[p] \right)^2

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "ewc_lambda": 1000.0, "fisher_examples": 8}
        run = learn(model_folder(), tasks, method="ewc", out="runs/ewc", options=options)
        print(run.results["methods"]["ewc"]["average_accuracy"])

    Args:
        adapter: The adapter; LoRA by default.
        ewc_lambda: λ.
        fisher_examples: N, at most the number of training examples; drawn by the task's name.
        online: Anchor at the last task's values alone, and let the Fisher decay.
        fisher_decay: γ of `online`, from 0 to 1.
    """

    ewc_lambda: float = 100.0
    fisher_examples: int = 200
    online: bool = False
    fisher_decay: float = 1.0

    method: ClassVar[str] = "ewc"
    paper: ClassVar[str] = "Kirkpatrick et al. 2017, arXiv 1612.00796"
    trains: ClassVar[str] = "one adapter, held to its old values"

    def __post_init__(self) -> None:
        if self.ewc_lambda < 0:
            raise ValueError(f"ewc_lambda must be at least 0, not {self.ewc_lambda}")
        if self.fisher_examples < 1:
            raise ValueError(f"fisher_examples must be at least 1, not {self.fisher_examples}")
        if not 0 <= self.fisher_decay <= 1:
            raise ValueError(f"fisher_decay must lie between 0 and 1, not {self.fisher_decay}")
        if self.fisher_decay != 1 and not self.online:
            raise ValueError("fisher_decay is that of the online form; set online=true too")
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._held: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Find once which parameter each importance and anchor belongs to.

        Raises:
            ValueError: The adapter has no gradient of which the Fisher could be made; said before the first task.
        """
        if index == 0:
            # a trial must not change what training draws
            with torch.random.fork_rng(devices=[]):
                self.fisher(model, tokenizer, tasks[0], 1)
        self._held = [
            (parameter, self._fisher[name].to(parameter.device), self._anchor[name].to(parameter.device))
            for name, parameter in _trained(model)
            if name in self._fisher
        ]

    def penalty(self, model: PeftModel) -> Tensor | None:
        """(λ/2) Σ F (θ - anchor)²; None where no task was learnt yet."""
        if not self._held or self.ewc_lambda == 0:
            return None
        parts = [(fisher * (parameter - anchor).square()).sum() for parameter, fisher, anchor in self._held]
        return self.ewc_lambda / 2 * torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """Take the task's Fisher information into what is carried on: one importance and one anchor a parameter."""
        found = self.fisher(model, tokenizer, tasks[index], self.fisher_examples)
        for name, parameter in _trained(model):
            self.consolidate(name, found[name], parameter.detach().float().clone())
        return {
            **{f"fisher.{name}": value for name, value in self._fisher.items()},
            **{f"anchor.{name}": value for name, value in self._anchor.items()},
        }

    def fisher(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, examples: int
    ) -> dict[str, Tensor]:
        """The Fisher information of each trained parameter over so many of the task's training examples at the most."""
        drawn = random.Random(f"fisher:{task.name}").sample(task.train, min(examples, len(task.train)))
        return empirical_fisher(model, tokenizer, drawn, self.max_length)

    def resume(self, model: PeftModel, index: int, carried: dict[str, Tensor]) -> None:
        """Take up what `finish` gave."""
        self._fisher = {k.removeprefix("fisher."): v for k, v in carried.items() if k.startswith("fisher.")}
        self._anchor = {k.removeprefix("anchor."): v for k, v in carried.items() if k.startswith("anchor.")}

    def consolidate(self, name: str, fisher: Tensor, value: Tensor) -> None:
        """Add fisher (θ - value)² to the quadratic that is carried on for one parameter.

        Args:
            name: The parameter's.
            fisher: F_k of it after task k, float32.
            value: θ_k of it, float32.
        """
        if name not in self._fisher:
            self._fisher[name], self._anchor[name] = fisher, value
            return
        before, anchor = self._fisher[name].to(fisher), self._anchor[name].to(value)
        total = self.fisher_decay * before + fisher
        if not self.online:
            # where both are 0 the anchor has no meaning
            value = anchor + torch.where(total > 0, fisher / total, 0) * (value - anchor)
        self._fisher[name], self._anchor[name] = total, value


def empirical_fisher(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> dict[str, Tensor]:
    """The mean over examples of the squared gradient of each one's log-likelihood, by trained parameter, float32.

    Args:
        model: With its adapters; it runs in evaluation mode, and its own mode is restored.
        tokenizer: Its tokenizer.
        examples: At least one; each makes a gradient of its own, since the square of a mean is not the mean of squares.
        max_length: As in training.
    """
    named = dict(_trained(model))
    parameters, sizes = list(named.values()), [parameter.numel() for parameter in named.values()]
    rows = [encode(tokenizer, example, max_length, bool(model.config.is_encoder_decoder)) for example in examples]
    total = torch.zeros(sum(sizes), device=parameters[0].device)
    training = model.training
    model.eval()
    try:
        read_gradients = ExampleGradients(model, parameters, rows[0])
        for batch in batches(rows, max(1, HELD // sum(sizes))):
            gradients, read = read_gradients([rows[i] for i in batch])
            # they are of the mean over the answer's tokens, and its log-likelihood is their sum
            counts = gradients.new_tensor([len(answer) for _, answer in read])
            # in place: the adapter may be large
            total += gradients.mul_(counts.unsqueeze(1)).square_().sum(0)
    finally:
        model.train(training)
    parts = total.div_(len(rows)).split(sizes)
    # each in its own storage: what is carried on is saved by itself
    return {
        name: part.view_as(parameter).to(parameter.device, copy=True)
        for (name, parameter), part in zip(named.items(), parts, strict=True)
    }


def _trained(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
