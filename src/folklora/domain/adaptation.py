"""Continual test-time adaptation: a classifier that answers each batch of a stream, then learns from it unlabelled."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from folklora.stream.files import replacing

# values that went through bfloat16 once
_SAME = 2.0**-7
_OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.999)),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
}


class ContinualTestTimeAdaptation(ABC):
    """What the methods have in common: predict, learn, reset, save, resume. The base's own weights are never written.

    What is trained are adapters, or changes that are added to the base's parameters for the length of a call; `student`
    holds them, `teacher` their moving average where the method has one, `start` what both began with. The model stays
    in evaluation mode throughout, so that no dropout of the backbone is active and norms over batches keep the
    statistics of the source. Labels are asked for nowhere.

    Args:
        model: An image classifier of transformers: `model(pixel_values=...)` has `.logits`.
        student: What is trained, by name; names that begin with "base." are changes of the base's parameters.
        rates: Learning rate of each kind of parameter: of those whose names begin with the key.
        optimizer: "adam" or "sgd" (momentum 0.9, Nesterov).
        decays: a of the teacher's average, by kind; None where there is no teacher.
        restore: Probability with which each element of the student goes back to its start after a step.
        mean: Taken off the images, one number a channel or one for all; the model's image processor knows it.
        std: What the images are divided by then.
        seed: Of everything drawn.
        settings: What else a saved state must agree with.
    """

    def __init__(
        self,
        model: nn.Module,
        student: Mapping[str, nn.Parameter],
        *,
        rates: Mapping[str, float],
        optimizer: str = "adam",
        decays: Mapping[str, float] | None = None,
        restore: float = 0.0,
        mean: Sequence[float] | float = 0.5,
        std: Sequence[float] | float = 0.5,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_options(optimizer, decays or {}, restore)
        self.model = model.eval()
        self.student, self.seed = dict(student), seed
        self.start = {name: value.detach().clone() for name, value in self.student.items()}
        self.teacher = {} if decays is None else {name: value.clone() for name, value in self.start.items()}
        self.mean, self.std = _per_channel(mean), _per_channel(std)
        own = {"optimizer": optimizer, "rates": dict(rates), "decays": dict(decays or {}), "restore": restore}
        own |= {"mean": mean, "std": std, "seed": seed}
        # as a file gives them back: tuples as lists
        self.settings = json.loads(json.dumps({**own, **(settings or {})}))
        groups = [{"params": [*_of_kind(self.student, kind).values()], "lr": rate} for kind, rate in rates.items()]
        self.optimizer = _OPTIMIZERS[optimizer](groups) if self.student else None
        self._base = {name: value for name, value in model.named_parameters() if ".folklora_" not in name}
        self.generator = torch.Generator().manual_seed(seed)
        self.counts = {"batches": 0}

    @abstractmethod
    def adapt(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits that are the answer [N, classes], and the loss to learn by (None learns nothing)."""

    def predict(self, images: Tensor) -> Tensor:
        """Answer a batch, then learn from it.

        Args:
            images: [N, C, H, W] in [0, 1], of the model's size.

        Returns:
            Logits [N, classes], float32, as they were before the batch was learnt from.

        Raises:
            ValueError: The images are of another shape or not in [0, 1].
            FloatingPointError: The loss is not finite; nothing was learnt.
        """
        _check_images(images)
        with torch.enable_grad():
            logits, loss = self.adapt(images)
        if loss is not None:
            self._learn(loss)
        self.counts["batches"] += 1
        return logits.detach()

    def _learn(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of batch {self.counts['batches'] + 1} is {loss.item()}; nothing was learnt from it. Lower "
                "the learning rate, reset(), or look at the images"
            )
        # not backward(): a base whose parameters ask for gradients must get none
        gradients = torch.autograd.grad(loss, list(self.student.values()), allow_unused=True)
        for parameter, gradient in zip(self.student.values(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for kind, decay in self.settings["decays"].items():
                average(self.teacher, self.student, decay, _of_kind(self.student, kind))
            if self.settings["restore"]:
                restore(self.student, self.start, self.settings["restore"], self.generator)

    def call(self, images: Tensor, changes: Mapping[str, Tensor] | None = None) -> Tensor:
        """The model's logits, float32, with changes added to its parameters for this call.

        Args:
            images: [N, C, H, W] in [0, 1].
            changes: By the parameter's name with "base." before it; others are passed over.
        """
        sample = next(iter(self._base.values()))
        images = images.to(sample.device, torch.float32)
        pixels = ((images - self.mean.to(images)) / self.std.to(images)).to(sample.dtype)
        names = {name.removeprefix("base."): name for name in changes or {} if name.startswith("base.")}
        if not names:
            return self.model(pixel_values=pixels).logits.float()
        values = {}
        for name, key in names.items():
            base = self._base[name].detach()
            values[name] = (base.float() + changes[key]).to(base.dtype)
        return functional_call(self.model, values, (), {"pixel_values": pixels}).logits.float()

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to where this began, with nothing learnt."""
        for values in (self.student, self.teacher):
            for name, value in values.items():
                value.copy_(self.start[name])
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self.generator.manual_seed(self.seed)
        self.counts = dict.fromkeys(self.counts, 0)

    def save(self, path: str | Path) -> None:
        """Write all that a stream's continuation needs as one safetensors file, whole or not at all; not the base."""
        tensors = {"generator": self.generator.get_state(), "base": self._sample()}
        for kind in ("student", "teacher", "start"):
            tensors |= {f"{kind}.{name}": value.detach() for name, value in getattr(self, kind).items()}
        tensors |= _optimizer_tensors(self.optimizer, list(self.student))
        tensors = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
        metadata = {"format": "pt", "method": type(self).__name__}
        metadata |= {"settings": json.dumps(self.settings), "counts": json.dumps(self.counts)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @torch.no_grad()
    def resume(self, path: str | Path) -> None:
        """Go on from what `save` wrote: later batches are answered as if the stream had not been interrupted.

        Raises:
            ValueError: The state is another method's, of other settings, or was made with another model.
        """
        with safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in keys}
        self._check_state(path, tensors, metadata)
        for kind in ("student", "teacher", "start"):
            for name, value in getattr(self, kind).items():
                value.copy_(tensors[f"{kind}.{name}"])
        if self.optimizer is not None:
            self._resume_optimizer(tensors)
        self.generator.set_state(tensors["generator"])
        self.counts = json.loads(metadata["counts"])

    def _check_state(self, path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        if metadata.get("method") != type(self).__name__:
            raise ValueError(f"{path} holds no state of {type(self).__name__} but of {metadata.get('method', 'none')}")
        theirs = json.loads(metadata["settings"])
        other = [name for name in self.settings.keys() | theirs.keys() if self.settings.get(name) != theirs.get(name)]
        if other:
            lines = [f"  {name} = {theirs.get(name)!r}, here {self.settings.get(name)!r}" for name in sorted(other)]
            raise ValueError("\n".join([f"{path} was saved with other settings:", *lines]))
        own = {f"start.{name}": value.shape for name, value in self.start.items()}
        found = {name: value.shape for name, value in tensors.items() if name.startswith("start.")}
        sample = self._sample()
        same = own == found and tensors["base"].shape == sample.shape
        if not same or not torch.allclose(tensors["base"], sample, rtol=_SAME, atol=1e-6):
            raise ValueError(f"{path} was saved with another base model")

    def _resume_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        state = self.optimizer.state_dict()
        state["state"] = {}
        for index, name in enumerate(self.student):
            prefix = f"optimizer.{name}:"
            kept = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
            if kept:
                state["state"][index] = kept
        self.optimizer.load_state_dict(state)

    def _sample(self) -> Tensor:
        """One value of each of the base's parameters: enough to tell one base from another."""
        values = (value.detach().flatten()[value.numel() // 2] for value in self._base.values())
        return torch.stack([value.float().cpu() for value in values])


def consistency(teacher: Tensor, student: Tensor, symmetric: bool = False) -> Tensor:
    """Cross-entropy H(p_t, p_s) of the student's softmax with the teacher's, mean over the batch.

    Args:
        teacher: Logits z_t [N, classes].
        student: Logits z_s [N, classes].
        symmetric: Take (H(p_t, p_s) + H(p_s, p_t)) / 2.
    """
    loss = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    if not symmetric:
        return loss
    return (loss - (student.softmax(1) * teacher.log_softmax(1)).sum(1).mean()) / 2


def average(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], decay: float, names: Iterable[str]) -> None:
    """θ_t ← a θ_t + (1 - a) θ_s for the named values, in place; a = 1 leaves the teacher, a = 0 copies the student."""
    for name in names:
        # a + (1 - a) need not round to 1: this form keeps what is equal equal
        teacher[name].lerp_(student[name].detach(), 1 - decay)


def restore(
    student: Mapping[str, Tensor], start: Mapping[str, Tensor], probability: float, generator: torch.Generator
) -> None:
    """Set each element of the student back to its start with some probability, in place."""
    for name, value in student.items():
        chosen = torch.rand(value.shape, generator=generator) < probability
        value.copy_(torch.where(chosen.to(value.device), start[name], value))


def changes_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Changes of a model's parameters, zero at first and float32, as a `student`; of all its own if none are named."""
    own = {name: value for name, value in model.named_parameters() if ".folklora_" not in name}
    chosen = own if names is None else names
    return {f"base.{name}": nn.Parameter(torch.zeros_like(own[name], dtype=torch.float32)) for name in chosen}


def _of_kind(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.startswith(kind)}


def check_options(optimizer: str, decays: Mapping[str, float], restore: float) -> None:
    """Refuse what no method takes; for those that change a model before they are made, to be called first.

    Raises:
        ValueError: There is no such optimizer, or a decay or probability is not from 0 to 1.
    """
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(_OPTIMIZERS)}, not {optimizer!r}")
    for kind, decay in decays.items():
        if not 0 <= decay <= 1:
            raise ValueError(f"the decay of the teacher ({kind}) must be from 0 to 1, not {decay}")
    if not 0 <= restore <= 1:
        raise ValueError(f"restore, a probability, must be from 0 to 1, not {restore}")


def _optimizer_tensors(optimizer: torch.optim.Optimizer | None, names: Sequence[str]) -> dict[str, Tensor]:
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return {
        f"optimizer.{names[index]}:{key}": value
        for index, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def _per_channel(value: Sequence[float] | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(f"images must be floating point [N, C, H, W], not {images.dtype} {list(images.shape)}")
    if not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError(
            f"images must be in [0, 1], not from {images.amin():.3g} to {images.amax():.3g}; give them before the "
            "image processor's normalisation, whose mean and std are options of this class"
        )
