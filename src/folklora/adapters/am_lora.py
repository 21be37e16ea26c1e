"""AM-LoRA: one LoRA a task, mixed in each layer by an attention that reads the input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.adapters.carriers import carriers
from folklora.adapters.choices import check_choices
from folklora.factored import Factors

_CHOICES = {
    "gate_input": ("input", "lora", "both"),
    "selector_train": ("new", "all"),
    "granularity": ("token", "prefix", "sequence"),
    "score_activation": ("identity", "tanh"),
    "gate_init": ("linear", "zero", "prototype"),
    "sparsity_on": ("attention", "entropy", "scores"),
}
# of a mean's length: nearer to the earlier tasks' means than this, float32 hardly tells it from them
_ALIKE = 1e-4


@dataclass
class AMLoRA(AdapterConfig):
    r"""Attentional mixture of LoRAs.

    A layer with frozen W [out, in] holds a LoRA (A_i [r, in], B_i [out, r]) and a gate (w_i, b_i) for every task i.
        h_i(x) = s B_i (A_i x),  s = α/r                    what task i's LoRA would add
        e_i = w_i · g(q_i) / τ + b_i,  e_0 = 0              scores; slot 0 is the zero LoRA ("use none")
        a = softmax(e_0, e_1, ..., e_t)                     attention over the slots
        y = W x + b + Σ_{i ≥ 1} a_i h_i(x)
    Only the newest LoRA and its gate are trained; base and older LoRAs are frozen. No task id, replay or teacher. A
    weight trains r (in + out) + d + 1 parameters a task, d = in, out or in + out by `gate_input`. A stream appends
    them for each task, by hand `folklora.add_task` does. Gates that read the prefix refuse beam search from a cache.
    Loss: L_task + λ · mean over layers and tokens of P(a), P = Σ_{i ≥ 1} a_i = 1 - a_0 (the L1 norm of the attention
    without the zero slot: over all slots of a softmax it is constant and trains nothing), or the entropy of a, or the
    L1 norm of the scores. Softmax and penalty are computed in float32; padding is left out of the mean.

    Source: Liu, Wu, Liu, Duan, "Learning Attentional Mixture of LoRAs for Language Model Continual Learning", 2024,
    arXiv 2409.19611. No code is public and the paper leaves choices open; every option below from `gate_input` on is
    such a choice. The literal reading of the paper, a dense layer over the LoRAs' outputs token by token, is
    `gate_input="lora"`. In a language model such gates, and those that read a token's own x, hardly tell tasks apart
    at the last token of a prompt, and forget. The default departs from it: a gate reads the mean of x over the
    prefix, and `gate_init="prototype"` places it where its task is read,
        e_i(q) = w_i · P_i (q - m_1) / |d_i| + b_i,  d_i = P_i (m_i - m_1),  w_i = (κ' + κ) d_i / |d_i|,  b_i = -κ
    with m_i [in] the mean of what is read at the end of task i's prompts, P_i the projection off m_2 - m_1, ...,
    m_{i-1} - m_1 (measured once each task was learnt; the first gate has P = 1 and no centre) and κ' = κ above the
    highest earlier score at m_i. Training moves w_i and b_i; whatever it does to w_i, the score where an earlier task
    is read stays b_i. No examples are kept; in + 1 numbers a weight and task are. The stream measures the means; an
    adapter used without it (`place_gate`, `remember` never called) has gates that start at 0. What was measured of
    these forms is in `benchmarks/RESULTS.md`.

    When to choose:
        Tasks come one after another, no old examples may be kept, and at test time nobody says which task it is: the
        gates tell tasks apart by what they read. Where the task is known, `per-task` is simpler and better.

    Equation:
        h_i(x) = s\,B_i A_i x, \quad e_i = w_i \cdot g(q_i) / \tau + b_i, \quad e_0 = 0
        a = \mathrm{softmax}(e_0, \ldots, e_t), \quad y = W x + b + \sum_{i \geq 1} a_i\, h_i(x)

    Example:
        from peft import get_peft_model
        from folklora import AMLoRA, add_task, tiny

        model = get_peft_model(tiny.llama(), AMLoRA(r=4, target_modules=["q_proj", "v_proj"]))
        tiny.train(model)
        add_task(model)  # a second LoRA and its gate; the first ones are frozen
        tiny.train(model)

    Args:
        r: Rank of each task's LoRA.
        alpha: α of s = α/r.
        dropout: Of the LoRAs' input.
        tasks: Number of LoRAs held; grows by `add_task`.
        gate_input: What a gate reads, q_i: the layer's "input" x, the "lora" output h_i(x), or "both".
        zero_slot: Whether slot 0 takes part in the softmax.
        selector_train: Train the "new" task's gate only, or "all" gates.
        granularity: Read each "token" by itself, the mean of the "prefix" that ends with it, or the mean of the whole
            "sequence" (which sees ahead: no generation from a cache). "prefix" continues from a cache without beams.
            None takes "token" for gates on LoRA outputs and "prefix" for the others.
        score_activation: g, "identity" or "tanh".
        temperature: τ.
        new_gate_bias: Start of b_i, or what is added to it; below 0 a new task disturbs the old ones less.
        gate_init: Start of w_i: "linear" draws U(-1/√d, 1/√d), "zero" is 0, "prototype" as above. None takes "linear"
            for gates on LoRA outputs and "prototype" for the others.
        confidence: κ of "prototype".
        sparsity: λ.
        sparsity_on: P, "attention", "entropy" or "scores".
    """

    method: str = "am-lora"
    r: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    tasks: int = 1
    gate_input: Literal["input", "lora", "both"] = "input"
    zero_slot: bool = True
    selector_train: Literal["new", "all"] = "new"
    granularity: Literal["token", "prefix", "sequence"] | None = None
    score_activation: Literal["identity", "tanh"] = "identity"
    temperature: float = 1.0
    new_gate_bias: float = 0.0
    gate_init: Literal["linear", "zero", "prototype"] | None = None
    confidence: float = 4.0
    sparsity: float = 0.0
    sparsity_on: Literal["attention", "entropy", "scores"] = "attention"

    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2409.19611"
    trains: ClassVar[str] = "the newest task's A, B and gate"
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        literal = self.gate_input == "lora"
        self.granularity = self.granularity or ("token" if literal else "prefix")
        self.gate_init = self.gate_init or ("linear" if literal else "prototype")
        check_choices(self, _CHOICES)
        if literal and self.placed:
            raise ValueError(
                'gate_init="prototype" places a gate by the layer\'s input, which gate_input="lora" does not read; '
                'choose gate_init="linear" or "zero"'
            )
        if self.tasks < 1 or self.temperature <= 0 or self.sparsity < 0:
            raise ValueError(
                "AMLoRA needs tasks >= 1, temperature > 0 and sparsity >= 0, "
                f"not {self.tasks}, {self.temperature} and {self.sparsity}"
            )

    def update(self, weight: Tensor) -> AMLoRAUpdate:
        """`tasks` new LoRAs with gates."""
        update = AMLoRAUpdate(self, tuple(weight.shape))
        for _ in range(self.tasks):
            update.add_task(weight)
        return update

    def empty(self, shape: tuple[int, int]) -> AMLoRAUpdate:
        """The same shapes, to be filled."""
        return self.update(torch.zeros(shape))

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out) + d + 1, and the older gates' d + 1 each where "all" gates are trained."""
        gates = self.tasks if self.selector_train == "all" else 1
        return self.r * sum(shape) + gates * (self.gate_width(shape) + 1)

    @property
    def placed(self) -> bool:
        """Whether a gate is placed by what it reads on its task, against what the earlier gates read on theirs."""
        return self.gate_init == "prototype"

    def gate_width(self, shape: tuple[int, int]) -> int:
        """d, the number of features a gate reads on a weight of `shape` (out, in)."""
        out, columns = shape
        return {"input": columns, "lora": out, "both": columns + out}[self.gate_input]


class AMLoRAUpdate(Update):
    """The LoRAs and gates of one weight: A_i [r, in], B_i [out, r], gate_weight_i [d], gate_bias_i [1]."""

    gated: ClassVar[bool] = True

    def __init__(self, config: AMLoRA, shape: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.scale = config.scaling(config.alpha, config.r)
        self.needs_full_sequence = config.granularity == "sequence"
        self.reads_past = config.granularity == "prefix"
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.gate_weight, self.gate_bias = nn.ParameterList(), nn.ParameterList()
        if config.placed:
            self.known, self.distance = nn.ParameterList(), nn.ParameterList()
        self.record = False
        self.attention: Tensor | None = None
        self.read: Tensor | None = None
        self._penalty: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a penalty that nobody took hangs on the last pass's graph, which can neither be copied nor pickled
        return {**self.__dict__, "_penalty": None, "past": None}

    def add_task(self, like: Tensor) -> None:
        """Append a LoRA and its gate for a new task, on the device of `like`."""
        out, columns = self.shape
        width = self.config.gate_width(self.shape)
        bound = 1 / math.sqrt(width) if self.config.gate_init == "linear" else 0.0
        self.A.append(kaiming_uniform(self.config.r, columns, like))
        self.B.append(zeros(out, self.config.r, like=like))
        self.gate_weight.append(nn.Parameter(torch.empty(width, device=like.device).uniform_(-bound, bound)))
        self.gate_bias.append(nn.Parameter(torch.full((1,), self.config.new_gate_bias, device=like.device)))
        if self.config.placed:
            self.known.append(zeros(columns, like=like, requires_grad=False))
            self.distance.append(nn.Parameter(torch.ones(1, device=like.device), requires_grad=False))

    def frozen_parameters(self) -> frozenset[str]:
        """All but the newest task's (and, with selector_train "all", but the gates)."""
        lists = ("A", "B") if self.config.selector_train == "all" else ("A", "B", "gate_weight", "gate_bias")
        old = frozenset(f"{name}.{i}" for name in lists for i in range(len(self.A) - 1))
        if not self.config.placed:
            return old
        return old | {f"{name}.{i}" for name in ("known", "distance") for i in range(len(self.A))}

    @torch.no_grad()
    def place_gate(self, mean: Tensor) -> None:
        """Set the newest gate by the mean m [in] of what the gates read on its task's prompts, before it is trained.

        d = P (m - m_1);  w = (κ' + κ) d / |d|,  b = -κ: the score starts at -κ where the gate reads any earlier
        task's mean, and where it reads m at κ', which is κ above the highest of 0 and the earlier gates' scores there.
        """
        slot = len(self.A) - 1
        d = self._unknown(mean.to(self.known[-1]), slot)
        # where two tasks read the same, only rounding is left of d, and dividing by that would blow it up
        length = d.norm().clamp_min(_ALIKE * float(self._activated(mean).norm())).clamp_min(torch.finfo(d.dtype).tiny)
        self.distance[-1].fill_(length)
        rivals = self.scores(mean.to(d))[:-1].clamp_min(0)
        rise = 2 * self.config.confidence + (rivals.max() if slot else 0.0)
        self.gate_weight[-1][: len(d)] = rise * self.config.temperature * d / length
        self.gate_bias[-1].fill_(self.config.new_gate_bias - self.config.confidence)

    @torch.no_grad()
    def remember(self, mean: Tensor) -> None:
        """Note the mean [in] of what the gates read on the newest task, now that it is learnt, for the later gates."""
        slot = len(self.A) - 1
        d = self._unknown(mean.to(self.known[-1]), slot)
        self.known[-1].copy_(d / d.norm().clamp_min(torch.finfo(d.dtype).tiny) if slot else d)

    def _unknown(self, mean: Tensor, slot: int) -> Tensor:
        """P (mean - m_1): what sets it apart from all that was read on the tasks before `slot`."""
        mean = self._activated(mean)
        if slot == 0:
            return mean
        d = mean - self.known[0]
        for earlier in list(self.known)[1:slot]:
            d = d - (d @ earlier) * earlier
        return d

    def _placed_weights(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gates' weights [t, d] as they meet the input itself, and the constants [t] that centring takes off.

        A gate reads P (q - m_1) / |d|, P the projection off what told the earlier tasks from the first: however it is
        trained, its score where it reads an earlier task's mean stays its bias. P is applied to w, not to q.
        """
        own, others = weights[:, : self.shape[1]], weights[:, self.shape[1] :]
        basis = torch.stack(list(self.known))
        along = (own @ basis[1:].T).tril(-2)
        own = (own - along @ basis[1:]) / torch.stack(list(self.distance))
        first = torch.arange(len(own), device=own.device) == 0
        return torch.cat([own, others], dim=1), (own @ basis[0]).masked_fill(first, 0.0)

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """The LoRAs side by side; s holds each one's attention on each of its ranks, [..., t r]."""
        if x is None:
            raise ValueError("AM-LoRA's update depends on the layer's input, and none was given")
        scores = self.scores(x, mask)
        attention, sparse = self._attend(scores), self.training and self.config.sparsity > 0
        if self.record:
            self.attention = attention.detach()
        if sparse:
            self._penalty = self.config.sparsity * _masked_mean(self._sparsity(attention, scores), mask)
        weights = attention[..., 1:] if self.config.zero_slot else attention
        s = (weights * self.scale).to(x.dtype).repeat_interleave(self.config.r, dim=-1)
        return Factors(torch.cat(list(self.A)), s, torch.cat(list(self.B), dim=1))

    def scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """e_1, ..., e_t for the input [..., in]: float32, [..., t] ([..., 1, t] for one a sequence)."""
        if self.record:
            self.read = self._pool(x, mask).detach()
        total = torch.stack([bias[0] for bias in self.gate_bias]).float()
        weights, centre = torch.stack(list(self.gate_weight)), 0.0
        if self.config.placed:
            weights, centre = self._placed_weights(weights)
        if self.config.score_activation == "identity":
            # a score is linear in what it reads, so the mean is taken over t scores and not over all features
            seen = self._pool(self._seen(x, weights), mask)
        else:
            seen = self._seen(self._pool(x, mask), weights)
        return total + (seen - centre) / self.config.temperature

    def _seen(self, q: Tensor, weights: Tensor) -> Tensor:
        """w_i · g(q_i) of each gate, [..., t] float32."""
        width = self.shape[1] if self.config.gate_input != "lora" else 0
        parts = []
        if width:
            own = self._activated(q)
            parts.append(F.linear(own, weights[:, :width].to(own.dtype)).float())
        if self.config.gate_input != "input":
            parts.append(self._lora_scores(q, weights[:, width:]))
        return sum(parts[1:], parts[0])

    def _activated(self, q: Tensor) -> Tensor:
        return torch.tanh(q) if self.config.score_activation == "tanh" else q

    def _pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # an input of fewer dimensions is a vector, or a batch of them, and no sequence
        if self.config.granularity == "token" or x.dim() < 3:
            return x
        if self.config.granularity == "sequence":
            return _mean_positions(x, mask)
        return self._mean_prefix(x, mask)

    def _mean_prefix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Each position's mean over itself and all before it, those in the cache too; summed in float32."""
        known = mask is not None and x.shape[:-1] == mask.shape
        weights = (mask if known else torch.ones_like(x[..., 0])).float().unsqueeze(-1)
        sums, counts = _running_sum(x.float() * weights), _running_sum(weights)
        if self.before:
            past_sum, past_count = self._past_of(len(x))
            sums, counts = sums + past_sum, counts + past_count
        # copies: a view would hold the sums of all positions until the next pass
        self.past = (sums[:, -1:].detach().clone(), counts[:, -1:].detach().clone())
        self.past_length = self.before + x.shape[-2]
        # in the order of x again: how a product of it is computed depends on that order
        return (sums / counts.clamp_min(1)).to(x.dtype).contiguous()

    def _past_of(self, rows: int) -> tuple[Tensor, Tensor]:
        if self.past is None or len(self.past[0]) != rows or self.past_length != self.before:
            raise RuntimeError(
                "AM-LoRA's gates read all earlier positions, and this cache does not continue the last pass; "
                'generate with use_cache=False, or use granularity="token"'
            )
        return self.past

    def activation_penalty(self) -> Tensor | None:
        """λ P(a) of the last forward pass in training mode; taken once."""
        penalty, self._penalty = self._penalty, None
        return penalty

    def _lora_scores(self, x: Tensor, weights: Tensor) -> Tensor:
        # w_i · (s B_i A_i x) through the small side; only tanh needs the LoRAs' outputs themselves
        hidden = [F.linear(x, A.to(x.dtype)) for A in self.A]
        if self.config.score_activation == "identity":
            seen = [self.scale * (w.float() @ B.float()) for w, B in zip(weights, self.B, strict=True)]
            return torch.stack([(h.float() * v).sum(-1) for h, v in zip(hidden, seen, strict=True)], dim=-1)
        outputs = [self.scale * F.linear(h, B.to(h.dtype)) for h, B in zip(hidden, self.B, strict=True)]
        return torch.stack([(torch.tanh(o.float()) * w).sum(-1) for o, w in zip(outputs, weights, strict=True)], dim=-1)

    def _attend(self, scores: Tensor) -> Tensor:
        if self.config.zero_slot:
            scores = torch.cat([torch.zeros_like(scores[..., :1]), scores], dim=-1)
        return torch.softmax(scores, dim=-1)

    def _sparsity(self, attention: Tensor, scores: Tensor) -> Tensor:
        if self.config.sparsity_on == "scores":
            return scores.abs().sum(-1)
        if self.config.sparsity_on == "entropy":
            return -(attention * attention.clamp_min(torch.finfo(attention.dtype).tiny).log()).sum(-1)
        return (attention[..., 1:] if self.config.zero_slot else attention).sum(-1)


def add_task(model: nn.Module, adapter_name: str = "default") -> None:
    """Give every AM-LoRA layer of `model` a LoRA and a gate for a new task; what it had is frozen.

    Args:
        model: A model that carries the AM-LoRA adapter.
        adapter_name: The adapter's name.

    Raises:
        ValueError: No layer of the model carries an AM-LoRA adapter of that name.
    """
    pairs = carriers(model, adapter_name, AMLoRAUpdate, "AM-LoRA")
    for layer, update in pairs:
        update.add_task(layer.get_base_layer().weight)
        layer.set_requires_grad(adapter_name, True)
    configs = {id(update.config): update.config for _, update in pairs}
    configs[id(model.peft_config[adapter_name])] = model.peft_config[adapter_name]
    for config in configs.values():
        config.tasks += 1


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or values.shape != mask.shape:
        mask = torch.ones_like(values)
    return (values * mask).sum() / mask.sum().clamp_min(1)


def _running_sum(values: Tensor) -> Tensor:
    # over positions [..., positions, n]; a GPU scans far faster along what lies next to each other in memory
    return values.transpose(-1, -2).contiguous().cumsum(-1).transpose(-1, -2)


def _mean_positions(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or x.shape[:-1] != mask.shape:
        return x.mean(-2, keepdim=True)
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(-2, keepdim=True) / weights.sum(-2, keepdim=True).clamp_min(1)
