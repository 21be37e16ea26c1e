"""ScaLearn: frozen adapters of source tasks, each scaled by what the target task learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from folklora.adapters.base import Update, zeros
from folklora.adapters.host.layer import updates_of
from folklora.adapters.host.saved import add_with_values, placement
from folklora.adapters.sources import Branches, OverSources
from folklora.adapters.vl_adapter import VLAdapter
from folklora.factored import Factors

_DEVIATION = 0.001
_DROPOUT = 0.3


@dataclass
class ScaLearn(OverSources):
    r"""Task transfer that learns nothing but how much of each source adapter to add.

    First, one adapter is trained and saved for each of N source tasks, the target's own among them. Then, on a layer
    with output y [..., d] and the frozen adapters' outputs o_t without any residual,
        y + Σ_t ω_t ⊙ o_t            ω: [N, d], or [N, 1] with `uniform`; from Normal(2/N, 0.001²)
    trains ω alone, of any sign and any sum (no softmax), and a new head (`modules_to_save`). The four forms:
        ScaLearn               ω [N, d] in each of L layers          L N d numbers
        ScaLearnUniform        `uniform`: ω [N, 1] in each           L N
        ScaLearn++             `share_layers`: one ω [N, d]          N d
        ScaLearnUniform++      both: one ω [N, 1]                    N
    In training, entries of ω are dropped with probability 0.3 and the others divided by 0.7 (0 in Uniform++, where each
    entry is a whole task in all layers). The optional regulariser is λ/N Σ_t (1 - mean_d ω_t)², summed over layers. The
    paper trains with AdamW, lr 6e-3, linear decay, for up to 30 epochs. Where steps are few, take a larger rate: AdamW
    moves each number by at most about the rate a step, and these have to move by about 1.

    Sources are saved adapters, either all `VLAdapter`s with one adapter of one task a site, or all LoRAs (PEFT's, or
    any Folklora adapter that has factors). Of bottlenecks (the paper's: `VLAdapter(activation="relu",
    reduction_factor=16, start="normal")` on the outputs of feed-forward layers),
        o_t = W_u,t f(W_d,t y + b_d,t) + b_u,t
    As o_t is linear in W_u, the layer computes all of them as one wide bottleneck, and
    `folklora.adapters.scalearn.fold` keeps it as one. Of LoRAs, o_t = s_t B_t A_t x, and the whole is
    ΔW = Σ_t diag(ω_t) s_t B_t A_t, which merges and exports.
    A source counts as 0 on a layer that it does not adapt. A saved adapter holds ω, the folders' names as they were
    given and the length of each source, and reads the sources again. What a source trained in full (its head) is not
    composed. The start is not the base: it is about twice the mean of the sources.

    Here a bottleneck reads and is added to y itself; in the paper it reads the norm of y plus the block's residual, as
    its sources do. The ablations with a mean or a softmax of ω are left out.

    Source: Frohmann, Holtermann, Masoudian, Lauscher, Rekabsaz, "ScaLearn: Simple and Highly Parameter-Efficient Task
    Transfer by Learning to Scale", Findings of ACL 2024, arXiv 2310.01217.

    When to choose:
        There are adapters of related tasks and little data of the target task: few numbers hardly overfit, and training
        is cheap. `AdapterFusion` decides for each token, with some 300 times the parameters. Unrelated sources give
        nothing; all N of them run at inference, unless they are LoRAs.

    Equation:
        y \leftarrow y + \sum_{t=1}^{N} \omega_t \odot o_t
        o_t = W_{u,t} \, f(W_{d,t}\, y + b_{d,t}) + b_{u,t}

    Example:
        import torch
        from folklora import ScaLearn, VLAdapter, tiny
        from peft import get_peft_model

        stage = VLAdapter(activation="relu", reduction_factor=16, start="normal", target_modules=["down_proj"])
        for seed, task in enumerate(["art", "law"]):  # in life, two trained adapters
            torch.manual_seed(seed)
            tiny.trained(stage).save_pretrained(task)
        model = get_peft_model(tiny.llama(), ScaLearn(sources={"art": "art", "law": "law"}))
        model.print_trainable_parameters()  # 128: two layers, two sources, 32 outputs
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
        tiny.loss(model.train()).backward()
        optimizer.step()

    Args:
        target_modules: As for every adapter; None takes the layers that the sources adapt.
        sources: Name → a saved adapter's folder; put in the names' order.
        uniform: One number a source, in the place of one for each output.
        share_layers: One ω for all layers; unless `uniform`, these must have equally many outputs.
        init: Mean of ω at the start; None takes 2/N.
        coefficient_dropout: Probability of dropping an entry of ω in training; None takes 0.3, or 0 in Uniform++. With
            few sources or steps, try 0.
        regularization: λ; the authors have 0.1 or 0.01 where they have any. For ω of each layer's own.
    """

    method: str = "scalearn"
    target_modules: list[str] | str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    uniform: bool = False
    share_layers: bool = False
    init: float | None = None
    coefficient_dropout: float | None = None
    regularization: float = 0.0

    paper: ClassVar[str] = "Frohmann et al. 2024, arXiv 2310.01217"
    trains: ClassVar[str] = "a scale for each source adapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficient_dropout is not None and not 0 <= self.coefficient_dropout < 1:
            raise ValueError(f"coefficient_dropout must be at least 0 and below 1, not {self.coefficient_dropout}")
        if self.regularization < 0 or (self.regularization and self.share_layers):
            raise ValueError(
                f"regularization must be at least 0, and is of coefficients that each layer has for itself; it is "
                f"{self.regularization} with share_layers={self.share_layers}"
            )

    @property
    def dropped(self) -> float:
        """The probability of dropping an entry of ω."""
        if self.coefficient_dropout is not None:
            return self.coefficient_dropout
        return 0.0 if self.uniform and self.share_layers else _DROPOUT

    def start(self, width: int, device: torch.device) -> nn.Parameter:
        """ω [N, width or 1] at its start."""
        count = len(self.sources)
        mean = 2 / count if self.init is None else self.init
        return nn.Parameter(mean + _DEVIATION * torch.randn(count, 1 if self.uniform else width, device=device))

    def update(self, weight: Tensor) -> ScaLearnUpdate:
        """The layer's sources, with coefficients at their start."""
        update = self.empty(tuple(weight.shape)).to(weight.device)
        update.branches.fill(weight.device)
        if not self.share_layers:
            update.omega = self.start(weight.shape[0], weight.device)
        return update

    def empty(self, shape: tuple[int, int]) -> ScaLearnUpdate:
        """The same shapes, zeros."""
        return FactoredScaLearnUpdate(self, shape) if self.bank.linear else BottleneckScaLearnUpdate(self, shape)

    def shared(self, layers: dict[str, tuple[int, int]], like: Tensor) -> dict[str, nn.Parameter]:
        """ω, where all layers have the same.

        Raises:
            ValueError: It has an entry for each output, and layers have different ones.
        """
        if not self.share_layers:
            return {}
        widths = {out: name for name, (out, _) in layers.items()}
        if len(widths) > 1 and not self.uniform:
            found = ", ".join(f"{out} ('{name}')" for out, name in widths.items())
            raise ValueError(
                f"share_layers needs layers of equally many outputs, and there are {found}; choose target_modules, or "
                "set uniform=True"
            )
        return {"omega": self.start(next(iter(widths)), like.device)}

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """N d, or N."""
        return 0 if self.share_layers else len(self.sources) * (1 if self.uniform else shape[0])

    def shared_count(self, layers: dict[str, tuple[int, int]]) -> int:
        """N d, or N, where all layers have the same."""
        width = 1 if self.uniform else next(iter(layers.values()))[0]
        return len(self.sources) * width if self.share_layers else 0


class ScaLearnUpdate(Update):
    """Σ_t ω_t ⊙ o_t on one layer."""

    frozen: ClassVar[frozenset[str]] = Branches.frozen
    unsaved: frozenset[str] = Branches.unsaved
    starts_at_base: bool = False
    batched_penalty: ClassVar[bool] = True

    def __init__(self, config: ScaLearn, shape: tuple[int, int]) -> None:
        super().__init__()
        self.branches = Branches(config, shape)
        self.omega = None if config.share_layers else zeros(len(config.sources), 1 if config.uniform else shape[0])
        self.dropped, self.regularization = config.dropped, config.regularization

    def scales(self) -> Tensor:
        """ω [N, d] or [N, 1]; in training, with entries dropped."""
        omega = self.common("omega") if self.omega is None else self.omega
        return F.dropout(omega, self.dropped, self.training)

    def scaled_up(self, omega: Tensor) -> Tensor:
        """[ω_1 ⊙ W_u,1 | ω_2 ⊙ W_u,2 | ...] [d, R], each row of W_u,t times its output's ω."""
        return self.branches.up * self.branches.wide(omega.T)

    def penalty(self) -> Tensor | None:
        """λ/N Σ_t (1 - mean_d ω_t)²."""
        return self.regularization * (1 - self.omega.mean(1)).square().mean() if self.regularization else None

    def derive(self, weight: Tensor, saved: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
        """The sources, read again."""
        return self.branches.derive(saved, weight.device)


class FactoredScaLearnUpdate(ScaLearnUpdate):
    """The sources are LoRAs: ΔW = Σ_t diag(ω_t) B_t A_t."""

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """([A_1; A_2; ...], 1, [ω_1 ⊙ B_1 | ω_2 ⊙ B_2 | ...])."""
        return Factors(self.branches.down, 1.0, self.scaled_up(self.scales()))


class BottleneckScaLearnUpdate(ScaLearnUpdate):
    """The sources are bottlenecks: W f(W_d y + b_d) + Σ_t ω_t ⊙ b_u,t with W = [ω_1 ⊙ W_u,1 | ω_2 ⊙ W_u,2 | ...]."""

    gated: ClassVar[bool] = True
    depends_on: ClassVar[str] = "the layer's output, and not linearly"
    is_function: ClassVar[bool] = True

    def function(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """One wide bottleneck."""
        up, bias = self.wide_up(self.scales())
        return F.linear(self.branches.inner(x, y), up.to(y.dtype), bias.to(y.dtype))

    def wide_up(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        """W [d, R] and Σ_t ω_t ⊙ b_u,t [d]."""
        return self.scaled_up(omega), (omega * self.branches.up_bias).sum(0)


@torch.no_grad()
def fold(model: PeftModel, into: str, adapter_name: str = "default") -> None:
    """Add a plain `VLAdapter` with the same function as a ScaLearn adapter over bottlenecks: one wide bottleneck.

    It needs no source any more, is saved whole, and can be a source itself. Over LoRAs, there is `merge_and_unload` or
    `folklora.export_lora` instead.

    Args:
        model: A model that carries the ScaLearn adapter, which stays as it is.
        into: Name of the new adapter. It is not active before `model.set_adapter`.
        adapter_name: The ScaLearn adapter.

    Raises:
        ValueError: The model has no such adapter over bottlenecks.
    """
    pairs = list(updates_of(model, adapter_name))
    if not pairs or not all(isinstance(update, BottleneckScaLearnUpdate) for _, update in pairs):
        raise ValueError(f"the model has no ScaLearn adapter over bottlenecks named '{adapter_name}'")
    for layer, _ in pairs:
        layer.admit_loaded([adapter_name])
    width = max(len(update.branches.down) for _, update in pairs)
    values = {layer.name: _widened(update, width) for layer, update in pairs}
    activation = pairs[0][1].branches.bank.activation
    new = VLAdapter(activation=activation, bottleneck_size=width, **placement(model.peft_config[adapter_name]))
    add_with_values(model, into, new, values, adapter_name)


def _widened(update: BottleneckScaLearnUpdate, width: int) -> dict[str, Tensor]:
    """A VLAdapter's values, with inner units that add nothing up to `width`."""
    branches, omega = update.branches, update.common("omega") if update.omega is None else update.omega
    up, bias = update.wide_up(omega)
    more = width - len(branches.down)
    return {
        "down.0.weight": F.pad(branches.down, (0, 0, 0, more)),
        "down.0.bias": F.pad(branches.down_bias, (0, more)),
        "up.0.weight": F.pad(up, (0, more)),
        "up.0.bias": bias,
    }
