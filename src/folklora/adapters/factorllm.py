"""FactorLLM: a trained feed-forward layer cut into experts, of which a router opens a few for each token."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.adapters.carriers import carriers
from folklora.adapters.choices import check_choices
from folklora.adapters.host.feed_forward import FeedForward, Units, layout_of
from folklora.adapters.host.routed import apart, opened, routed
from folklora.adapters.host.targets import bare
from folklora.adapters.sparse import whole as whole_numbers
from folklora.balanced import balanced_kmeans

_CHOICES = {
    "partition": ("contiguous", "random", "kmeans"),
    "labels": ("nearest", "subset"),
    "prior": ("softmax", "uniform"),
}
_EPSILON = 1e-7
_SUBSETS = 1000


@dataclass
class FactorLLM(AdapterConfig):
    r"""A dense feed-forward layer factorised into experts by its own hidden units, and a trained router.

    The frozen layer T(x) = W_d u + b_d, u = act(W_g x) ⊙ (W_u x), has f hidden units (W_g, W_u [f, d], W_d [d, f];
    without a gate u = act(W_u x + b_u)). They are divided into E blocks of f/E. Expert F_e is rows of W_g and W_u and
    columns of W_d of its block, so that Σ_e F_e(x) = T(x) - b_d for every division, and no weight is changed.
        p = softmax(R x + b)        R [E, d], b [E] of the layer's own router, start as a linear layer's
        y = c Σ F_e(x) + b_d        over the K experts with the largest p;  c = E/K
    K = E is the frozen layer itself; K < E is another function from the first step on. Outside training only the K
    experts of each token count, with slices of the frozen weights: a GPU reads those of a single token alone, takes the
    dense layer's time for a few tokens, which need all experts between them, and sends many through one product a
    matrix that is grouped by expert (bfloat16, Hopper and later; else it takes one expert after the other). Training
    computes all, for their labels:
        c_e = mean_d (F_e(x) - T(x) K/E)²;  s_e = 1 for the K experts with the smallest c_e, else 0;  q = softmax(s)
        L_PA = mean over tokens of KL(p ‖ q)
        L_balance = mean over tokens and experts of m ⊙ p,  m = 1 on the K chosen experts, 0 on the others
        L = L_LM + Σ over layers of (0.05 L_PA + 0.01 L_balance)
    The choice of K is hard, so the router learns from the last two alone, and a loop by hand has to add them:
    `loss + folklora.activation_penalty(model)` (`folklora.learn` does). E (d + 1) trained parameters a layer.

    `train_experts` trains the experts too, as the paper does, as a change of every entry that the adapter holds
    (3 f d more, or 2 f d without a gate); the teacher T stays the frozen layer, and the labels are of the changed
    experts. `to_dense` puts them together again as a dense layer.

    Where we depart: the released code feeds the routers of training with the teacher's output of the layer before, no
    hidden state of the model, and we with the layer's own input; it trains on L_LM alone, which the router does not
    feel; it averages L_PA over the first row of a batch only, and we over all real tokens; its E/K is rounded down.
    The paper's text permutes the units, its code does not. L_PA and L_balance have no gradient into x. The labels
    "subset" are in the code, which does not use them; like it they compare Σ F_e with T, without c (with c = 2 of half
    the experts, each subset would be as near as the others' sum).

    With another partition than "contiguous", and with trained experts, the experts' weights are laid out once for
    evaluation, which takes the memory of the feed-forward layers again.

    Source: Zhao et al., "FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models", 2024,
    arXiv 2408.11855. The defaults are those of its validation code (E = 4, K = 2, weights 0.05 and 0.01).

    When to choose:
        Long texts are read by a model whose feed-forward layers are wide, and some loss of quality can be borne: at
        K = 2 of 4 half of their products are left out. On one H200 a 1B model read 8 x 512 tokens in 0.83 (K = 1) and
        0.95 (K = 2) of the dense time in a CUDA graph, and was slower without one; one token at a time gains nothing.
        Train the experts, not the router alone. Where quality counts first, leave the layers dense. It has no place
        beside an adapter on a matrix of the same feed-forward layer: merge that first.

    Equation:
        T(x) = \sum_{e=1}^{E} F_e(x)
        F_e(x) = W_d^{:,I_e} \left( \mathrm{act}(W_g^{I_e} x) \odot W_u^{I_e} x \right)
        y = \frac{E}{K} \sum_{e \in \operatorname{top}_K(R x + b)} F_e(x)
        L = L_{LM} + 0.05 \sum_l \mathrm{KL}(p_l \,\|\, q_l) + 0.01 \sum_l \overline{m_l p_l}

    Example:
        import torch
        from folklora import FactorLLM, activation_penalty, tiny
        from peft import get_peft_model

        model = get_peft_model(tiny.llama(), FactorLLM(experts=4, top_k=2))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model.train()
        for _ in range(3):
            loss = model(**tiny.labelled_batch()).loss + activation_penalty(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()(**tiny.batch())  # two of four experts for each token

    Args:
        experts: E; divides the number of hidden units.
        top_k: K, the experts of a token; None takes E/2, rounded down.
        partition: Which units make an expert: neighbours ("contiguous"), any ("random"), or those with similar rows of
            W_g (W_u without a gate), clustered into equal sizes ("kmeans").
        labels: "nearest", or the "subset" of K experts whose sum is nearest to T(x).
        prior: q of the labels s, the code's "softmax", by which p stays between even and certain, or "uniform", s/K.
        route_weight: Weight of L_PA.
        balance_weight: Weight of L_balance.
        scale: c; None takes E/K, right on average for experts drawn at random; 1 suits a router, taught by "subset",
            that leaves out what adds little.
        train_experts: Train the experts as well as the routers.
    """

    method: str = "factorllm"
    experts: int = 4
    top_k: int | None = None
    partition: Literal["contiguous", "random", "kmeans"] = "contiguous"
    labels: Literal["nearest", "subset"] = "nearest"
    prior: Literal["softmax", "uniform"] = "softmax"
    route_weight: float = 0.05
    balance_weight: float = 0.01
    scale: float | None = None
    train_experts: bool = False

    paper: ClassVar[str] = "Zhao et al. 2024, arXiv 2408.11855"
    trains: ClassVar[str] = "a router in each feed-forward layer, and its experts if asked for"
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"feed-forward"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, _CHOICES)
        if self.dropout or self.rank_pattern or self.alpha_pattern or self.train_bias:
            raise ValueError("FactorLLM takes no dropout, train_bias, rank_pattern or alpha_pattern")
        if self.experts < 2 or not 1 <= self.active <= self.experts:
            raise ValueError(
                f"FactorLLM needs at least 2 experts and top_k between 1 and their number, not {self.experts} experts "
                f"and top_k={self.top_k}"
            )
        if self.route_weight < 0 or self.balance_weight < 0:
            raise ValueError(
                f"route_weight and balance_weight must be at least 0, not {self.route_weight}, {self.balance_weight}"
            )
        if self.labels == "subset" and math.comb(self.experts, self.active) > _SUBSETS:
            raise ValueError(
                f'labels="subset" would compare {math.comb(self.experts, self.active)} subsets for each token; above '
                f'{_SUBSETS} take "nearest"'
            )

    @property
    def active(self) -> int:
        """K."""
        return max(1, self.experts // 2) if self.top_k is None else self.top_k

    def fit(self, model: nn.Module) -> None:
        """Choose all feed-forward layers where none are named."""
        if self.target_modules is None:
            named = [(name, bare(module)) for name, module in model.named_modules() if ".base_layer" not in name]
            self.target_modules = [name for name, base in named if layout_of(base) is not None]
            if not self.target_modules:
                raise ValueError(
                    f"no module of {type(model).__name__} is a feed-forward layer by itself, as a Llama's mlp is (a "
                    "BERT keeps its two matrices in two modules, which FactorLLM cannot compute as one)"
                )

    def check(self, shape: tuple[int, int, int], name: str) -> list[str]:
        """The units must divide into experts."""
        if shape[1] % self.experts:
            return [f"{self.experts} experts do not divide the {shape[1]} hidden units of '{name}'"]
        return []

    def update(self, weight: Tensor) -> FactorLLMUpdate:
        """A new router, and the division of the units of a layer with matrices [matrices, f, d]."""
        update = FactorLLMUpdate(self, tuple(weight.shape)).to(weight.device)
        update.router.data = kaiming_uniform(self.experts, weight.shape[-1], weight).data
        nn.init.uniform_(update.router_bias, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        if self.partition == "random":
            update.order.copy_(torch.randperm(weight.shape[1]))
        elif self.partition == "kmeans":
            update.order.copy_(
                balanced_kmeans(F.normalize(weight[0].float(), dim=-1), self.experts).argsort(stable=True)
            )
        return update

    def empty(self, shape: tuple[int, int, int]) -> FactorLLMUpdate:
        """The same shapes, to be filled."""
        return FactorLLMUpdate(self, shape)

    def trainable_count(self, shape: tuple[int, int, int]) -> int:
        """E (d + 1), and those of all matrices where the experts are trained."""
        return self.experts * (shape[-1] + 1) + (math.prod(shape) if self.train_experts else 0)


class FactorLLMUpdate(Update):
    """router [E, d], router_bias [E], the units' order [f], and experts [matrices, f, d], a change."""

    frozen: ClassVar[frozenset[str]] = frozenset({"order"})
    gated: ClassVar[bool] = True
    depends_on: ClassVar[str] = (
        "each token's experts (folklora.adapters.factorllm.to_dense makes a dense layer of them all)"
    )
    activation_reduction: ClassVar[str] = "sum"

    def __init__(self, config: FactorLLM, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = config
        self.router, self.router_bias = zeros(config.experts, shape[-1]), zeros(config.experts)
        self.order = whole_numbers(torch.arange(shape[1], dtype=torch.int32))
        self.experts = zeros(*shape) if config.train_experts else None
        self.starts_at_base = config.active == config.experts
        self._penalty: Tensor | None = None
        self._laid: tuple[Any, tuple[FeedForward, Tensor, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a penalty that nobody took hangs on the last pass's graph, which can neither be copied nor pickled
        return {**self.__dict__, "_penalty": None, "_laid": None}

    @property
    def scale(self) -> float:
        """c."""
        return self.config.experts / self.config.active if self.config.scale is None else self.config.scale

    def train(self, mode: bool = True) -> FactorLLMUpdate:
        """Change the mode; training lets go what was laid out: it may write past autograd, which no version shows."""
        if mode:
            self._laid = None
        return super().train(mode)

    def output(self, x: Tensor, whole: FeedForward, mask: Tensor | None = None) -> Tensor:
        """c Σ over the chosen experts of F_e(x), with the layer's own bias and dropout."""
        config, tokens = self.config, x.reshape(-1, x.shape[-1])
        if self.training and torch.is_grad_enabled() and self.router.requires_grad and len(tokens):
            summed = self._learning(tokens, whole, mask)
        elif config.active == config.experts or not len(tokens):
            summed = self.changed(whole).sum(tokens)
        else:
            layer, *router = self._laid_out(whole, x.dtype)
            summed = routed(tokens, self._chosen(F.linear(tokens.detach(), *router)), layer, config.experts)
        return whole.finish(self.scale * summed if self.scale != 1 else summed).view(x.shape)

    def _learning(self, tokens: Tensor, whole: FeedForward, mask: Tensor | None) -> Tensor:
        """The chosen experts' sum, where all are computed for the labels of the router's loss."""
        p, chosen = self.route(tokens.detach())
        outputs = apart(tokens, self._arranged(whole), self.config.experts)
        self._penalty = self._losses(p, chosen, outputs.detach(), self._teacher(tokens, whole, outputs), mask)
        summed = (opened(chosen, self.config.experts).to(outputs.dtype).unsqueeze(-1) * outputs).sum(1)
        if dist.is_available() and dist.is_initialized():
            # sharded data parallelism gathers the gradients of a block when its output's comes
            summed = summed + 0 * self._penalty.to(summed.dtype)
        return summed

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p [..., E] in float32 or more, and the numbers of the chosen experts [..., K]."""
        logits = F.linear(x, self.router.to(x.dtype), self.router_bias.to(x.dtype))
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        return p, self._chosen(logits.detach())

    def _chosen(self, logits: Tensor) -> Tensor:
        # in no order: to sort them is work of its own
        return logits.topk(self.config.active, dim=-1, sorted=False).indices

    def units(self, expert: int) -> Units:
        """The hidden units of an expert."""
        size = len(self.order) // self.config.experts
        block = slice(expert * size, (expert + 1) * size)
        return block if self.config.partition == "contiguous" else self.order[block].long()

    def changed(self, whole: FeedForward) -> FeedForward:
        """The dense layer of all experts together."""
        return whole if self.experts is None else whole.plus(self.experts)

    def activation_penalty(self) -> Tensor | None:
        """0.05 L_PA + 0.01 L_balance of the last forward pass in training; taken once."""
        penalty, self._penalty = self._penalty, None
        return penalty

    def _laid_out(self, whole: FeedForward, dtype: torch.dtype) -> tuple[FeedForward, Tensor, Tensor]:
        """All experts in their order, and R and b in the input's dtype: made once, where no gradient passes."""
        parts = [whole.gate, whole.up, whole.down, self.experts, self.order, self.router, self.router_bias]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._arranged(whole), self.router.to(dtype), self.router_bias.to(dtype)
        key = [dtype, *(None if t is None else (t.data_ptr(), t.dtype, t.is_inference() or t._version) for t in parts)]
        if self._laid is None or self._laid[0] != key:
            self._laid = key, (self._arranged(whole), self.router.to(dtype), self.router_bias.to(dtype))
        return self._laid[1]

    def _arranged(self, whole: FeedForward) -> FeedForward:
        """The dense layer with its units in the experts' order."""
        whole = self.changed(whole)
        return whole if self.config.partition == "contiguous" else whole.part(self.order.long())

    @torch.no_grad()
    def _teacher(self, tokens: Tensor, whole: FeedForward, outputs: Tensor) -> Tensor:
        """T(x) without its bias, which no expert has."""
        return outputs.sum(1) if self.experts is None else whole.sum(tokens)

    def _losses(self, p: Tensor, chosen: Tensor, outputs: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        best = nearest if config.labels == "nearest" else nearest_subset
        labels = best(outputs.to(p.dtype), teacher.to(p.dtype), config.active)
        s = opened(labels, config.experts).to(p.dtype)
        q = s.softmax(-1) if config.prior == "softmax" else s / config.active
        values = config.route_weight * divergence(p, q)
        values = values + config.balance_weight * (opened(chosen, config.experts) * p).mean(-1)
        if mask is None or mask.numel() != len(values):
            return values.mean()
        real = mask.reshape(-1).to(values)
        return (real * values).sum() / real.sum().clamp(min=1)


def nearest(outputs: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The K experts [tokens, K] with the smallest mean_d (F_e - T K/E)², of F [tokens, E, d] and T [tokens, d]."""
    errors = (outputs - (k / outputs.shape[1]) * teacher.unsqueeze(1)).square().mean(-1)
    return errors.topk(k, dim=-1, largest=False).indices


def nearest_subset(outputs: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The K experts [tokens, K] for which ‖Σ F_e - T‖ is the smallest of all subsets."""
    subsets = _subsets(outputs.shape[1], k).to(outputs.device)
    masks = F.one_hot(subsets, outputs.shape[1]).sum(1).to(outputs.dtype)
    products = outputs @ outputs.mT
    # ‖Σ F - T‖² less ‖T‖²
    squares = ((products @ masks.T) * masks.T).sum(1)
    errors = squares - 2 * (outputs @ teacher.unsqueeze(-1)).squeeze(-1) @ masks.T
    return subsets[errors.argmin(-1)]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last dimension, of probabilities kept off 0 and 1."""
    p, q = p.clamp(_EPSILON, 1 - _EPSILON), q.clamp(_EPSILON, 1 - _EPSILON)
    return (p * (p / q).log()).sum(-1)


def to_dense(model: PeftModel, adapter_name: str = "default") -> nn.Module:
    """Put an adapter's experts together again: the layers are dense ones of the trained experts, and it is gone.

    The base's own tensors are left as they were, and others take their place where experts were trained.

    Args:
        model: The model that carries the adapter.
        adapter_name: The adapter.

    Returns:
        The model with its other adapters, or the base model where there is no other.

    Raises:
        ValueError: The model has no such FactorLLM adapter.
    """
    pairs = carriers(model, adapter_name, FactorLLMUpdate, "FactorLLM")
    for layer, update in pairs:
        layer.admit_loaded([adapter_name])
        if update.experts is not None:
            layer.replace_weights(update.experts.detach())
    if len(model.peft_config) == 1:
        return model.unload()
    model.delete_adapter(adapter_name)
    return model


@lru_cache(maxsize=16)
def _subsets(experts: int, k: int) -> Tensor:
    return torch.tensor(list(itertools.combinations(range(experts), k)))
