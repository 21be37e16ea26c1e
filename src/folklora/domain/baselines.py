"""What continual test-time adaptation is compared with: no adaptation, TENT, and a method after CoTTA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from folklora.domain.adaptation import ContinualTestTimeAdaptation, changes_of, consistency
from folklora.domain.augmentations import augmented


class SourceOnly(ContinualTestTimeAdaptation):
    """The classifier as it is: nothing is learnt from the stream.

    Args:
        model: An image classifier of transformers.
        mean: Taken off the images; the model's image processor knows it.
        std: What the images are divided by then.
    """

    def __init__(
        self, model: nn.Module, *, mean: Sequence[float] | float = 0.5, std: Sequence[float] | float = 0.5
    ) -> None:
        super().__init__(model, {}, rates={}, mean=mean, std=std)

    def adapt(self, images: Tensor) -> tuple[Tensor, None]:
        """The logits; no loss."""
        with torch.no_grad():
            return self.call(images), None


class TENT(ContinualTestTimeAdaptation):
    """Test entropy minimisation: each batch lowers the mean entropy of its own predictions, through the norms alone.

    Trained are changes of the weights and biases of all norms (those of layers, groups, root mean squares, batches);
    the answer is what the model says before the step. The base's own norms stay as they are. Norms over batches keep
    the source's statistics here; the authors take the batch's.

    Source: Wang, Shelhamer, Liu, Olshausen, Darrell, "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR
    2021, arXiv 2006.10726.

    Args:
        model: An image classifier of transformers.
        lr: Learning rate.
        optimizer: "adam" or "sgd".
        mean: Taken off the images; the model's image processor knows it.
        std: What the images are divided by then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        optimizer: Literal["adam", "sgd"] = "adam",
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.5,
    ) -> None:
        norms = {name: part for name, part in model.named_modules() if "norm" in type(part).__name__.lower()}
        names = [f"{name}.{key}" for name, norm in norms.items() for key, _ in norm.named_parameters(recurse=False)]
        if not names:
            raise ValueError("TENT trains the norms of a model, and this one has none with a weight")
        super().__init__(model, changes_of(model, names), rates={"base.": lr}, optimizer=optimizer, mean=mean, std=std)

    def adapt(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and their mean entropy."""
        logits = self.call(images, self.student)
        return logits, consistency(logits, logits)


class CoTTA(ContinualTestTimeAdaptation):
    """After CoTTA: a teacher averaged over views of uncertain batches, all parameters trained, stochastic restoration.

    Student and teacher are changes of every base parameter. Where the mean confidence of the base itself on a batch is
    below `confidence`, the answer is the mean of the teacher's logits over `views` random views, else the teacher's
    logits. One step on H(softmax(answer), student); the teacher follows with θ_t ← a θ_t + (1 - a) θ_s; each element of
    the student goes back to the base's with probability `restore`. The authors decide by the base, take 32 views and
    set `confidence` for each data set (0.92, 0.72, 0.1); the views are those of ViDA's.

    Source: Wang, Fink, Van Gool, Dai, "Continual Test-Time Domain Adaptation", CVPR 2022, arXiv 2203.13591.

    Args:
        model: An image classifier of transformers.
        lr: Learning rate.
        optimizer: "adam" or "sgd".
        decay: a.
        confidence: Mean confidence below which views are averaged.
        views: Number of views.
        view: (images, generator) → a random view of them.
        restore: Probability of the restoration.
        mean: Taken off the images; the model's image processor knows it.
        std: What the images are divided by then.
        seed: Of everything drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-4,
        optimizer: Literal["adam", "sgd"] = "adam",
        decay: float = 0.999,
        confidence: float = 0.92,
        views: int = 32,
        view: Callable[[Tensor, torch.Generator], Tensor] = augmented,
        restore: float = 0.01,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.5,
        seed: int = 0,
    ) -> None:
        settings = {"confidence": confidence, "views": views}
        super().__init__(
            model, changes_of(model), rates={"base.": lr}, optimizer=optimizer, decays={"base.": decay},
            restore=restore, mean=mean, std=std, seed=seed, settings=settings,
        )  # fmt: skip
        self.view = view
        self.counts |= {"averaged": 0}

    def adapt(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits, averaged where the base is unsure, and the consistency loss."""
        with torch.no_grad():
            answer = self._answer(images)
        return answer, consistency(answer, self.call(images, self.student))

    def _answer(self, images: Tensor) -> Tensor:
        confidence = self.call(images).softmax(1).amax(1).mean()
        if confidence >= self.settings["confidence"]:
            return self.call(images, self.teacher)
        self.counts["averaged"] += 1
        views = (self.view(images, self.generator) for _ in range(self.settings["views"]))
        return torch.stack([self.call(view, self.teacher) for view in views]).mean(0)
