"""Dynamic Logits Fusion: small specialists steer a larger model while it decodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.linalg import vecdot
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from folklora.merge.next_logits import NextLogits, padding_tokens, readers_of, shared_vocabulary, vocabulary_size

Objective = Literal["symmetric", "forward", "reverse"]
_CELLS = 8
_NO_SHIFT = 1e-6


@dataclass(eq=False, repr=False)
class DynamicLogitFusion(LogitsProcessor):
    r"""Small specialists steer a larger base: at each token, as far as fine-tuning moved the small model.

    P = softmax(M^L) is what the large model says comes next, Q = softmax(M^S) the small base, Q_t = softmax(M^S_t) its
    T specialists, all over one vocabulary; Δ_t = log Q_t - log Q. The next token is drawn from P̃ = softmax(M^L +
    Σ_t α_t Δ_t). At each step and for each row, α is chosen so that the large model is moved as far as fine-tuning
    moved the small one, in both directions of the KL divergence:
        f(α) = KL(P̃||P),  r(α) = KL(P||P̃),  both 0 at α = 0 and growing
        α* = argmin Σ_t [f(α) - KL(Q_t||Q)]² + [r(α) - KL(Q||Q_t)]²,  0 ≤ α ≤ alpha_max, at most one α_t is not 0
    Where α has one entry that is not 0, the sum over the targets is T times the same squares for their means, plus
    what does not depend on α: so T problems of one dimension are solved, and the t of the least is kept.
    The paper does not publish its search. Here: the objective at nine even points, then bisection of its slope, with
    f' = α Var_P̃(Δ) and r' = E_P̃[Δ] - E_P[Δ], between the neighbours of the best. If fine-tuning moved nothing (all KL
    below 1e-6), α is 0. Nothing is trained; α = 1 at every step would be proxy-tuning.

    The small models keep caches of their own. Adapters on one small base are read with it in one batched pass, each row
    of the batch with its own adapter; full models in one pass each. Greedy search, sampling and beams work, and rows
    that beams move are found again in the caches. Temperature, top-k and top-p come after the fusion; what bans tokens
    or penalises repetition comes before, and a token that the large model may not say counts in no divergence.
    Vocabularies that differ are refused before anything runs.

    Source: Fan, Lu, Wei et al., "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", NeurIPS
    2024, arXiv 2406.15480. No code was published.

    When to choose:
        Where the large model is too large to train, and small ones of the same vocabulary have learnt the tasks. Every
        token costs a pass of each small model. Where the large model can be trained, that gives better answers.

    Equation:
        \tilde P_\alpha = \operatorname{softmax}\Big(M^L + \sum_t \alpha_t (M^S_t - M^S)\Big)
        \alpha^* = \arg\min_\alpha \sum_t \big[\mathrm{KL}(\tilde P_\alpha \| P) - \mathrm{KL}(Q_t \| Q)\big]^2 +
        \big[\mathrm{KL}(P \| \tilde P_\alpha) - \mathrm{KL}(Q \| Q_t)\big]^2

    Example:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
        from folklora.merge import DynamicLogitFusion

        sizes = dict(vocab_size=64, num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        large = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, **sizes)).eval()
        small = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, **sizes))
        small = get_peft_model(small, LoraConfig(target_modules="all-linear", init_lora_weights=False), "tales").eval()
        fusion = DynamicLogitFusion(large, small, ["tales"])
        prompt, mask = torch.tensor([[0, 0, 5], [7, 8, 9]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
        print(large.generate(prompt, attention_mask=mask, logits_processor=[fusion.start(mask)], max_new_tokens=6))
        print(fusion.alpha)  # of the last token, [rows, specialists]

    Args:
        large: The model that generates. Only its configuration is read.
        small: The small base; a PEFT model where the specialists are adapters on it.
        specialists: Names of adapters on the small base, or models fine-tuned from it.
        tokenizers: Those of the models, to be compared: two vocabularies of one size may differ.
        vocabulary: How many tokens the models share, where some have rows of padding after them, which are then never
            said. None: all have the same number.
        alpha_max: The largest α.
        objective: Both squares, the one of f alone ("forward"), or of r alone ("reverse").
        tolerance: How exactly α is found.
    """

    large: nn.Module
    small: nn.Module
    specialists: Sequence[nn.Module] | Sequence[str]
    _: KW_ONLY
    tokenizers: Sequence[PreTrainedTokenizerBase] = ()
    vocabulary: int | None = None
    alpha_max: float = 2.0
    objective: Objective = "symmetric"
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective is {self.objective!r}, but must be one of {', '.join(get_args(Objective))}")
        if not self.alpha_max > 0 or not self.tolerance > 0:
            raise ValueError(f"alpha_max and tolerance must be above 0, but are {self.alpha_max} and {self.tolerance}")
        readers = readers_of(self.small, self.specialists)
        models = {"the large model": self.large, "the small base": self.small}
        models |= {f"specialist {i}": s for i, s in enumerate(self.specialists, 1) if not isinstance(s, str)}
        self.shared = shared_vocabulary(models, self.vocabulary, self.tokenizers)
        self.next_logits = NextLogits(readers, self.shared)
        self.padding = padding_tokens([self.large, self.small])
        self.alpha: Tensor | None = None
        self.start()

    def start(self, attention_mask: Tensor | None = None) -> DynamicLogitFusion:
        """Begin with a new prompt; to be called before each that is padded. Returns itself.

        Args:
            attention_mask: [rows of the prompt, positions], 0 where padded on the left. None: nothing is padded.

        Raises:
            ValueError: A row is padded on the right.
        """
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask is 0 at the end of a row: pad prompts on the left")
        self.next_logits.forget()
        self.attention_mask, self.prompt = attention_mask, None
        return self

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """log P̃ of the next token, [rows, vocabulary of the large model]."""
        size = vocabulary_size(self.large)
        if scores.shape[1] != size:
            raise ValueError(
                f"the large model named has {size} tokens, and the one that generates {scores.shape[1]}: name the "
                "model that generates"
            )
        logits = self.next_logits(input_ids, self._mask(input_ids)).to(scores.device)
        large = scores[:, : self.shared]
        change = Shift.between(logits[0], logits[1:], banned=large.isneginf())
        limits = {"alpha_max": self.alpha_max, "objective": self.objective, "tolerance": self.tolerance}
        self.alpha = fusion_weights(large, change, **limits)
        unsaid = scores.new_full((len(scores), size - self.shared), -torch.inf)
        return torch.cat([fuse(large, change, self.alpha).to(scores.dtype), unsaid], dim=1)

    def _mask(self, tokens: Tensor) -> Tensor:
        """[rows, positions], 0 where a text is padded."""
        if self.prompt is not None and not _begins(tokens, self.prompt):
            if self.attention_mask is not None:
                raise ValueError(
                    "these texts begin with another prompt than the last: call start(attention_mask) first"
                )
            self.prompt = None
        if self.prompt is None:
            self._check_prompt(tokens)
            self.prompt = tokens.clone()
        mask = torch.ones_like(tokens)
        if self.attention_mask is not None:
            given = self.attention_mask.to(mask)
            mask[:, : given.shape[1]] = given.repeat_interleave(len(tokens) // len(given), dim=0)
        return mask

    def _check_prompt(self, tokens: Tensor) -> None:
        if int(tokens.max()) >= self.shared:
            raise ValueError(f"the prompt has token {int(tokens.max())}, but the models share {self.shared} tokens")
        given = self.attention_mask
        if given is not None and (given.shape[1] != tokens.shape[1] or len(tokens) % len(given)):
            raise ValueError(f"attention_mask is {[*given.shape]}, but the prompt is {[*tokens.shape]}")
        if given is None and self.padding.intersection(tokens[:, 0].tolist()):
            raise ValueError(
                "a prompt begins with a padding token: call start(attention_mask) first, with ones if it is no padding"
            )


def _begins(tokens: Tensor, prompt: Tensor) -> bool:
    if len(tokens) % len(prompt) or tokens.shape[1] < prompt.shape[1]:
        return False
    return torch.equal(tokens[:, : prompt.shape[1]], prompt.repeat_interleave(len(tokens) // len(prompt), dim=0))


@dataclass(frozen=True)
class Shift:
    """How far fine-tuning moved the small model, by specialist.

    Args:
        delta: log Q_t - log Q, [specialists, ..., vocabulary]; 0 for banned tokens.
        forward: KL(Q_t||Q), [specialists, ...].
        reverse: KL(Q||Q_t), [specialists, ...].
    """

    delta: Tensor
    forward: Tensor
    reverse: Tensor

    @classmethod
    def between(cls, small: Tensor, specialists: Tensor, banned: Tensor | None = None) -> Shift:
        """From the logits of the small base [..., vocabulary] and of its specialists [specialists, ..., vocabulary].

        Args:
            small: M^S.
            specialists: M^S_t.
            banned: Tokens that do not count; nor does one that any of these models bans by -inf.
        """
        unsaid = small.isneginf() | specialists.isneginf().any(dim=0)
        unsaid = unsaid if banned is None else unsaid | banned
        before = small.masked_fill(unsaid, -torch.inf).log_softmax(dim=-1)
        after = specialists.masked_fill(unsaid, -torch.inf).log_softmax(dim=-1)
        delta = (after - before).masked_fill(unsaid, 0)
        # rounding makes a divergence of nothing slightly negative
        forward = (after.exp() * delta).sum(dim=-1).clamp(min=0)
        return cls(delta, forward, (before.exp() * -delta).sum(dim=-1).clamp(min=0))


class Divergences(NamedTuple):
    """f = KL(P̃||P) and r = KL(P||P̃) at some α, and their derivatives by it."""

    f: Tensor
    r: Tensor
    f_slope: Tensor
    r_slope: Tensor


def divergences(large: Tensor, delta: Tensor, alpha: Tensor) -> Divergences:
    """How far α moves the large model in the direction of one specialist.

    Args:
        large: M^L, [..., vocabulary].
        delta: Δ, [..., vocabulary].
        alpha: [...].
    """
    return _divergences(*_direction(large, delta), alpha)


def _direction(large: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """log P, and Δ without its mean over P: a constant changes nothing, and both divergences lose fewer digits."""
    start = large.log_softmax(dim=-1)
    return start, delta - vecdot(start.exp(), delta).unsqueeze(-1)


def _divergences(start: Tensor, delta: Tensor, alpha: Tensor) -> Divergences:
    moved = start + alpha.unsqueeze(-1) * delta
    log_sum = moved.logsumexp(dim=-1)
    after = (moved - log_sum.unsqueeze(-1)).exp()
    mean = vecdot(after, delta)
    variance = vecdot(after, (delta - mean.unsqueeze(-1)).square())
    return Divergences(alpha * mean - log_sum, log_sum, alpha * variance, mean)


def transfer(
    large: Tensor,
    delta: Tensor,
    forward: Tensor,
    reverse: Tensor,
    *,
    alpha_max: float = 2.0,
    objective: Objective = "symmetric",
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The α [...] of one specialist that moves the large model as far as the targets say, and the objective there.

    Args:
        large: M^L, [..., vocabulary].
        delta: Δ, [..., vocabulary].
        forward: The target of KL(P̃||P), [...].
        reverse: The target of KL(P||P̃), [...].
        alpha_max: The largest α.
        objective: Which squares count.
        tolerance: How exactly α is found.
    """

    start, delta = _direction(large, delta)

    def at(alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The objective, and half its slope."""
        found = _divergences(start, delta, alpha)
        in_f = found.f - forward if objective != "reverse" else torch.zeros_like(alpha)
        in_r = found.r - reverse if objective != "forward" else torch.zeros_like(alpha)
        return in_f.square() + in_r.square(), in_f * found.f_slope + in_r * found.r_slope

    cell = alpha_max / _CELLS
    values = torch.stack([at(torch.full_like(forward, i * cell))[0] for i in range(_CELLS + 1)])
    least, index = values.min(dim=0)
    best = cell * index.to(forward)
    low, high = (best - cell).clamp(min=0), (best + cell).clamp(max=alpha_max)
    for _ in range(max(0, math.ceil(math.log2(2 * cell / tolerance)))):
        middle = (low + high) / 2
        falling = at(middle)[1] < 0
        low, high = torch.where(falling, middle, low), torch.where(falling, high, middle)
    alpha = (low + high) / 2
    value = at(alpha)[0]
    # between the points the objective may have a second valley
    return torch.where(value <= least, alpha, best), torch.minimum(value, least)


def fusion_weights(
    large: Tensor,
    change: Shift,
    *,
    alpha_max: float = 2.0,
    objective: Objective = "symmetric",
    tolerance: float = 1e-5,
) -> Tensor:
    """α*, [..., specialists], of which at most one is not 0.

    Args:
        large: M^L, [..., vocabulary].
        change: How far fine-tuning moved the small model.
        alpha_max: The largest α.
        objective: Which squares count.
        tolerance: How exactly α is found.
    """
    # the squares for all targets have the same least point as those for their mean
    targets = change.forward.mean(dim=0), change.reverse.mean(dim=0)
    limits = {"alpha_max": alpha_max, "objective": objective, "tolerance": tolerance}
    found, values = zip(*(transfer(large, delta, *targets, **limits) for delta in change.delta), strict=True)
    chosen = torch.stack(values, dim=-1).argmin(dim=-1, keepdim=True)
    alpha = torch.stack(found, dim=-1)
    alpha = torch.zeros_like(alpha).scatter(-1, chosen, alpha.gather(-1, chosen))
    return alpha.masked_fill((torch.maximum(*targets) < _NO_SHIFT).unsqueeze(-1), 0)


def fuse(large: Tensor, change: Shift, alpha: Tensor) -> Tensor:
    """log P̃, [..., vocabulary].

    Args:
        large: M^L, [..., vocabulary].
        change: How far fine-tuning moved the small model.
        alpha: α, [..., specialists].
    """
    return (large + torch.einsum("...t,t...v->...v", alpha, change.delta)).log_softmax(dim=-1)
