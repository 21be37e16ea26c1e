"""AdapterFusion: frozen adapters of source tasks, mixed for each token by an attention over their outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from folklora.adapters.base import Update
from folklora.adapters.sources import Branches, OverSources

_OFF_DIAGONAL = 1e-6
_STEPS = 1000


@dataclass
class AdapterFusion(OverSources):
    r"""Non-destructive composition of tasks: in every layer, each token chooses among the source adapters.

    First, one adapter is trained and saved for each of N source tasks. Then, on a layer with output y [..., d] and the
    frozen adapters' outputs o_t without any residual,
        q = W_q y + b_q,  k_t = W_k o_t + b_k,  v_t = W_v o_t            W_q, W_k, W_v: [d, d]
        a = softmax_t(dropout(c q · k_t) / T)
        y + Σ_t a_t v_t
    W_q, W_k ~ N(0, 0.02²), biases 0, W_v = I with 1e-6 off the diagonal: the start is a convex mixture of the adapters.
    3 d² + 2 d trained parameters a layer; `fusion="static"` has no W_v, 2 d² + 2 d. A new head is trained beside them
    (`modules_to_save`). No factor 1/√d is in the scores: c = `scale` is 1, as the authors have it. The regulariser
    0.01 ‖I - W_v‖² of each layer enters once a step, after any clipping of gradients. Where T starts above 1, it falls
    by a thousandth of its start a step, down to 1 (the authors: from 50, in each forward pass, in evaluation too). The
    scores and the softmax are computed in float32. They train with AdamW, lr 5e-5.

    Sources are as for `ScaLearn`: all `VLAdapter`s with one adapter of one task a site (the paper's: activation="relu",
    reduction_factor=16, start="normal", on the outputs of feed-forward layers), or all LoRAs. A source counts as
    o_t = 0 on a layer that it does not adapt. A saved adapter holds what is trained, the folders' names as they were
    given and the length of each source, and reads the sources again. What a source trained in full (its head) is not
    composed.

    The N outputs o_t, k_t, v_t are never formed: with o_t = W_u,t z_t + b_u,t, the scores are products of z_t with
    W_u,tᵀ W_kᵀ q, and W_v multiplies their mixture once.

    Here a bottleneck and the query read y itself; in the paper they read the norm of y plus the block's residual, as
    the sources do. The options to ask before that norm, to multiply by W_v after the mixture (which is the same), and
    to add the residual to the values are left out.

    Source: Pfeiffer, Kamath, Rücklé, Cho, Gurevych, "AdapterFusion: Non-Destructive Task Composition for Transfer
    Learning", EACL 2021, arXiv 2005.00247.

    When to choose:
        There are adapters of several tasks, and which of them helps differs from token to token; enough data of the
        target task to train three square matrices a layer. It is the baseline of `ScaLearn`, which needs some 300
        times fewer parameters and did better in that paper. It neither merges nor exports.

    Equation:
        y \leftarrow y + \sum_{t=1}^{N} a_t \, W_v\, o_t
        a = \mathrm{softmax}_t \left( (W_q y + b_q)^\top (W_k o_t + b_k) / T \right)

    Example:
        import torch
        from folklora import AdapterFusion, VLAdapter, tiny
        from peft import get_peft_model

        stage = VLAdapter(activation="relu", reduction_factor=16, start="normal", target_modules=["down_proj"])
        for seed, task in enumerate(["art", "law"]):  # in life, two trained adapters
            torch.manual_seed(seed)
            tiny.trained(stage).save_pretrained(task)
        model = get_peft_model(tiny.llama(), AdapterFusion(sources={"art": "art", "law": "law"}))
        model.print_trainable_parameters()  # 6272: two layers of width 32
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        tiny.loss(model.train()).backward()
        optimizer.step()

    Args:
        target_modules: As for every adapter; None takes the layers that the sources adapt.
        sources: Name → a saved adapter's folder; put in the names' order.
        fusion: "dynamic" or "static".
        value_penalty: Weight of the regulariser of W_v.
        score_dropout: Of the scores in training; the authors take the dropout of the model's attention, 0.1 in BERT.
        scale: c.
        start_temperature: T at the start, at least 1; 50 where the authors let it fall.
    """

    method: str = "adapterfusion"
    target_modules: list[str] | str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    fusion: Literal["dynamic", "static"] = "dynamic"
    value_penalty: float = 0.01
    score_dropout: float = 0.1
    scale: float = 1.0
    start_temperature: float = 1.0

    paper: ClassVar[str] = "Pfeiffer et al. 2021, arXiv 2005.00247"
    trains: ClassVar[str] = "query, key and value matrices over source adapters"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in ("dynamic", "static"):
            raise ValueError(f"fusion must be dynamic or static, not {self.fusion!r}")
        if not 0 <= self.score_dropout < 1 or self.value_penalty < 0 or self.start_temperature < 1:
            raise ValueError(
                "score_dropout must be at least 0 and below 1, value_penalty at least 0 and start_temperature at least "
                f"1, not {self.score_dropout}, {self.value_penalty} and {self.start_temperature}"
            )

    def update(self, weight: Tensor) -> AdapterFusionUpdate:
        """The layer's sources, with an attention at its start."""
        update = self.empty(tuple(weight.shape))
        for layer in (update.query, update.key):
            nn.init.normal_(layer.weight, std=0.02)
        if update.value is not None:
            nn.init.constant_(update.value.weight, _OFF_DIAGONAL)
            update.value.weight.data.fill_diagonal_(1.0)
        update.to(weight.device).branches.fill(weight.device)
        return update

    def empty(self, shape: tuple[int, int]) -> AdapterFusionUpdate:
        """The same shapes, to be filled."""
        return AdapterFusionUpdate(self, shape)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """3 d² + 2 d, or 2 d² + 2 d."""
        return (3 if self.fusion == "dynamic" else 2) * shape[0] ** 2 + 2 * shape[0]


class AdapterFusionUpdate(Update):
    """Σ_t a_t W_v o_t on one layer; T is a frozen parameter, so that a saved adapter goes on where it stood."""

    frozen: ClassVar[frozenset[str]] = Branches.frozen | {"temperature"}
    stepped: ClassVar[frozenset[str]] = frozenset({"temperature"})
    unsaved: frozenset[str] = Branches.unsaved
    gated: ClassVar[bool] = True
    depends_on: ClassVar[str] = "each token"
    is_function: ClassVar[bool] = True
    starts_at_base: bool = False
    batched_penalty: ClassVar[bool] = True

    def __init__(self, config: AdapterFusion, shape: tuple[int, int]) -> None:
        super().__init__()
        self.config, width = config, shape[0]
        self.branches = Branches(config, shape)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False) if config.fusion == "dynamic" else None
        for part in (self.query, self.key):
            nn.init.zeros_(part.bias)
        self.temperature = nn.Parameter(torch.tensor([float(config.start_temperature)]), requires_grad=False)

    def attention(self, x: Tensor, y: Tensor) -> Tensor:
        """a [..., N], float32 or more: how much each position takes of each source, in their order.

        Args:
            x: The layer's input [..., in].
            y: The base layer's output [..., d].
        """
        return self._attention(self.branches.inner(x, y), y)

    def function(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """W_v Σ_t a_t o_t."""
        branches, z = self.branches, self.branches.inner(x, y)
        a = self._attention(z, y).to(y.dtype)
        mixed = F.linear(z * branches.wide(a), branches.up.to(y.dtype))
        if branches.up_bias is not None:
            mixed = mixed + a @ branches.up_bias.to(y.dtype)
        return mixed if self.value is None else F.linear(mixed, self.value.weight.to(y.dtype))

    def _attention(self, z: Tensor, y: Tensor) -> Tensor:
        """softmax_t(dropout(c q · k_t) / T) of the sources' inner units z [..., R]."""
        branches, dtype = self.branches, y.dtype
        precise = torch.promote_types(dtype, torch.float32)
        q = F.linear(y, self.query.weight.to(dtype), self.query.bias.to(dtype))
        seen = q @ self.key.weight.to(dtype)
        products = (z.to(precise) * (seen @ branches.up.to(dtype))).split(branches.widths, dim=-1)
        scores = torch.stack([part.sum(-1) for part in products], dim=-1)
        # the same for all t, until dropout takes some of them
        scores = scores + (q @ self.key.bias.to(dtype)).to(precise).unsqueeze(-1)
        if branches.up_bias is not None:
            scores = scores + (seen @ branches.up_bias.T.to(dtype)).to(precise)
        scores = F.dropout(self.config.scale * scores, self.config.score_dropout, self.training)
        return torch.softmax(scores / self.temperature.to(precise), dim=-1)

    def penalty(self) -> Tensor | None:
        """0.01 ‖I - W_v‖²."""
        if self.value is None or not self.config.value_penalty:
            return None
        W = self.value.weight
        return self.config.value_penalty * (torch.eye(len(W), dtype=W.dtype, device=W.device) - W).square().sum()

    def after_step(self) -> None:
        """T falls by a thousandth of its start, down to 1."""
        self.temperature.sub_(self.config.start_temperature / _STEPS).clamp_(min=1.0)

    def derive(self, weight: Tensor, saved: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
        """The sources, read again."""
        return self.branches.derive(saved, weight.device)
