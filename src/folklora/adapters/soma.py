"""SoMA: the adapter starts as the weakest singular components of the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from folklora.adapters.pissa import PiSSA, PiSSAUpdate
from folklora.spectrum import balanced, bottom, top


@dataclass
class SoMA(PiSSA):
    r"""Singular value decomposed minor components adaptation: train the r weakest components of W from where they are.

    W = U S Vᵀ with its r last triplets U_b, S_b, V_b;  B₀ = U_b √(S_b / s) [out, r],  A₀ = √(S_b / s) V_bᵀ [r, in];
    W_res = W - s B₀ A₀ is frozen and y = W_res x + b + s B (A x). As in PiSSA here, W stays as it is and the update is
    s (B A - B₀ A₀) with a frozen copy of the start, the same function; it exports as a LoRA of rank 2r. Exact
    decomposition: the authors' default "sora_niter_4" runs a randomised one, which gives the strongest components, so
    PiSSA; their experiments do not use it. r (in + out) trained parameters a weight, and out more for a bias.

    Where S_b is 0, both factors would be, and no gradient would pass: values below `floor` S_1 count as that much in
    the start (of both the trained and the frozen pair, so that the first step sees the base all the same).

    The method has two more parts, for any trainer: early blocks stay frozen, `exclude_modules=early_blocks(model, 8)`
    (8 of ViT-L's 24), and weight decay fades out over the run, `anneal_weight_decay(optimizer, steps)`, 0.05 to 1e-5.
    It is part of the method: decay takes the minor components out, and then stops. The biases of adapted layers are
    trained too (`train_bias`), as a change from 0, which decay pulls to the base's bias and not to 0. So are a mask
    token and the task's head: name them in `modules_to_save`. The authors' code calls the method SoRA.

    Source: Yun, Chae, Lee, Ro, "SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable
    Representation Learning", CVPR 2025, arXiv 2412.04077.

    When to choose:
        Where what the model knows of other domains must stay, and training may take longer: the strong, general
        components are left as they are. In small trials it forgot least of the spectral methods at low learning rates;
        at higher ones LoRA was as good.

    Equation:
        y = W x + b + s \left( B A - B_0 A_0 \right) x
        B_0 = U_b \, \mathrm{diag}(S_b / s)^{1/2}, \quad A_0 = \mathrm{diag}(S_b / s)^{1/2} \, V_b^\top

    Example:
        import torch
        from peft import get_peft_model
        from folklora import SoMA, anneal_weight_decay, early_blocks, tiny

        base = tiny.llama()
        config = SoMA(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=early_blocks(base, 1))
        model = get_peft_model(base, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.05)
        anneal_weight_decay(optimizer, steps=3)
        for _ in range(3):
            model(**tiny.batch(), labels=tiny.batch()["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        r: Rank.
        alpha: α of the scaling s = α/r; None takes α = r, the paper's s = 1.
        rslora: Scale by α/√r in place of α/r.
        train_bias: Also train the bias of adapted layers that have one, as the authors do.
        floor: Share of the largest singular value that the weakest count as at least; 0 takes them as they are.
    """

    method: str = "soma"
    train_bias: bool = True
    floor: float = 1e-6

    paper: ClassVar[str] = "Yun et al. 2025, arXiv 2412.04077"
    trains: ClassVar[str] = "A, B from the bottom singular triplets"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must be at least 0 and below 1, not {self.floor}")

    def update(self, weight: Tensor) -> PiSSAUpdate:
        """Decompose the weight; the trained pair starts at the frozen one."""
        weakest = bottom(weight, self.r)
        least = self.floor * top(weight, 1).S
        B, A = balanced(replace(weakest, S=weakest.S.maximum(least)), self._scale)
        return PiSSAUpdate(A, B, self._scale)
