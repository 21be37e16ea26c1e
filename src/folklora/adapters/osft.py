"""OSFT: train the weak singular directions of a weight in full; the strong ones are protected, exactly."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, zeros
from folklora.adapters.carriers import carriers
from folklora.factored import Factors, concatenate
from folklora.spectrum import triplets

# q (1 - u) of a decimal u may lie a rounding below a whole number
_ROUNDING = 1e-9


@dataclass
class OSFT(AdapterConfig):
    r"""Orthogonal subspace fine-tuning: constrained full fine-tuning, off the directions that hold the old knowledge.

    W = Σ_i σ_i u_i v_iᵀ with q = min(in, out) singular triplets, strongest first. The first k stay: U_h, σ_h, V_h. The
    last r = q - k are trained as they are, all of U [out, r], s [r], V [in, r], from (U₀, s₀, V₀):
        W_new = U_h diag(σ_h) V_hᵀ + U diag(s) Vᵀ,   U ⊥ U_h,   V ⊥ V_h.
    So (W_new - W) V_h = 0 and U_hᵀ (W_new - W) = 0: for inputs in the span of V_h nothing changes. r (in + out + 1)
    trained parameters a weight; k is the number that is protected, and r = q is full fine-tuning in factors. U and V
    need not stay orthonormal among themselves, and s may change its sign.

    The model's function reads U and V projected off the protected subspace, so the gradients are projected by the
    chain rule, and no optimizer, momentum or weight decay can leave it. After each step the parameters themselves are
    projected too. (With the gradients projected alone, Adam's rescaling of each element leaves the subspace.)

    W is never written to: the update is U diag(s) Vᵀ - U₀ diag(s₀) V₀ᵀ, formed in float32 at its true rank r, not 2r:
    on the weight's short side the complement of the protected vectors is the span of the start's, U₀ (in ≥ out), so
        ΔW = U₀ ((I + U₀ᵀ (U - U₀)) diag(s) Vᵀ - diag(s₀) V₀ᵀ),
    0 at the start to the bit, also over a bfloat16 base. It merges and exports as a LoRA of rank r. Weight decay
    pulls the unprotected part of W to 0, as it does in full fine-tuning. The authors train with AdamW at learning rates
    of 1e-6 to 2e-5, as for full fine-tuning, far below a LoRA's.

    Memory a weight, in float32 numbers: r (in + out + 1) trained (four times that with AdamW's state and the gradient),
    as many frozen for the start, and k times the long side where in ≠ out. With the default r = q/4 that is 2.5 times
    a square weight's size, of which 0.5 frozen, and 2.5 times that of a weight [11008, 4096], of which 1.1 frozen; full
    fine-tuning of float32 masters takes 4. From the second task on p (in + out) more hold what earlier tasks changed,
    p ≤ q the rank of that: 2 times a square weight's size at most. A forward pass computes one [long side, r] product
    a layer whatever the number of tokens, in about 2 r (k + r) (square: 4 r²) times the long side multiplications, and
    keeps another of that size for the backward pass. Saved files hold the trained and the frozen part, so that loading
    decomposes nothing; merge or export what is only to be used.

    `next_task` ends a task as the paper does: it decomposes the *current* weight W + ΔW, keeps ΔW as frozen factors
    (the paper writes it into W; the function is the same), protects the first k triplets and trains the rest. What a
    task put into weak directions is protected as far as it is among the k strongest then. The authors' scripts also
    train embeddings and norms: name them in `modules_to_save`. Their T5 and LLaMA scripts as published pass no
    gradient to U, s, V; their library does, and is followed here.

    Source: Nayak, Killamsetty, Han, Bhandwaldar, Chanda, Xu, Wang, Pareja, Silkin, Eyceoz, Srivastava, "Sculpting
    Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", ICLR 2026, arXiv 2504.07097.

    When to choose:
        When one plain model has to learn task after task, without task ids, replay or adapters that pile up, and memory
        for nearly full fine-tuning is there. On a single task it learns less: 0.43 on mathematics in PEFT's comparison
        of methods, where LoRA has 0.48 and full fine-tuning 0.47. It protects directions, not behaviour: what the old
        tasks use of the weak directions may change.

    Equation:
        \Delta W = U \, \mathrm{diag}(s) \, V^\top - U_0 \, \mathrm{diag}(s_0) \, V_0^\top
        U \leftarrow U - U_h U_h^\top U, \quad V \leftarrow V - V_h V_h^\top V

    Example:
        import torch
        from peft import get_peft_model
        from folklora import OSFT, tiny
        from folklora.adapters.osft import next_task

        model = get_peft_model(tiny.llama(), OSFT(unfreeze_rank_ratio=0.5, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(next_task(model))

    Args:
        r: Number of singular directions that are trained, the weakest; None takes `unfreeze_rank_ratio`. PEFT's
            `effective_rank` is the opposite, the number k that is protected.
        unfreeze_rank_ratio: Share u of the q directions that is trained: k = ⌊q (1 - u)⌋, at most q - 1.
        ranks: r of the layers for which `next_task` set it, by name.
        history: Rank p of what earlier tasks changed, by layer.
    """

    method: str = "osft"
    r: int | None = None
    unfreeze_rank_ratio: float = 0.25
    ranks: dict[str, int] = field(default_factory=dict)
    history: dict[str, int] = field(default_factory=dict)

    paper: ClassVar[str] = "Nayak et al. 2025, arXiv 2504.07097"
    trains: ClassVar[str] = "U, s, V of the weak singular triplets, off the strong ones"
    past: ClassVar[int] = 0
    """Rank of what earlier tasks changed in the layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            self.check_rank(self.r)
        if not 0 < self.unfreeze_rank_ratio <= 1:
            raise ValueError(f"unfreeze_rank_ratio must be above 0 and at most 1, not {self.unfreeze_rank_ratio}")

    def for_module(self, name: str) -> OSFT:
        """The options for one layer, with the rank that its last task has and what it keeps of earlier ones."""
        own = copy.copy(super().for_module(name))
        own.r, own.past = self.ranks.get(name, own.r), self.history.get(name, 0)
        return own

    def rank(self, shape: tuple[int, int]) -> int:
        """How many directions are trained of a weight of `shape` (out, in)."""
        short = min(shape)
        if self.r is not None:
            return self.r
        return short - min(math.floor(short * (1 - self.unfreeze_rank_ratio) + _ROUNDING), short - 1)

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """A rank above the weight's."""
        return [] if self.r is None else super().check(shape, name)

    def update(self, weight: Tensor) -> OSFTUpdate:
        """Decompose the weight; the trained triplets start at its weakest."""
        shape = tuple(weight.shape)
        update = OSFTUpdate(shape, self.rank(shape), self.past).to(weight.device)
        update.start(weight, self.rank(shape))
        return update

    def empty(self, shape: tuple[int, int]) -> OSFTUpdate:
        """The same shapes, zeros."""
        return OSFTUpdate(shape, self.rank(shape), self.past)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out + 1)."""
        return self.rank(shape) * (sum(shape) + 1)


class OSFTUpdate(Update):
    """ΔW = U diag(s) Vᵀ - U₀ diag(s₀) V₀ᵀ, U and V projected off what is protected, and what earlier tasks changed.

    Args:
        shape: (out, in).
        r: Number of trained triplets.
        past: Rank of what earlier tasks changed.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"U0", "s0", "V0", "protected", "old_A", "old_B"})

    def __init__(self, shape: tuple[int, int], r: int, past: int) -> None:
        super().__init__()
        (out, columns), k = shape, min(shape) - r
        self.U, self.s, self.V = zeros(out, r), zeros(r), zeros(columns, r)
        self.U0, self.s0, self.V0 = (zeros(*p.shape, requires_grad=False) for p in (self.U, self.s, self.V))
        # a square weight needs none: on either side the start's vectors span what is not protected
        self.protected = zeros(max(shape), k, requires_grad=False) if k and out != columns else None
        self.old_A = zeros(past, columns, requires_grad=False) if past else None
        self.old_B = zeros(out, past, requires_grad=False) if past else None

    @torch.no_grad()
    def start(self, weight: Tensor, r: int) -> None:
        """Protect the strongest triplets of a weight [out, in]; train its r weakest from where they are."""
        found, (out, columns) = triplets(weight), weight.shape
        k = min(out, columns) - r
        strong = (found.V if columns > out else found.U)[:, :k].contiguous()
        self.protected = nn.Parameter(strong, requires_grad=False) if k and out != columns else None
        for name, value in (("U", found.U[:, k:]), ("s", found.S[k:]), ("V", found.V[:, k:])):
            setattr(self, name, nn.Parameter(value.contiguous()))
            setattr(self, f"{name}0", nn.Parameter(value.clone().contiguous(), requires_grad=False))

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """What this task changes, and what earlier ones did."""
        learned, kept = self.split()
        return learned if kept is None else concatenate([learned, kept])

    def split(self, x: Tensor | None = None, mask: Tensor | None = None) -> tuple[Factors, Factors | None]:
        """This task's change reads the dropped-out input, that of earlier tasks the whole: the paper has it in W."""
        kept = None if self.old_A is None else Factors(self.old_A, 1.0, self.old_B)
        # in bfloat16 the difference to the start would be lost in its rounding
        with torch.autocast(self.s.device.type, enabled=False):
            (short, short0), (long, long0) = self._sides()
            turned = self.s[:, None] * ((short - short0).mT @ short0)
            # of differences to the start alone, which are 0 there to the bit whatever a product's precision
            change = self._off_protected(long - long0, long0) @ (turned + torch.diag(self.s))
            change = change + long0 @ (turned + torch.diag(self.s - self.s0))
        if self._wide:
            return Factors(change.mT, 1.0, short0), kept
        return Factors(short0.mT, 1.0, change), kept

    def after_step(self) -> None:
        """Project the parameters off the protected subspace."""
        (short, short0), (long, long0) = self._sides()
        short.copy_(short0 + short0 @ (short0.mT @ (short - short0)))
        long.copy_(long0 + self._off_protected(long - long0, long0))

    @torch.no_grad()
    def next_task(self, weight: Tensor, r: int) -> int:
        """Keep what was changed of the weight [out, in], and start anew at the changed weight; the rank of the change.

        Its parameters are new ones.
        """
        total = self.factors()
        change = Factors(total.A.double(), total.s, total.B.double()).dense()
        self.old_A = self.old_B = None
        rank = 0
        if change.any():
            found = triplets(change, dtype=torch.float64)
            # float32 factors hold nothing below this
            rank = int((found.S > torch.finfo(torch.float32).eps * found.S[0]).sum())
            root = found.S[:rank].sqrt()
            old = (root[:, None] * found.V[:, :rank].mT, found.U[:, :rank] * root)
            self.old_A, self.old_B = (nn.Parameter(v.float().contiguous(), requires_grad=False) for v in old)
        self.start(weight.double() + change, r)
        return rank

    @property
    def protected_count(self) -> int:
        """The number k of protected triplets."""
        return min(self.U.shape[0], self.V.shape[0]) - self.s.shape[0]

    @property
    def _wide(self) -> bool:
        return self.U.shape[0] <= self.V.shape[0]

    def _sides(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(trained, start) of the short side and of the long one."""
        left, right = (self.U, self.U0), (self.V, self.V0)
        return (left, right) if self._wide else (right, left)

    def _off_protected(self, moved: Tensor, start: Tensor) -> Tensor:
        """The movement [long, r] of the long side's vectors, projected off its protected ones."""
        if not self.protected_count:
            return moved
        if self.protected is None:
            return start @ (start.mT @ moved)
        return moved - self.protected @ (self.protected.mT @ moved)


def next_task(model: nn.Module, ranks: dict[str, int] | None = None, adapter_name: str = "default") -> dict[str, int]:
    """End a task: protect the strongest directions of what the weights are now, and train the rest of them.

    What the model computes stays the same. Its parameters are new ones: an optimizer has to be made anew.

    Args:
        model: A PEFT model that carries the OSFT adapter.
        ranks: Number r of directions that the next task trains, by layer; layers not named keep theirs.
        adapter_name: The adapter.

    Returns:
        The number of directions that are protected now, by layer.

    Raises:
        ValueError: The model has no OSFT adapter of that name, a rank does not fit its layer, or it is merged.
    """
    pairs, config = carriers(model, adapter_name, OSFTUpdate, "OSFT"), model.peft_config[adapter_name]
    wanted = {layer.name: len(update.s) for layer, update in pairs} | (ranks or {})
    limits = {layer.name: min(layer.kind.shape(layer.get_base_layer())) for layer, _ in pairs}
    problems = [f"there is no layer '{name}'" for name in wanted if name not in limits]
    problems += [
        f"layer '{name}' can train 1 to {limits[name]} directions, not {r}"
        for name, r in wanted.items()
        if name in limits and not 1 <= r <= limits[name]
    ]
    problems += [f"layer '{layer.name}' is merged: call unmerge_adapter()" for layer, _ in pairs if layer.merged]
    if problems:
        raise ValueError("\n".join(problems))
    for layer, update in pairs:
        layer.admit_loaded([adapter_name])
        trained = update.s.requires_grad
        rank = update.next_task(layer.kind.matrix(layer.get_base_layer()), wanted[layer.name])
        config.ranks[layer.name] = wanted[layer.name]
        config.history.pop(layer.name, None)
        if rank:
            config.history[layer.name] = rank
        layer.set_requires_grad(adapter_name, trained)
    return {name: limits[name] - r for name, r in wanted.items()}
