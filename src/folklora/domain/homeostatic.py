"""ViDA's loop: teacher and student are two ViDA adapters on one classifier, their scales follow the uncertainty."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora.adapters.host.layer import updates_of
from folklora.adapters.vida import ViDA, scaled
from folklora.domain.adaptation import ContinualTestTimeAdaptation, changes_of, check_options, consistency
from folklora.domain.augmentations import augmented

_TEACHER = "teacher"


class HomeostaticAdaptation(ContinualTestTimeAdaptation):
    r"""ViDA's continual test-time adaptation, with homeostatic knowledge allotment (HKA).

    For each batch x, once and without labels:
    1. u = factor · mean over classes (and over the batch, unless `per_sample`) of the variance of the teacher's logits
       over `views` random views of x, with both scales at 1;
    2. (λ_l, λ_h) = (1 - u, 1 + u) where u ≥ Θ, else (1 + u, 1 - u), for teacher and student;
    3. z_t = f_t(x), the answer, and z_s = f_s(x); one step on the mean of (H(p_t, p_s) + H(p_s, p_t)) / 2 (ImageNet),
       or of H(p_t, p_s) alone (CIFAR), p the softmax and H the cross-entropy;
    4. θ_t ← a θ_t + (1 - a) θ_s; then each element of the student is set back to its start with probability `restore`.
    Nothing is reset between domains. λ_l + λ_h = 2 always; u counts at most as 1, so that no scale changes its sign.

    Teacher and student are two adapters on one model ("teacher" and the one that was there, or "student"): the memory
    is three times the adapters (the third is the start, for `reset` and `restore`), their optimizer state, and the
    model once. Between calls the teacher is active: `model(...)` is the deployed classifier, and
    `model.save_pretrained(folder, selected_adapters=["teacher"])` keeps it. By default only the adapters are trained.
    The authors train the base parameters too: `base_lr` gives student and teacher a change of every base parameter,
    added for the length of a call. That is an overlay on top of the base, which itself is still never written to; it
    costs five times the model more with Adam (changes of both, their start and two moments).

    H(p_t, p_s) alone has the gradient p_s - p_t, none where teacher and student are equal, as they are at the start.
    With the same x for both and no dropout nothing would ever be learnt, whence the symmetric default.

    The defaults are those of the ImageNet experiments, but for the optimizer and its rate, which are ours.

    Departures from the authors' code: λ_h is applied (there a condition skips it); u is measured at scales 1, not at
    the last batch's; the model stays in evaluation mode. Their adapters come trained on source data: train the `ViDA`
    of a PEFT model as any adapter first, and give that model here.

    Args:
        model: An image classifier of transformers, or a PEFT model of one whose active adapter is a `ViDA` that is
            taken as the start.
        adapter: The ViDA adapter to put on a plain classifier; None takes `ViDA()`.
        lr: Learning rate of the adapters. The authors, who train the base too, take 1e-5, 1e-6 (Adam) and 2e-7 (SGD).
        optimizer: "adam", or "sgd" with momentum 0.9 and Nesterov (ImageNet).
        decay: a of the adapters (0.8 on ImageNet, 0.999 on CIFAR). A teacher with a = 0.999 needs thousands of batches.
        threshold: Θ (0.2 on ImageNet, 0.05 on CIFAR). Which of the two scales rises depends on the size of the logits:
            look at `uncertainty` and `counts`.
        factor: What the variance is multiplied with, 0.1 in the code. It decides how far the scales leave 1.
        views: Number of random views, at least 2; each costs a forward pass.
        view: (images, generator) → a random view of them.
        allotment: "homeostatic", "inverted" (an ablation: the other scale rises) or "none", which leaves both at 1 and
            spares the views.
        per_sample: Give each image scales of its own, as in the paper; the code gives one pair a batch.
        symmetric: Take the symmetric loss; the other needs a student that differs from its teacher.
        restore: Probability of the stochastic restoration (0.1 in the CIFAR code, 0 on ImageNet).
        base_lr: Learning rate of changes of the base's parameters; None trains none.
        base_decay: a of these changes.
        mean: Taken off the images; the model's image processor knows it.
        std: What the images are divided by then.
        seed: Of everything drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: ViDA | None = None,
        *,
        lr: float = 1e-3,
        optimizer: Literal["adam", "sgd"] = "adam",
        decay: float = 0.8,
        threshold: float = 0.2,
        factor: float = 0.1,
        views: int = 10,
        view: Callable[[Tensor, torch.Generator], Tensor] = augmented,
        allotment: Literal["homeostatic", "inverted", "none"] = "homeostatic",
        per_sample: bool = False,
        symmetric: bool = True,
        restore: float = 0.0,
        base_lr: float | None = None,
        base_decay: float = 0.999,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.5,
        seed: int = 0,
    ) -> None:
        settings = {"threshold": threshold, "factor": factor, "views": views}
        settings |= {"allotment": allotment, "per_sample": per_sample, "symmetric": symmetric}
        _check_settings(settings)
        trains_base = base_lr is not None
        rates = {"adapter.": lr} | ({"base.": base_lr} if trains_base else {})
        decays = {"adapter.": decay} | ({"base.": base_decay} if trains_base else {})
        check_options(optimizer, decays, restore)
        model, self.name = _with_student_and_teacher(model, adapter)
        student = _parameters(model, self.name) | (changes_of(model) if trains_base else {})
        super().__init__(
            model, student, rates=rates, optimizer=optimizer, decays=decays, restore=restore, mean=mean, std=std,
            seed=seed, settings=settings,
        )  # fmt: skip
        # the teacher's adapter itself is what is averaged
        self.teacher |= _parameters(model, _TEACHER)
        self.view, self.uncertainty, self.counts = view, torch.zeros(()), self.counts | {"above": 0, "below": 0}
        self._rest()

    def adapt(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits and the consistency loss, at the scales that the teacher's uncertainty gives."""
        with self._allotted(images):
            with torch.no_grad():
                answer = self.call(images, self.teacher)
            try:
                self.model.set_adapter(self.name)
                student = self.call(images, self.student)
                return answer, consistency(answer, student, self.settings["symmetric"])
            finally:
                self._rest()

    @torch.no_grad()
    def measure(self, images: Tensor) -> Tensor:
        """The teacher's uncertainty u of a batch: a number, or [N] with `per_sample`. Draws from the generator."""
        views = (self.view(images, self.generator) for _ in range(self.settings["views"]))
        logits = torch.stack([self.call(view, self.teacher) for view in views])
        u = self.settings["factor"] * logits.var(0).mean(1)
        return u if self.settings["per_sample"] else u.mean()

    def _allotted(self, images: Tensor) -> AbstractContextManager[None]:
        allotment, threshold = self.settings["allotment"], self.settings["threshold"]
        if allotment == "none":
            return nullcontext()
        self.uncertainty = self.measure(images)
        above = int((self.uncertainty >= threshold).sum())
        self.counts["above"] += above
        self.counts["below"] += self.uncertainty.numel() - above
        return scaled(self.model, *allot(self.uncertainty, threshold, inverted=allotment == "inverted"))

    def _rest(self) -> None:
        self.model.set_adapter(_TEACHER, inference_mode=True)
        # PEFT freezes an adapter that is not active, and no gradient could be taken of it
        for name, value in self.student.items():
            if name.startswith("adapter."):
                value.requires_grad_(True)


def allot(uncertainty: Tensor, threshold: float, inverted: bool = False) -> tuple[Tensor, Tensor]:
    """The scales (λ_l, λ_h) that homeostatic knowledge allotment gives.

    Args:
        uncertainty: u, of any shape; above 1 it counts as 1.
        threshold: Θ.
        inverted: Swap them.
    """
    u = uncertainty.clamp(max=1)
    high = torch.where((uncertainty >= threshold) != inverted, 1 + u, 1 - u)
    return 2 - high, high


def _check_settings(settings: dict[str, object]) -> None:
    if settings["allotment"] not in ("homeostatic", "inverted", "none"):
        raise ValueError(f"allotment must be homeostatic, inverted or none, not {settings['allotment']!r}")
    for name in ("threshold", "factor"):
        if settings[name] < 0:
            raise ValueError(f"{name} must be at least 0, not {settings[name]}")
    if settings["views"] < 2:
        raise ValueError(f"views must be at least 2, for a variance, not {settings['views']}")


def _with_student_and_teacher(model: nn.Module, adapter: ViDA | None) -> tuple[PeftModel, str]:
    """The model with a ViDA adapter and its teacher, and the name of the first."""
    model, name = _with_student(model, adapter)
    if _TEACHER in model.peft_config:
        raise ValueError(f"the model has an adapter '{_TEACHER}' already: delete_adapter('{_TEACHER}') first")
    model.add_adapter(_TEACHER, copy.deepcopy(model.peft_config[name]).changed(inference_mode=False))
    teacher = _parameters(model, _TEACHER)
    with torch.no_grad():
        for key, value in _parameters(model, name).items():
            teacher[key].copy_(value)
    return model, name


def _with_student(model: nn.Module, adapter: ViDA | None) -> tuple[PeftModel, str]:
    """The model with a ViDA adapter, and that adapter's name."""
    if not isinstance(model, PeftModel):
        adapter = ViDA() if adapter is None else adapter
        if not isinstance(adapter, ViDA):
            raise ValueError(f"the adapter must be a ViDA, whose scales can be set, not {type(adapter).__name__}")
        return get_peft_model(model, adapter, "student"), "student"
    name = model.active_adapter
    config = model.peft_config[name]
    if adapter is not None:
        raise ValueError("the model has an adapter already: give a plain classifier, or leave adapter out")
    if not isinstance(config, ViDA):
        raise ValueError(f"the model's active adapter '{name}' is no ViDA, whose scales could be set")
    if config.modules_to_save:
        raise ValueError(
            f"adapter '{name}' has modules of its own ({', '.join(config.modules_to_save)}), which would not be "
            "adapted: put their values into the classifier itself, and leave modules_to_save out"
        )
    return model, name


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's trained parameters by layer and name."""
    return {
        f"adapter.{layer.name}.{key}": value
        for layer, update in updates_of(model, name)
        for key, value in update.named_parameters()
        if key not in update.frozen_parameters() | {"base_sample"}
    }
