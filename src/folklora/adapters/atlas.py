"""aTLAS: task vectors added to the base with one learned coefficient for each vector and block."""

from __future__ import annotations

import copy
import functools
import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.host.layer import updates_of
from folklora.adapters.sparse import refuse_dropout, whole
from folklora.adapters.task_vectors import TaskVectors
from folklora.factored import Factors

# a base that was rounded to bfloat16 changes θ_t - θ_0 by less, unless almost nothing was learnt
_SAME_NORM = 0.05


@dataclass
class ATLAS(AdapterConfig):
    r"""Anisotropic scaling of task vectors: of many models' knowledge, only the mixture is learnt.

    A block b is the weight of one adapted layer, τ_t^(b) = θ_t^(b) - θ_0^(b) the change that model t made there:
        W^(b) = θ_0^(b) + Σ_t λ_tb τ_t^(b)            Λ: [T, B], from 0, so that the first step sees the base
    Only Λ is trained, T numbers a layer; ∂L/∂λ_tb = ⟨∂L/∂W^(b), τ_t^(b)⟩. With `isotropic`, one λ_t serves all blocks
    (T numbers in all: task arithmetic whose weights are learnt). With `parts` = K ("aTLAS × K"), every block is cut
    into K random disjoint parts of equal size, each with its own coefficient:
        W^(b) = θ_0^(b) + Σ_t Σ_k λ_tbk (m_k ⊙ τ_t^(b))            T B K numbers, m_k of 0 and 1, Σ_k m_k = 1

    Task vectors are named by folder. Where all are adapters (LoRA, or a Folklora adapter that has factors) and K = 1,
    they stay factors, concatenated, and the update is of low rank: ΔW = [B_1 | B_2 ...] diag(λ) [A_1; A_2; ...]; it
    exports to a LoRA. Checkpoints, or K > 1, take T frozen float32 copies of the adapted weights in memory. A saved
    adapter holds Λ, the folders' names as they were given and the length of each τ_t^(b), and reads the task vectors
    again. (So `folklora merge` does not take its folder: save what `merge_and_unload` gives.) Heads that an adapter
    trained in full (`modules_to_save`) are not composed. τ_t^(b) is measured from the weight that the base has here:
    if that is rounded or quantised, λ_tb = 1 still gives θ_t^(b).

    Uses: few shots (cross-entropy, any Trainer: lr 0.1, cosine, no warm-up, 10 epochs; leave the target's own vector
    out of the bank); a model of many tasks (the sum of their losses, lr 1e-3); unlearning (- the target's loss + a
    control's); no labels (`folklora.adapters.unlabelled`). The authors have AdamW with weight decay 0.1 on Λ: it pulls
    to the base.

    AdaMerging is the same parametrisation with `init=0.3` and the entropy of predictions on unlabelled data as its
    loss, and `isotropic=True` is its task-wise form.

    The paper's blocks are all tensors; here they are the weights of the target modules (its own partition code, and its
    "weights only", do that too: 84.2 instead of 85.0 on its eight tasks). `folklora.adapters.composition` composes
    norms and biases too. Our masks are drawn for each block from (seed, layer name), not once a shape. With a budget of
    b vectors a block, the paper's best choice is `strongest`: at Λ = 0, the b with the largest |∂L/∂λ_tb|.

    Source: Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad, "Knowledge Composition using Task Vectors with
    Learned Anisotropic Scaling", NeurIPS 2024, arXiv 2407.02880; AdaMerging: Yang et al., ICLR 2024, arXiv 2310.02575.

    When to choose:
        There are several fine-tuned models of one base and a handful of examples of a new task, or none with labels: so
        few numbers hardly overfit, and the result is one plain model. What none of them knows cannot be composed: with
        more data, LoRA. Full checkpoints cost T copies of the weights in training.

    Equation:
        \theta^{(b)} = \theta_0^{(b)} + \sum_t \lambda_{t,b} \, \tau_t^{(b)}

    Example:
        import torch
        from folklora import ATLAS, LoRA, tiny
        from peft import get_peft_model

        for seed, task in enumerate(["art", "law"]):  # in life, two trained adapters
            torch.manual_seed(seed)
            tiny.trained(LoRA(r=2, target_modules=["q_proj"])).save_pretrained(task)
        model = get_peft_model(tiny.llama(), ATLAS(vectors={"art": "art", "law": "law"}))
        model.print_trainable_parameters()  # 4: two layers, two vectors
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        tiny.loss(model).backward()
        optimizer.step()
        merged = model.merge_and_unload()

    Args:
        target_modules: As for every adapter; None takes the layers that the adapters change, or all linear layers.
        vectors: Name → an adapter's folder, a checkpoint's folder, or a safetensors file of a model; put in the names'
            order.
        isotropic: One coefficient a vector for all blocks.
        parts: K, parts of a block.
        init: Start of every coefficient; 0.3 for AdaMerging.
        norm: p, for the regulariser 1/2 · mean_b ‖Λ_b‖_p, 1 or 2; None has none, as in the paper's main results.
        seed: Of the parts.
        blocks: Layer → names of the task vectors that are composed there, where a budget does not allow for all;
            `strongest` chooses them.
    """

    method: str = "atlas"
    target_modules: list[str] | str | None = None
    vectors: dict[str, str] = field(default_factory=dict)
    isotropic: bool = False
    parts: int = 1
    init: float = 0.0
    norm: int | None = None
    seed: int = 0
    blocks: dict[str, list[str]] = field(default_factory=dict)

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2407.02880"
    trains: ClassVar[str] = "one coefficient for each task vector and block"
    penalty_reduction: ClassVar[str] = "mean"
    bank: ClassVar[TaskVectors | None] = None
    """The task vectors, once `fit` has found them; no option."""
    layer: ClassVar[str] = ""
    """The layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_dropout(self)
        # the order of coefficients; a saved configuration is sorted too
        self.vectors = dict(sorted(self.vectors.items()))
        if self.parts < 1:
            raise ValueError(f"parts must be at least 1, not {self.parts}")
        if self.norm not in (None, 1, 2):
            raise ValueError(f"norm must be 1, 2 or None, not {self.norm}")
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError("ATLAS takes no rank_pattern or alpha_pattern: the task vectors have their ranks")
        if self.isotropic and (self.norm is not None or self.blocks):
            raise ValueError("norm and blocks are of coefficients that each block has for itself: set isotropic=False")
        unknown = sorted({name for names in self.blocks.values() for name in names} - set(self.vectors))
        if unknown:
            raise ValueError(f"blocks name {', '.join(unknown)}; the task vectors are {', '.join(self.vectors)}")

    def fit(self, model: nn.Module) -> None:
        """Find the task vectors, and where no target is named, the layers that they change.

        Raises:
            ValueError: No task vector is named.
            FileNotFoundError: A folder holds none.
        """
        if not self.vectors:
            raise ValueError('ATLAS composes task vectors: name them, vectors={"name": "folder", ...}')
        self.bank = TaskVectors({name: str(folder) for name, folder in self.vectors.items()}, model)
        if self.target_modules is None:
            self.target_modules = self.bank.layers() if self.bank.all_factors else "all-linear"

    def for_module(self, name: str) -> ATLAS:
        """The options for one layer, which know its name."""
        own = copy.copy(super().for_module(name))
        own.layer = name
        return own

    @property
    def names(self) -> list[str]:
        """The task vectors of this layer, in order."""
        return self.blocks.get(self.layer, list(self.vectors))

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """Task vectors that do not fit, or more parts than entries."""
        if self.parts > shape[0] * shape[1]:
            return [f"{self.parts} parts are more than layer '{name}' with weight {list(shape)} has entries"]
        return self.bank.problems(self.names, name, shape)

    def update(self, weight: Tensor) -> ATLASUpdate:
        """The layer's task vectors, with coefficients at their start."""
        update = self.empty(tuple(weight.shape)).to(weight.device)
        for name, value in update.read(weight).items():
            setattr(update, name, nn.Parameter(value.to(weight.device), requires_grad=False))
        return update

    def empty(self, shape: tuple[int, int]) -> ATLASUpdate:
        """The same shapes, zeros where something is frozen."""
        factored = self.bank.all_factors and self.parts == 1
        return FactoredATLASUpdate(shape, self) if factored else DenseATLASUpdate(shape, self)

    def shared(self, layers: dict[str, tuple[int, int]], like: Tensor) -> dict[str, nn.Parameter]:
        """The coefficients, where all layers have the same."""
        return {"coefficients": self.start(like.device)} if self.isotropic else {}

    def start(self, device: torch.device | None = None) -> nn.Parameter:
        """Coefficients [T, K] at their start."""
        return nn.Parameter(torch.full((len(self.names), self.parts), float(self.init), device=device))

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """T K."""
        return 0 if self.isotropic else len(self.names) * self.parts

    def shared_count(self, layers: dict[str, tuple[int, int]]) -> int:
        """T K, where all layers have the same."""
        return len(self.vectors) * self.parts if self.isotropic else 0


class ATLASUpdate(Update):
    """Σ_t λ_t τ_t on one layer; `lengths` [T] are the ‖τ_t‖, by which a task vector is known again."""

    def __init__(self, config: ATLAS) -> None:
        super().__init__()
        self.coefficients = None if config.isotropic else config.start()
        self.lengths = nn.Parameter(torch.zeros(len(config.names)), requires_grad=False)
        self.starts_at_base = config.init == 0
        self.norm, self.bank, self.names, self.layer = config.norm, config.bank, config.names, config.layer

    def scales(self) -> Tensor:
        """λ [T, K]."""
        return self.common("coefficients") if self.coefficients is None else self.coefficients

    def penalty(self) -> Tensor | None:
        """1/2 ‖λ‖_p; the host takes the mean of the blocks."""
        return None if self.norm is None else 0.5 * torch.linalg.vector_norm(self.scales(), self.norm)

    def read(self, weight: Tensor) -> dict[str, Tensor]:
        """The frozen values, of the task vectors on disk and the base weight."""
        raise NotImplementedError

    def derive(self, weight: Tensor, saved: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
        """The task vectors, read again.

        Raises:
            ValueError: They are not those of the training.
        """
        found = self.read(weight)
        lengths = found.pop("lengths").cpu()
        if not torch.allclose(lengths, saved["lengths"].detach().cpu().to(lengths), rtol=_SAME_NORM):
            raise ValueError(
                f"layer '{layer}': the task vectors have lengths {lengths.tolist()}, and those that the coefficients "
                f"were learnt for {saved['lengths'].tolist()}: a folder in `vectors` holds another model by now"
            )
        return {name: value.to(weight.device) for name, value in found.items()}


class FactoredATLASUpdate(ATLASUpdate):
    """The task vectors as A [R, in] and B [out, R], R = Σ_t r_t."""

    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B", "lengths"})
    unsaved: frozenset[str] = frozenset({"A", "B"})

    def __init__(self, shape: tuple[int, int], config: ATLAS) -> None:
        super().__init__(config)
        self.shape = shape
        self.ranks = [part.rank for part in config.bank.factors(config.names, config.layer, shape)]
        self.A = nn.Parameter(torch.zeros(sum(self.ranks), shape[1]), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(shape[0], sum(self.ranks)), requires_grad=False)

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(A, λ repeated for the ranks of each task vector, B)."""
        scales = self.scales()
        s = torch.cat([scales[task].expand(rank) for task, rank in enumerate(self.ranks)])
        return Factors(self.A, s.to(self.A.device), self.B)

    def read(self, weight: Tensor) -> dict[str, Tensor]:
        """A, B and lengths."""
        parts = self.bank.factors(self.names, self.layer, self.shape)
        A, B = torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts], dim=1)
        # ‖B A‖² = ⟨BᵀB, AAᵀ⟩
        squares = [((part.B.T @ part.B) * (part.A @ part.A.T)).sum().clamp(min=0) for part in parts]
        return {"A": A, "B": B, "lengths": torch.stack(squares).sqrt()}


class DenseATLASUpdate(ATLASUpdate):
    """The task vectors as tau [T, out, in]; `part` [out, in] is the part of each entry, where there are several."""

    is_dense: ClassVar[bool] = True
    frozen: ClassVar[frozenset[str]] = frozenset({"tau", "part", "lengths"})
    unsaved: frozenset[str] = frozenset({"tau", "part"})

    def __init__(self, shape: tuple[int, int], config: ATLAS) -> None:
        super().__init__(config)
        self.parts, self.seed = config.parts, config.seed
        self.tau = nn.Parameter(torch.zeros(len(config.names), *shape), requires_grad=False)
        self.part = whole(torch.zeros(shape, dtype=torch.int32)) if config.parts > 1 else None

    def dense(self, weight: Tensor) -> Tensor:
        """Σ_t λ_t τ_t, or Σ_t Σ_k λ_tk m_k ⊙ τ_t."""
        scales = self.scales().to(self.tau)
        # half precision has not the digits for a sum of small changes
        with torch.autocast(self.tau.device.type, enabled=False):
            if self.part is None:
                return torch.tensordot(scales[:, 0], self.tau, dims=1)
            index = self.part.long()
            return functools.reduce(
                torch.add, (own[index] * tau for own, tau in zip(scales.unbind(), self.tau.unbind(), strict=True))
            )

    def read(self, weight: Tensor) -> dict[str, Tensor]:
        """tau, part and lengths."""
        tau = self.bank.dense(self.names, self.layer, weight).float()
        found = {"tau": tau, "lengths": tau.flatten(1).norm(dim=1)}
        if self.part is not None:
            found["part"] = random_parts(tuple(weight.shape), self.parts, f"{self.seed} {self.layer}")
        return found


def random_parts(shape: tuple[int, int], parts: int, seed: str) -> Tensor:
    """The part of each entry, of equal sizes to one entry and at random."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(number))
    return (order % parts).to(torch.int32).view(shape)


def strongest(model: nn.Module, budget: int, adapter_name: str = "default") -> dict[str, list[str]]:
    """For each layer the task vectors with the largest |∂L/∂λ_tb|, of the gradients that the coefficients have now.

    Call it after the backward pass of a few batches, with the coefficients at 0; give the answer to a new adapter as
    `blocks`.

    Args:
        model: A PEFT model that carries an ATLAS adapter with a coefficient for each block.
        budget: b, how many to keep a layer.
        adapter_name: The adapter.

    Raises:
        ValueError: There is no such adapter, its coefficients have no gradients, or b is below 1.
    """
    pairs = [pair for pair in updates_of(model, adapter_name) if isinstance(pair[1], ATLASUpdate)]
    if not pairs or any(update.coefficients is None for _, update in pairs):
        raise ValueError(f"the model has no ATLAS adapter '{adapter_name}' with a coefficient for each block")
    if any(update.coefficients.grad is None for _, update in pairs):
        raise ValueError("the coefficients have no gradients yet: call backward() of the loss of a few batches first")
    if budget < 1:
        raise ValueError(f"the budget must be at least 1, not {budget}")
    kept = {}
    for layer, update in pairs:
        sizes = update.coefficients.grad.abs().sum(1)
        chosen = set(sizes.topk(min(budget, len(sizes))).indices.tolist())
        kept[layer.name] = [name for index, name in enumerate(update.names) if index in chosen]
    return kept
