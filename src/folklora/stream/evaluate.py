"""Evaluation: ranking labels by their likelihood, greedy answers, and a task's score in percent."""

from __future__ import annotations

import copy
import inspect
import itertools
import string
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutput

from folklora.adapters.host.past import restore_past, saved_past
from folklora.stream.tasks import Task
from folklora.stream.tokens import label_tokens, prompt_tokens

# A label is short and its prompt is already read, so several of them a prompt still are a small forward pass.
_LABELS_A_PROMPT = 4
# Greedy answers are scored by exact match, so what runs on for longer than every reference is wrong anyway.
_ANSWER_SLACK = 8


def rank_labels(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 512,
) -> Tensor:
    """Log-likelihood of every label after every prompt, Σ_k log p(label_k | prompt, label_<k).

    Prompt and label are tokenised apart and put together. A causal model gets no special token but what its tokenizer
    puts before a text (BOS); an encoder gets all of its tokenizer's. The sum runs over the label's own tokens; only
    where one label's tokens begin another's, so that the shorter could never lose, the end-of-text token is appended
    to all of them. Nothing is divided by a label's length. Each prompt is read once, and all labels continue from its
    cache; a model that keeps none, or whose adapter looks at the whole sequence, reads prompt and label together.

    Args:
        model: A causal or encoder-decoder language model of transformers, or a PEFT model around one.
        tokenizer: Its tokenizer.
        prompts: N texts.
        labels: L texts that continue a prompt (" positive", with the space).
        batch_size: Prompts read at once.
        max_length: Longest prompt with label, in tokens; longer prompts lose their beginning.

    Returns:
        [N, L] float32 log-likelihoods (nats), on the CPU, in the order of `prompts` and `labels`.

    Raises:
        ValueError: A label or a prompt has no tokens, two labels have the same, the tokenizer lacks an end-of-text
            token that is needed, `max_length` leaves no room for a prompt, or `batch_size` is below 1.
    """
    reader = _Reader.of(model, tokenizer)
    batch_size = min(batch_size, reader.most_rows)
    endings = label_tokens(tokenizer, labels)
    room = max_length - (0 if reader.encoder_decoder else max(map(len, endings)))
    questions = prompt_tokens(tokenizer, prompts, room, encoder_decoder=reader.encoder_decoder)
    scores = torch.empty(len(prompts), len(labels))
    with _evaluating(model):
        for rows in _batches(questions, batch_size):
            scores[rows] = _score(reader, [questions[row] for row in rows], endings, batch_size).cpu()
    return scores


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 32,
    max_length: int = 512,
) -> list[str]:
    """Greedy answers, each up to the end-of-text token.

    Args:
        model: As for `rank_labels`.
        tokenizer: Its tokenizer; prompts are tokenised as in `rank_labels`.
        prompts: N texts.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts answered at once.
        max_length: Longest prompt, in tokens, for a causal model with its answer; longer prompts lose their beginning.

    Returns:
        N texts without special tokens, as the model wrote them (a leading space is kept).

    Raises:
        ValueError: A prompt has no tokens, or `max_length` leaves no room for one, or `batch_size` is below 1.
    """
    reader = _Reader.of(model, tokenizer)
    batch_size = min(batch_size, reader.most_rows)
    room = max_length - (0 if reader.encoder_decoder else max_new_tokens)
    questions = prompt_tokens(tokenizer, prompts, room, encoder_decoder=reader.encoder_decoder)
    configured = getattr(reader.base.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    answers = [""] * len(prompts)
    with _evaluating(model):
        for rows in _batches(questions, batch_size):
            ids, mask = reader.pad([questions[row] for row in rows], left=not reader.encoder_decoder)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                # what a model's own configuration says on sampling would be warned of; these values are neutral
                temperature=1.0,
                top_p=1.0,
                top_k=50,
                num_beams=1,
                use_cache=not reader.whole_sequence,
                pad_token_id=reader.pad_id,
                eos_token_id=sorted(ends) or None,
            )
            # a decoder's output begins with its start token
            written = output[:, 1 if reader.encoder_decoder else ids.shape[1] :].tolist()
            for row, tokens in zip(rows, written, strict=True):
                answer = list(itertools.takewhile(lambda token: token not in ends, tokens))
                answers[row] = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return answers


def normalise(text: str) -> str:
    """What exact match compares: lower case, without ASCII punctuation, spaces collapsed.

    A text of nothing but punctuation is only stripped, so that such answers still differ from each other.
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(bare.split()) or text.strip()


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    metric: Literal["auto", "rank", "exact"] = "auto",
    batch_size: int = 32,
    max_length: int = 512,
    split: Literal["train", "test", "validation"] = "test",
) -> float:
    """Score on one split of a task, in percent.

    "rank": how often the completion is the most likely label (of equals the first). "exact": how often the greedy
    answer equals the completion after `normalise`.

    Args:
        model: As for `rank_labels`.
        tokenizer: Its tokenizer.
        task: The task.
        metric: "rank", "exact", or "auto": "rank" if the task has labels, else "exact".
        batch_size: Prompts read at once.
        max_length: As for `rank_labels`.
        split: Which of the task's examples.

    Returns:
        0 to 100.

    Raises:
        ValueError: The split is empty, metric or split is unknown, or ranking meets a task without labels or an
            example that has none of them; see `rank_labels` too.
    """
    if metric not in ("auto", "rank", "exact") or split not in ("train", "test", "validation"):
        valid = 'metric must be "auto", "rank" or "exact", split must be "train", "test" or "validation"'
        raise ValueError(f"{valid}, not {metric!r} and {split!r}")
    examples = getattr(task, split)
    if not examples:
        raise ValueError(f"task {task.name!r} has no {split} examples to evaluate on")
    prompts = [example.prompt for example in examples]
    wanted = [example.completion for example in examples]
    limits = {"batch_size": batch_size, "max_length": max_length}
    if metric == "exact" or (metric == "auto" and task.labels is None):
        longest = max(map(len, tokenizer(wanted, add_special_tokens=False, verbose=False)["input_ids"]))
        answers = generate_answers(model, tokenizer, prompts, max_new_tokens=longest + _ANSWER_SLACK, **limits)
        hits = [normalise(answer) == normalise(text) for answer, text in zip(answers, wanted, strict=True)]
    else:
        labels = _labels_of(task, wanted)
        best = rank_labels(model, tokenizer, prompts, labels, **limits).argmax(dim=1).tolist()
        hits = [labels[index] == text for index, text in zip(best, wanted, strict=True)]
    return 100.0 * sum(hits) / len(hits)


def _labels_of(task: Task, wanted: Sequence[str]) -> tuple[str, ...]:
    if task.labels is None:
        raise ValueError(f'task {task.name!r} has no labels to rank; use metric="exact"')
    if strange := sorted(set(wanted) - set(task.labels)):
        raise ValueError(f"task {task.name!r}: {strange[0]!r} is none of its labels {list(task.labels)}")
    return task.labels


@dataclass(frozen=True)
class _Reader:
    """A model, and what its forward pass can do."""

    model: nn.Module
    base: nn.Module
    device: torch.device
    pad_id: int
    encoder_decoder: bool
    whole_sequence: bool
    continues: bool  # may keep a cache, and may encode apart
    soft_positions: int  # that its own prompts put before each row
    most_rows: int
    accepts: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> _Reader:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # prompt tuning puts vectors before each row in each forward pass, and padding would part the two
        virtual = bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
        whole = any(getattr(module, "needs_full_sequence", False) for module in model.modules())
        return cls(
            model=model,
            base=base,
            device=next(model.parameters()).device,
            pad_id=0 if pad is None else pad,
            encoder_decoder=bool(base.config.is_encoder_decoder),
            whole_sequence=whole,
            continues=not (whole or virtual),
            soft_positions=sum(getattr(module, "soft_positions", 0) for module in model.modules()),
            most_rows=1 if virtual else sys.maxsize,
            accepts=frozenset(inspect.signature(base.forward).parameters) - ({"position_ids"} if virtual else set()),
        )

    def pad(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both [rows, longest]."""
        width = max(map(len, rows))
        blanks = [[self.pad_id] * (width - len(row)) for row in rows]
        ids = [[*blank, *row] if left else [*row, *blank] for row, blank in zip(rows, blanks, strict=True)]
        ones = [[0] * len(blank) + [1] * len(row) for row, blank in zip(rows, blanks, strict=True)]
        mask = ones if left else [line[::-1] for line in ones]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def asking(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        """Within this block a model that chooses by the question is told it, where rows hold answers besides."""
        ask = getattr(self.model, "asking", None)
        return nullcontext() if ask is None else ask(*self.pad(prompts, left=True))

    def logits(self, keep: int, mask: Tensor, ids: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits of the last `keep` of the given tokens, [rows, keep, vocabulary], and the whole output."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        optional = {"logits_to_keep": keep, "position_ids": positions, "use_cache": self.continues}
        inputs |= {key: value for key, value in optional.items() if key in self.accepts}
        output = self.model(input_ids=ids, attention_mask=mask, **inputs)
        return output.logits[:, -keep:], output


def _score(reader: _Reader, prompts: list[list[int]], labels: list[list[int]], batch_size: int) -> Tensor:
    """[prompts, labels] log-likelihoods of one batch."""
    if reader.encoder_decoder:
        return _score_decoder(reader, prompts, labels, batch_size)
    ids, mask = reader.pad(prompts, left=True)
    logits, output = reader.logits(1, mask, ids)
    scores = logits[:, 0].float().log_softmax(dim=-1).to(reader.device)[:, [label[0] for label in labels]]
    longer = [index for index, label in enumerate(labels) if len(label) > 1]
    endings = [labels[index] for index in longer]
    if endings and reader.continues and _continues(output, ids.shape[1] + reader.soft_positions):
        scores[:, longer] += _score_endings(reader, output.past_key_values, mask, endings, batch_size)
    elif endings:
        scores[:, longer] = _score_rows(reader, prompts, endings, batch_size)
    return scores


def _continues(output: Any, length: int) -> bool:
    """Whether several tokens can follow the cache: one of recurrent states, say, would mistake them or the padding."""
    cache = getattr(output, "past_key_values", None)
    if type(cache) is not DynamicCache or cache.get_seq_length() != length:
        return False
    return {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def _score_endings(
    reader: _Reader, cache: DynamicCache, mask: Tensor, labels: list[list[int]], batch_size: int
) -> Tensor:
    """Log-likelihood of each label after its first token, continuing from the cache of the prompts."""
    scores = torch.empty(len(mask), len(labels), device=reader.device)
    remembered = saved_past(reader.model, len(mask))
    chunks = list(_pairs(len(mask), labels, _LABELS_A_PROMPT * batch_size))
    for number, (rows, columns) in enumerate(chunks, start=1):
        past = cache if number == len(chunks) else copy.deepcopy(cache)
        taken = torch.tensor(rows, device=reader.device)
        past.reorder_cache(taken)
        restore_past(remembered, taken)
        ids, kept = reader.pad([labels[column][:-1] for column in columns], left=False)
        targets, _ = reader.pad([labels[column][1:] for column in columns], left=False)
        both = torch.cat([mask[rows], kept], dim=1)
        logits, _ = reader.logits(ids.shape[1], both, ids, past_key_values=past)
        scores[rows, columns] = _sum_log_probabilities(logits, targets, kept)
    return scores


def _score_rows(reader: _Reader, prompts: list[list[int]], labels: list[list[int]], batch_size: int) -> Tensor:
    """Read every prompt with every label in full."""
    scores = torch.empty(len(prompts), len(labels), device=reader.device)
    for rows, columns in _pairs(len(prompts), labels, batch_size):
        ids, mask = reader.pad([prompts[i] + labels[j][:-1] for i, j in zip(rows, columns, strict=True)], left=True)
        targets, kept = reader.pad([labels[column] for column in columns], left=True)
        with reader.asking([prompts[i] for i in rows]):
            logits, _ = reader.logits(targets.shape[1], mask, ids)
        scores[rows, columns] = _sum_log_probabilities(logits, targets, kept)
    return scores


def _score_decoder(reader: _Reader, prompts: list[list[int]], labels: list[list[int]], batch_size: int) -> Tensor:
    """Encode the prompts once and decode every label."""
    start = getattr(reader.base.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError("the model's config has no decoder_start_token_id, with which its answers begin")
    ids, mask = reader.pad(prompts, left=False)
    encoded = reader.base.get_encoder()(input_ids=ids, attention_mask=mask)[0] if reader.continues else None
    remembered = saved_past(reader.model, len(ids))
    scores = torch.empty(len(prompts), len(labels), device=reader.device)
    for rows, columns in _pairs(len(prompts), labels, _LABELS_A_PROMPT * batch_size):
        targets, kept = reader.pad([labels[column] for column in columns], left=False)
        read, _ = reader.pad([[start, *labels[column][:-1]] for column in columns], left=False)
        given = {"input_ids": ids[rows]}
        if encoded is not None:
            given = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded[rows])}
            restore_past(remembered, torch.tensor(rows, device=reader.device))
        output = reader.model(
            attention_mask=mask[rows], decoder_input_ids=read, decoder_attention_mask=kept, use_cache=False, **given
        )
        scores[rows, columns] = _sum_log_probabilities(output.logits[:, -read.shape[1] :], targets, kept)
    return scores


def _sum_log_probabilities(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """[rows] Σ over unmasked positions of log softmax(logits)[target], in float32."""
    wide = logits.float()
    chosen = wide.gather(-1, targets[..., None].to(wide.device))[..., 0] - wide.logsumexp(dim=-1)
    return chosen.to(mask.device).masked_fill(mask == 0, 0.0).sum(dim=1)


def _pairs(prompts: int, labels: Sequence[Sequence[int]], limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """All (prompt, label) pairs, at most `limit` at once, labels of like length together: rows and columns."""
    ordered = sorted(range(len(labels)), key=lambda index: len(labels[index]))
    pairs = [(row, column) for column in ordered for row in range(prompts)]
    for begin in range(0, len(pairs), limit):
        rows, columns = zip(*pairs[begin : begin + limit], strict=True)
        yield list(rows), list(columns)


def _batches(questions: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices by falling length: little padding, and what does not fit into memory fails first."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index]))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
