"""KIND: components of a weight that all classes share, and components that one class has for itself."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.adapters.carriers import carriers
from folklora.adapters.host.layer import FolkloraLayer
from folklora.adapters.host.saved import add_with_values, placement
from folklora.adapters.lora import LoRA
from folklora.factored import Factors, concatenate
from folklora.spectrum import orthonormality_error, top

NO_CLASS = -1
"""The label of a row that belongs to no class: it gets the shared components alone."""


@dataclass
class KIND(AdapterConfig):
    r"""Knowledge integration and diversion: learngenes for all classes, tailors behind a class gate.

    An update is a sum of components Θ_i = (u_i [out], σ_i, v_i [in]). The first N_G are learngenes, the others
    tailors, t for each of C classes; r = N_G + C t. For a row of class c,
        ΔW(c) = U diag(σ ⊙ m_c) Vᵀ,   m_c = 1 on the learngenes and on the tailors of c, 0 on the other tailors
        y = W x + b + U ((σ ⊙ m_c) ⊙ (Vᵀ x))            U: [out, r]   σ: [r]   V: [in, r], held as its rows v_i
    Each row's loss reaches the learngenes and its own class's tailors, nothing else: that routing is the method, there
    is no further loss. r (in + out + 1) parameters a weight are trained. (Weight decay shrinks closed tailors too.)

    The classes of a batch's rows are told with each call, `model(..., class_labels=[3, 7])`, or for several calls by
    `with folklora.classes(model, [3, 7]):`. A call without them is an error. -1 is no class: the learngenes alone, as
    for the null class of classifier-free guidance. Weights [rows, C] in place of labels are a soft gate, as in the
    follow-up DivControl; with t = 1 each class is one tailor.

    The paper trains a network from the start whose weights are the components; two starts are offered:
    `start="zero"`, an overlay on a pretrained W: v Kaiming-uniform, σ = 1, u = 0, so the first step sees the base;
    `start="weight"`, the paper's form: the components are the r strongest of W = U₀ diag(σ₀) V₀ᵀ, in random order (so
    that learngenes and tailors get strong and weak ones), and a frozen copy is taken off:
        W(c) = W - U₀ diag(σ₀) V₀ᵀ + U diag(σ ⊙ m_c) Vᵀ
    With r = min(in, out) nothing is left of W beside the components: a freshly initialised network is then trained
    as in the paper, at the price of a frozen copy. With `keep_variance`, σ starts at σ₀ √(r / (N_G + t)), so that the
    open part has the size of the whole; without it, and with all gates open, the start is W.

    `attach` adds tailors for new classes to frozen learngenes; `extract` cuts out what some classes need: several as
    a KIND adapter, a single one as a plain LoRA, which merges and exports (KIND itself cannot: its gates differ by
    row).

    Source: Xie et al., "KIND: Knowledge Integration and Diversion for Training Decomposable Models", ICML 2025,
    arXiv 2408.07337; soft gate: "DivControl", AAAI 2026, arXiv 2507.23620. No code is public. The decomposition and
    a class gate are the papers'; that it opens a fixed group of tailors for each class is our reading; the sizes
    (N_G, t), the start values, `keep_variance` and `orthogonality` are ours.

    When to choose:
        Labelled classes share a part and differ in another, and later only some are deployed, or new ones come: the
        shared part then serves as the frozen start and a few numbers are trained for each new class. It needs a class
        for every row in training and in use; where none is known, use LoRA or SMoRA.

    Equation:
        W(c) = W + \sum_{i < N_G} \sigma_i \, u_i v_i^\top + \sum_{i \in T_c} \sigma_i \, u_i v_i^\top

    Example:
        import folklora
        from peft import get_peft_model
        from folklora import KIND, tiny
        from folklora.adapters.kind import extract

        model = get_peft_model(tiny.llama(), KIND(learngenes=4, tailors=2, classes=3, target_modules=["q_proj"]))
        batch = tiny.batch()  # four rows
        model(**batch, labels=batch["input_ids"], class_labels=[0, 1, 2, 1]).loss.backward()
        with folklora.classes(model, [2, 2, 2, -1]):
            model(**batch)
        extract(model, 2, into="only-two")  # a plain LoRA
        model.set_adapter("only-two")
        merged = model.merge_and_unload()

    Args:
        learngenes: N_G, components that all classes share.
        tailors: t, components of each class.
        classes: Their labels, whole numbers of at least 0; a number C stands for 0 ... C - 1.
        attached: How many of the last classes were attached; if any, their tailors alone are trained.
        start: "zero" or "weight", as above.
        taken: How many components were taken off W, where that is no longer r; kept by `attach` and `extract`.
        keep_variance: Scale σ at the start; for `start="weight"`.
        orthogonality: Weight of ‖UᵀU - I‖² + ‖VᵀV - I‖², summed over the adapted weights; the papers name none.
    """

    method: str = "kind"
    learngenes: int = 4
    tailors: int = 2
    classes: list[int] | int = 2
    attached: int = 0
    start: Literal["zero", "weight"] = "zero"
    taken: int | None = None
    keep_variance: bool = True
    orthogonality: float = 0.0

    paper: ClassVar[str] = "Xie et al. 2025, arXiv 2408.07337"
    trains: ClassVar[str] = "U, σ, V of shared and of class-specific components"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.classes, int):
            self.classes = list(range(self.classes))
        _check_labels(self.classes)
        if self.learngenes < 0 or self.tailors < 1 or not self.components:
            raise ValueError(
                "KIND needs tailors >= 1, learngenes >= 0 and at least one component, not "
                f"{self.learngenes} learngenes and {self.tailors} tailors for each of {len(self.classes)} classes"
            )
        if not 0 <= self.attached <= len(self.classes):
            raise ValueError(f"attached must be between 0 and the {len(self.classes)} classes, not {self.attached}")
        if self.start not in ("zero", "weight"):
            raise ValueError(f"start must be 'zero' or 'weight', not {self.start!r}")
        if self.dropout and self.start == "weight":
            raise ValueError('KIND with start="weight" takes no dropout: it would drop components of the weight')
        if self.orthogonality < 0:
            raise ValueError(f"orthogonality must be at least 0, not {self.orthogonality}")
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError("KIND takes no rank_pattern or alpha_pattern: all layers have the same components")

    @property
    def components(self) -> int:
        """r = N_G + C t."""
        return self.learngenes + self.tailors * len(self.classes)

    @property
    def origin(self) -> int:
        """How many components of W are taken off it."""
        if self.start == "zero":
            return 0
        return self.components if self.taken is None else self.taken

    def class_gate(self, labels: Tensor) -> Tensor:
        """The weight of each class in each row, [rows, C]: 1 for a row's own class; weights are taken as they are."""
        if labels.is_floating_point():
            if labels.dim() != 2 or labels.shape[1] != len(self.classes):
                raise ValueError(
                    f"weights of {len(self.classes)} classes are [rows, classes], not {list(labels.shape)}"
                )
            return labels
        if labels.dim() != 1:
            raise ValueError(f"class labels are one number a row, not of shape {list(labels.shape)}")
        own = labels.unsqueeze(-1) == torch.tensor(self.classes, dtype=torch.int64, device=labels.device)
        known = own.any(-1) | (labels == NO_CLASS)
        if torch.compiler.is_compiling():
            torch._assert_async(known.all(), "a class label is unknown to the adapter")
        elif not known.all():
            unknown = ", ".join(map(str, sorted(set(labels[~known].tolist()))))
            raise ValueError(
                f"class {unknown} is unknown; the classes are {self.classes}, and {NO_CLASS} is none of them"
            )
        return own.float()

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """More open components than the weight has, or for `start="weight"` more components."""
        limit = min(shape)
        count = max(self.learngenes + self.tailors, self.origin)
        if count <= limit:
            return []
        what = "components" if self.origin else "components of a class (learngenes + tailors)"
        return [f"{count} {what} are above {limit}, the rank of layer '{name}' with weight {list(shape)}"]

    def update(self, weight: Tensor) -> KINDUpdate:
        """Learngenes and tailors at their start; where the weight is decomposed, their frozen copy."""
        if self.start == "zero":
            return self._closed(tuple(weight.shape), weight)
        if self.origin != self.components or self.attached:
            raise ValueError("these options are of a KIND adapter that was cut or grown; start anew from KIND(...)")
        best = top(weight, self.components)
        order = torch.randperm(self.components, device=weight.device)
        origin = Components(best.U[:, order], best.S[order], best.V.T[order])
        opened = min(self.learngenes + self.tailors, self.components)
        scale = math.sqrt(self.components / opened) if self.keep_variance else 1.0
        return KINDUpdate(self, Components(origin.U, origin.sigma * scale, origin.V), None, origin)

    def empty(self, shape: tuple[int, int]) -> KINDUpdate:
        """The same shapes, to be filled."""
        return self._closed(shape)

    def _closed(self, shape: tuple[int, int], like: Tensor | None = None) -> KINDUpdate:
        new = self.attached * self.tailors
        counts = (self.components - new, new, self.origin)
        return KINDUpdate(self, *(Components.closed(shape, count, like) if count else None for count in counts))

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out + 1), or that of the attached tailors alone."""
        return (self.attached * self.tailors if self.attached else self.components) * (sum(shape) + 1)


class Components(nn.Module):
    """n rank-one terms Σ σ_i u_i v_iᵀ: U [out, n], sigma [n] and V [n, in], whose rows are the v_i."""

    def __init__(self, U: Tensor, sigma: Tensor, V: Tensor) -> None:
        super().__init__()
        self.U, self.sigma, self.V = (nn.Parameter(part.detach().clone()) for part in (U, sigma, V))

    @classmethod
    def closed(cls, shape: tuple[int, int], count: int, like: Tensor | None = None) -> Components:
        """New terms that add nothing yet: u = 0, σ = 1, v Kaiming-uniform, so that u learns first."""
        sigma = torch.ones(count, device=None if like is None else like.device)
        return cls(zeros(shape[0], count, like=like), sigma, kaiming_uniform(count, shape[1], like))


class KINDUpdate(Update):
    """ΔW(c) = Σ over the learngenes and c's tailors of σ u vᵀ, less the frozen start (origin) where W was decomposed.

    `components` holds the learngenes, then each class's tailors; `attached` the tailors of classes that came later.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"origin.U", "origin.sigma", "origin.V"})
    gated: ClassVar[bool] = True
    reads_classes: ClassVar[bool] = True
    depends_on: ClassVar[str] = (
        "the class of each row (folklora.adapters.kind.extract makes a plain LoRA, with one weight, of one class)"
    )

    def __init__(
        self, config: KIND, components: Components | None, attached: Components | None, origin: Components | None
    ) -> None:
        super().__init__()
        self.components, self.attached, self.origin = components, attached, origin
        self.learngenes, self.tailors = config.learngenes, config.tailors
        self.orthogonality = config.orthogonality
        # what was taken off W comes back for one class at a time
        self.starts_at_base = origin is None or not config.classes

    def frozen_parameters(self) -> frozenset[str]:
        """The origin; once classes were attached, all but their tailors."""
        if self.attached is None:
            return self.frozen
        return self.frozen | {"components.U", "components.sigma", "components.V"}

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None, classes: Tensor | None = None) -> Factors:
        """([V; V₀], [σ ⊙ m; -σ₀], [U | U₀])."""
        learned, origin = self.split(x, mask, classes)
        return learned if origin is None else concatenate([learned, origin])

    def split(
        self, x: Tensor | None = None, mask: Tensor | None = None, classes: Tensor | None = None
    ) -> tuple[Factors, Factors | None]:
        """(V, σ ⊙ m, U) reads the dropped-out input, (V₀, -σ₀, U₀) the whole: it belongs to the base.

        Args:
            x: Not used.
            mask: Not used.
            classes: Weights of the classes, [batch, 1, ..., C].
        """
        if classes is None:
            raise ValueError("KIND's update depends on the class of each row, and none was given")
        U, sigma, V = self.gated_values()
        own = classes.repeat_interleave(self.tailors, dim=-1)
        gate = torch.cat([own.new_ones(*own.shape[:-1], self.learngenes), own], dim=-1)
        return Factors(V, gate * sigma, U), self._taken()

    def gated_values(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and V of all that stands behind the gate, in the gate's order."""
        parts = [part for part in (self.components, self.attached) if part is not None]
        if len(parts) == 1:
            return parts[0].U, parts[0].sigma, parts[0].V
        U, V = torch.cat([part.U for part in parts], dim=1), torch.cat([part.V for part in parts])
        return U, torch.cat([part.sigma for part in parts]), V

    def cut(self, slots: Sequence[int]) -> dict[str, Tensor]:
        """The values of the learngenes and of these classes' tailors (by position) alone, and the origin's."""
        U, sigma, V = (value.detach() for value in self.gated_values())
        own = [self.learngenes + slot * self.tailors + i for slot in slots for i in range(self.tailors)]
        index = torch.tensor([*range(self.learngenes), *own], dtype=torch.int64, device=U.device)
        values = {"components.U": U[:, index], "components.sigma": sigma[index], "components.V": V[index]}
        origin = {} if self.origin is None else dict(self.origin.named_parameters(prefix="origin"))
        return values | origin

    def fixed(self, slots: Sequence[int]) -> Factors:
        """What is added to W where the learngenes and these classes' tailors (by position) are open."""
        cut = self.cut(slots)
        opened = Factors(cut["components.V"], cut["components.sigma"], cut["components.U"])
        return opened if self.origin is None else concatenate([opened, self._taken()])

    def attach(self, count: int) -> None:
        """Append `count` tailors that add nothing yet; what was attached before belongs to the old ones."""
        self.components = Components(*self.gated_values())
        shape = len(self.components.U), self.components.V.shape[1]
        self.attached = Components.closed(shape, count, self.components.U)

    def penalty(self) -> Tensor | None:
        """Orthogonality of the components, of both sides; None where its weight is 0."""
        if not self.orthogonality:
            return None
        U, _, V = self.gated_values()
        return self.orthogonality * (orthonormality_error(U.T).square() + orthonormality_error(V).square())

    def _taken(self) -> Factors | None:
        return None if self.origin is None else Factors(self.origin.V, -self.origin.sigma, self.origin.U)


def attach(model: PeftModel, classes: Sequence[int], adapter_name: str = "default") -> None:
    """Give a KIND adapter tailors for new classes, which add nothing yet; all that it had is frozen.

    Train with a new optimizer over what asks for gradients, and with rows of the new classes.

    Args:
        model: A model that carries the adapter.
        classes: The new labels.
        adapter_name: The adapter.

    Raises:
        ValueError: The model has no such KIND adapter, or it knows one of the classes already.
    """
    pairs, config = _carriers(model, adapter_name), model.peft_config[adapter_name]
    labels = list(classes)
    if not labels:
        raise ValueError("attach needs at least one new class")
    _check_labels([*config.classes, *labels])
    for layer, update in pairs:
        update.attach(config.tailors * len(labels))
        layer.set_requires_grad(adapter_name, True)
    config.taken = config.origin or None
    config.classes, config.attached = [*config.classes, *labels], len(labels)


def extract(model: PeftModel, classes: int | Sequence[int], into: str, adapter_name: str = "default") -> None:
    """Add an adapter that holds what some classes need of a KIND adapter, to be used without the rest.

    Args:
        model: A model that carries the KIND adapter, which stays as it is.
        classes: One label (-1: the learngenes alone) gives a plain LoRA with the same function on that class, which
            merges and exports. Several labels, or an empty list, give a KIND adapter of these classes.
        into: Name of the new adapter. It is not active before `model.set_adapter`.
        adapter_name: The KIND adapter.

    Raises:
        ValueError: The model has no such KIND adapter, or it does not know one of the classes.
    """
    pairs, config = _carriers(model, adapter_name), model.peft_config[adapter_name]
    single = isinstance(classes, int)
    labels = [] if single and classes == NO_CLASS else [classes] if single else list(classes)
    unknown = [label for label in labels if label not in config.classes]
    if unknown:
        raise ValueError(f"adapter '{adapter_name}' knows no class {unknown}; its classes are {config.classes}")
    slots = [config.classes.index(label) for label in labels]
    if single:
        values = {layer.name: _as_lora(update.fixed(slots)) for layer, update in pairs}
        new = _lora(config, {name: len(value["A"]) for name, value in values.items()})
    else:
        values = {layer.name: update.cut(slots) for layer, update in pairs}
        new = dataclasses.replace(config, classes=labels, attached=0, taken=config.origin or None)
    add_with_values(model, into, new, values, adapter_name)


def _check_labels(labels: Sequence[int]) -> None:
    wrong = [label for label in labels if isinstance(label, bool) or not isinstance(label, int) or label < 0]
    if wrong:
        raise ValueError(f"class labels must be whole numbers of at least 0, not {wrong}")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"every class has one label of its own; given twice: {twice}")


def _carriers(model: PeftModel, adapter_name: str) -> list[tuple[FolkloraLayer, KINDUpdate]]:
    pairs = carriers(model, adapter_name, KINDUpdate, "KIND")
    for layer, _ in pairs:
        layer.admit_loaded([adapter_name])
    return pairs


def _as_lora(factors: Factors) -> dict[str, Tensor]:
    # with the origin there may be more terms than the weight has rank; then fewer hold the same
    A, B = factors.truncate(min(len(factors.B), factors.A.shape[1])).to_lora()
    return {"A": A, "B": B}


def _lora(config: KIND, ranks: dict[str, int]) -> LoRA:
    common = max(ranks.values(), key=list(ranks.values()).count)
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return LoRA(r=common, alpha=common, rank_pattern=others, alpha_pattern=dict(others), **placement(config))
