"""Fusion-X: a model learns from others with tokenisers of their own; a small gate says from which, text by text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from folklora.stream.tokens import IGNORED

Divergence = Literal["ce", "kl"]
_SMALLEST = 1e-10


class FusionX(nn.Module):
    r"""Fusion-X: several language models are distilled into one, and a gate selects and weighs them text by text.

    Once, before training: each of M models, the target as it was and M - 1 sources, reads the texts in its own tokens;
    of each position the k largest logits are kept, of each text the mean cross-entropy ce_m of a token. They are put
    into the target's tokens by a map of the vocabularies (the same token, else that of least edit distance) and by
    dynamic time warping of the two rows of tokens: `folklora.merge.lessons`. P_m = softmax(logits / τ) over the k.
    In training, for each text:
        R_m = exp(-ce_m),  s = (R_1, ..., R_M)
        g = softmax(MLP(s))                                 Linear(M, 2M) - GELU - Linear(2M, M) - GELU - Linear(M, M)
        S = {m : g_m > threshold}, or the largest if none,  g̃ = g on S, made to sum to 1, 0 elsewhere
        P = Σ_m g̃_m P_m                                     what is to come next, at each position
        L_fb = var(I) / (mean(I)² + 1e-10),  I_m = Σ_texts g̃_m    unbiased variance over m: CV² of the importances
        L = λ L_LM + (1 - λ) L_distill + β L_fb,  L_distill = mean over positions of -Σ_v P(v) log Q(v), or KL(P‖Q)
    The target's Q and the gate are trained; afterwards `target` is a plain model. P is never spread over the
    vocabulary: M k of the target's log-probabilities are gathered. At λ = 1, β = 0 it is plain training.

    Departures from the published code, which makes a new gate with random weights in each step and trains none: here
    the gate is a part of the model and learns from L_distill and L_fb. It is asked once a text, in float32, where the
    code repeats it for each number of [B, L, V]. Two source tokens with one target token add up, where the code keeps
    the first. What is not aligned is taught by the text's next token, where the code has the present one (`Collator`).
    L_distill is the less, the more the selected teachers are sure of what the target says anyway, so the gate tends to
    them; L_fb holds against it, but also against finding that one source is best: lower `feedback` (β is read at each
    call) as training goes on. I is summed over one call's texts: of a single text, L_fb asks for all teachers alike.

    It is a module around the target, for `transformers.Trainer` or a loop by hand; with adapters on the target (a PEFT
    model) those alone are trained. A gate wants a larger learning rate than a pretrained target.

    Source: Kong, Zhan, Hou et al., "Enabling Flexible Multi-LLM Integration for Scalable Knowledge Aggregation", 2025,
    arXiv 2505.23844.

    When to choose:
        Models of different architectures and vocabularies know what one model should, and there is plain text to learn
        from. Models of one architecture are merged without training (`folklora.merge_models`); of one vocabulary,
        `DynamicLogitFusion` joins them without training.

    Equation:
        g = \operatorname{softmax}(\mathrm{MLP}(e^{-\mathrm{ce}}))
        S = \{m : g_m > t\}, \quad \tilde g_m = \frac{g_m}{\sum_{j \in S} g_j} \ (m \in S), \ 0 \ (m \notin S)
        P = \sum_m \tilde g_m P_m
        L_{\mathrm{fb}} = \operatorname{var}(I) / \operatorname{mean}(I)^2, \quad I_m = \sum_b \tilde g_{b,m}
        L = \lambda L_{\mathrm{LM}} + (1 - \lambda)\,\mathrm{CE}(P, Q) + \beta L_{\mathrm{fb}}

    Example:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
        from folklora.demo import model_folder
        from folklora.merge import FusionX
        from folklora.merge.lessons import Collator, Lessons, read_texts

        tokenizer = AutoTokenizer.from_pretrained(model_folder())
        source = AutoModelForCausalLM.from_pretrained(model_folder())
        target = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=48, n_layer=1, eos_token_id=0))
        texts = ["The wind is high today.", "A letter came from the harbour."]
        # in life, the source has a tokenizer of its own
        own, other = read_texts(target, tokenizer, texts), read_texts(source, tokenizer, texts)
        lessons = Lessons.of(own, {"source": other})
        fusion = FusionX(target, teachers=2)
        optimizer = torch.optim.AdamW(
            [{"params": target.parameters(), "lr": 1e-3}, {"params": fusion.gate.parameters(), "lr": 1e-2}]
        )
        for _ in range(3):
            fusion(**Collator()(list(lessons))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(fusion.parts)

    Args:
        target: The model that learns; a decoder, wrapped by PEFT or not.
        teachers: M, with the target itself.
        threshold: Gates above it are selected; 0 takes all, 1 the largest alone.
        lm_weight: λ.
        feedback: β.
        divergence: "ce" or "kl".
        temperature: τ.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        target: nn.Module,
        teachers: int,
        *,
        threshold: float = 0.15,
        lm_weight: float = 0.9,
        feedback: float = 0.5,
        divergence: Divergence = "ce",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if divergence not in get_args(Divergence):
            raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, not {divergence!r}")
        if teachers < 1 or not 0 <= lm_weight <= 1 or not temperature > 0 or threshold < 0 or feedback < 0:
            raise ValueError(
                f"teachers must be at least 1 ({teachers}), lm_weight from 0 to 1 ({lm_weight}), temperature above 0 "
                f"({temperature}), threshold ({threshold}) and feedback ({feedback}) at least 0"
            )
        self.target, self.teachers = target, teachers
        self.threshold, self.lm_weight, self.feedback = threshold, lm_weight, feedback
        self.divergence, self.temperature = divergence, temperature
        device = next(target.parameters()).device
        self.gate = nn.Sequential(
            nn.Linear(teachers, 2 * teachers, device=device),
            nn.GELU(),
            nn.Linear(2 * teachers, teachers, device=device),
            nn.GELU(),
            nn.Linear(teachers, teachers, device=device),
        )
        self.parts: dict[str, Tensor] = {}
        """Of what the last call's loss was made, for logs: lm, distillation, feedback, and the mean g̃."""
        self.register_state_dict_post_hook(_once)
        self.register_load_state_dict_pre_hook(_again)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        teacher_losses: Tensor | None = None,
    ) -> CausalLMOutput:
        """The loss of a batch of `Collator`; without teachers the target's own.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L].
            labels: [B, L], -100 where nothing is learnt.
            teacher_ids: [B, L, M, k], in the target's numbers.
            teacher_logits: [B, L, M, k]; of -inf alone where a teacher says nothing.
            teacher_losses: ce_m, [B, M].
        """
        output = self.target(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if teacher_ids is None or labels is None:
            return CausalLMOutput(loss=output.loss, logits=output.logits)
        if teacher_ids.shape[2] != self.teachers:
            raise ValueError(f"the batch has {teacher_ids.shape[2]} teachers, and the gate {self.teachers}")
        weights = self.weights(teacher_losses)
        with torch.autocast(input_ids.device.type, enabled=False):
            probabilities = (teacher_logits.float() / self.temperature).softmax(-1).nan_to_num() * _wide(weights)
            lost = distillation(
                output.logits[:, :-1], teacher_ids[:, :-1].flatten(2), probabilities[:, :-1].flatten(2), self.divergence
            )
            # the last token has no next one
            learnt = labels[:, 1:] != IGNORED
            distilled = lost.masked_fill(~learnt, 0.0).sum() / learnt.sum().clamp_min(1)
            balance = feedback_loss(weights)
        loss = self.lm_weight * output.loss + (1 - self.lm_weight) * distilled + self.feedback * balance
        self.parts = {"lm": output.loss, "distillation": distilled, "feedback": balance, "weights": weights.mean(0)}
        self.parts = {name: value.detach() for name, value in self.parts.items()}
        return CausalLMOutput(loss=loss, logits=output.logits)

    def weights(self, losses: Tensor) -> Tensor:
        """g̃ [B, M] of the teachers' losses ce [B, M] in each text."""
        with torch.autocast(losses.device.type, enabled=False):
            own = self.gate[0].weight.dtype
            return select(self.gate((-losses.float()).exp().to(own)).float(), self.threshold)


def select(logits: Tensor, threshold: float) -> Tensor:
    """g̃: softmax, of which what is above the threshold, or else the largest, is kept and made to sum to 1.

    Args:
        logits: [..., M].
        threshold: From 0 (all) to 1 (the largest alone).
    """
    g = logits.softmax(-1)
    largest = torch.zeros_like(g, dtype=torch.bool).scatter(-1, g.argmax(-1, keepdim=True), True)
    kept = g > threshold
    g = g * torch.where(kept.any(-1, keepdim=True), kept, largest)
    return g / g.sum(-1, keepdim=True)


def feedback_loss(weights: Tensor) -> Tensor:
    """CV² of the teachers' importances: var(I) / (mean(I)² + 1e-10) with I [M] the sum over texts; 0 for one teacher.

    Args:
        weights: g̃ [B, M].
    """
    importance = weights.sum(0)
    if len(importance) == 1:
        return importance.new_zeros(())
    return importance.var() / (importance.mean().square() + _SMALLEST)


def distillation(logits: Tensor, ids: Tensor, probabilities: Tensor, divergence: Divergence = "ce") -> Tensor:
    """-Σ_v P(v) log Q(v) of each position, or KL(P‖Q), for a P that few tokens have; [...].

    Args:
        logits: The student's, Q = softmax, [..., V].
        ids: Tokens, [..., n]; one that is there several times has the sum.
        probabilities: Theirs, [..., n].
        divergence: "ce" or "kl".
    """
    # the sum over the vocabulary in float32, whatever the logits are in
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_q = wide.gather(-1, ids) - wide.logsumexp(-1, keepdim=True)
    crossed = -(probabilities * log_q).sum(-1)
    if divergence == "ce":
        return crossed
    together = ((ids.unsqueeze(-1) == ids.unsqueeze(-2)).to(probabilities) @ probabilities.unsqueeze(-1)).squeeze(-1)
    # the logarithm of what nobody says has no gradient that is finite
    logarithms = together.masked_fill(probabilities == 0, 1.0).log()
    return crossed + (probabilities * logarithms).sum(-1)


def _wide(weights: Tensor) -> Tensor:
    """[B, M] beside [B, L, M, k]."""
    return weights[:, None, :, None]


def _twins(module: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one too (tied embeddings), and that one's name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}
    return {name: other for name, other in names.items() if name != other}


def _once(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Any]) -> None:
    # a safetensors file, as Trainer writes it, holds no tensor twice
    for name in _twins(module):
        state.pop(prefix + name, None)


def _again(module: nn.Module, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
    for name, other in _twins(module).items():
        if prefix + other in state:
            state.setdefault(prefix + name, state[prefix + other])
