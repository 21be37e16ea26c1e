"""Texts for a Generative Adapter: write them into adapter states, apply those, and lay out training batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from folklora.adapters.generative_adapter import GenerativeUpdate
from folklora.adapters.host.call import telling
from folklora.adapters.host.layer import updates_of
from folklora.adapters.host.saved import add_with_values
from folklora.adapters.lora import LoRA
from folklora.factored import Factors
from folklora.stream.files import replacing

# values that went through bfloat16 once
_SAME = 2.0**-7


@dataclass(frozen=True, eq=False)
class Written:
    """What a Generative Adapter holds of the texts that were written: S of each layer.

    Args:
        states: S [R₁, R₂] by the layer's name.
        samples: Some values of the generator of each layer, by which another one is refused.
        tokens: How many tokens were written.
    """

    states: dict[str, Tensor]
    samples: dict[str, Tensor]
    tokens: int

    def __add__(self, other: Written) -> Written:
        """Both texts in one state, each read without the other."""
        for name, sample in self.samples.items():
            if name not in other.samples or not torch.equal(sample, other.samples[name]):
                raise ValueError("the two states were written by different generators and cannot be added")
        states = {name: S + other.states[name] for name, S in self.states.items()}
        return Written(states, self.samples, self.tokens + other.tokens)

    @torch.no_grad()
    def install(self, model: nn.Module, name: str, adapter_name: str = "default") -> None:
        """Put what was written on the model as a plain LoRA, an adapter like others: it merges, saves, exports, mixes.

        The factors are fixed: later training of the generator and later writing leave them alone.

        Args:
            model: The PEFT model that wrote it.
            name: The new adapter's name; it is not made active.
            adapter_name: The adapter that wrote.

        Raises:
            ValueError: The name is taken, the model has no such adapter, or the state is another generator's.
        """
        if name in model.peft_config:
            raise ValueError(f"the model has an adapter '{name}' already; choose another name")
        updates = generators(model, adapter_name)
        _check_generator(updates, self)
        factors = {}
        for layer, update in updates_of(model, adapter_name):
            A, B = update.written(self.states[layer.name].to(update.A1.device))
            limit = min(A.shape[0], A.shape[1], B.shape[0], update.config.inner)
            if update.config.norm == "svd":
                limit = min(limit, update.config.max_rank)
            factors[layer.name] = Factors(A, 1.0, B).truncate(limit)
        ranks = {key: part.rank for key, part in factors.items()}
        common = max(ranks.values())
        # anchored patterns: PEFT matches a key against the end of a name
        others = {f"^{key}": rank for key, rank in ranks.items() if rank != common}
        config = LoRA(
            r=common, alpha=common, rank_pattern=others, alpha_pattern=dict(others), target_modules=sorted(factors)
        )
        values = {key: dict(zip("AB", part.to_lora(), strict=True)) for key, part in factors.items()}
        add_with_values(model, name, config, values, adapter_name)

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file, whole or not at all."""
        tensors = {f"state.{name}": S.cpu().contiguous() for name, S in self.states.items()}
        tensors |= {f"sample.{name}": sample for name, sample in self.samples.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", "tokens": str(self.tokens)})

    @classmethod
    def load(cls, path: str | Path) -> Written:
        """Read a state that `save` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            keys, tokens = list(file.keys()), (file.metadata() or {}).get("tokens")
            parts = {
                kind: {key.removeprefix(kind): file.get_tensor(key) for key in keys if key.startswith(kind)}
                for kind in ("state.", "sample.")
            }
        states, samples = parts["state."], parts["sample."]
        if tokens is None or not states or states.keys() != samples.keys() or len(keys) != 2 * len(states):
            raise ValueError(f"{path} holds no state of a Generative Adapter")
        return cls(states, samples, int(tokens))


@torch.no_grad()
def write(
    model: nn.Module,
    text: str | Sequence[int] | Tensor,
    *,
    tokenizer: Any = None,
    onto: Written | None = None,
    strategy: Literal["sequential", "parallel"] = "sequential",
    adapter_name: str = "default",
) -> Written:
    """Write a text into an adapter state, window by window, in one forward pass each.

    Args:
        model: A model whose active adapter is a trained `GenerativeAdapter`.
        text: The text, or its tokens [tokens].
        tokenizer: Needed where `text` is a string.
        onto: A state that the text is added to.
        strategy: "sequential" reads each window under what was written before it (`onto` included), the authors'
            streaming form; "parallel" reads each with the base alone.
        adapter_name: The adapter.

    Returns:
        The new state; `onto` stays as it is.

    Raises:
        ValueError: There is no such active adapter, no text or no tokenizer, or `onto` is another generator's.
    """
    updates = generators(model, adapter_name)
    tokens = _tokens(text, tokenizer)
    if strategy not in ("sequential", "parallel"):
        raise ValueError(f"strategy must be sequential or parallel, not {strategy!r}")
    if onto is not None:
        _check_generator(updates, onto)
    states = dict(onto.states) if onto is not None else {}
    training = model.training
    model.eval()
    try:
        for chunk in windows(tokens, next(iter(updates.values())).config.window):
            record: dict[tuple[str, str], Tensor] = {}
            cores = _cores(updates, [states], adapter_name) if states and strategy == "sequential" else {}
            with telling(model, record=record, cores=cores):
                chunk = chunk.to(next(model.parameters()).device)[None]
                model(input_ids=chunk, attention_mask=torch.ones_like(chunk))
            if not record:
                raise ValueError(f"adapter '{adapter_name}' is not active: call model.set_adapter('{adapter_name}')")
            for name in updates:
                S = record[adapter_name, name][0]
                states[name] = S if name not in states else states[name].to(S) + S
    finally:
        model.train(training)
    samples = {name: update.sample() for name, update in updates.items()}
    return Written(states, samples, len(tokens) + (0 if onto is None else onto.tokens))


@contextmanager
def applied(
    model: nn.Module, written: Written | Sequence[Written | None] | None, adapter_name: str = "default"
) -> Iterator[None]:
    """Put what was written under every call within; afterwards nothing of it is left.

    Args:
        model: The model.
        written: A state for all rows of a batch, one for each row (None for the base), or None for the base.
        adapter_name: The adapter that wrote.

    Raises:
        ValueError: The model has no such adapter, or a state is another generator's.
    """
    updates = generators(model, adapter_name)
    rows = [written] if written is None or isinstance(written, Written) else list(written)
    for state in {id(state): state for state in rows if state is not None}.values():
        _check_generator(updates, state)
    cores = _cores(updates, [None if row is None else row.states for row in rows], adapter_name)
    with telling(model, cores=cores):
        yield


def generators(model: nn.Module, adapter_name: str = "default") -> dict[str, GenerativeUpdate]:
    """The generators of a model by their layers' names.

    Raises:
        ValueError: The model has no `GenerativeAdapter` of that name.
    """
    updates = {layer.name: update for layer, update in updates_of(model, adapter_name)}
    if not updates or not all(isinstance(update, GenerativeUpdate) for update in updates.values()):
        raise ValueError(f"the model has no GenerativeAdapter named '{adapter_name}'")
    return updates


def windows(tokens: Tensor, window: int) -> list[Tensor]:
    """Tokens in the fewest pieces of at most `window`, as equal as can be."""
    pieces = math.ceil(len(tokens) / window)
    return list(tokens.split(math.ceil(len(tokens) / pieces)))


def pretraining_batch(
    documents: Tensor, window: int, pad: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Documents as rows for `layout="reconstruction"`: their windows, then for each prefix of them a piece to repeat.

    For every j a piece starts anywhere in windows 0 ... j and ends `window` tokens later or with window j.

    Args:
        documents: Tokens [batch, n windows].
        window: Tokens in a window.
        pad: The token that fills short pieces; it is masked.
        generator: Where the draws come from.

    Returns:
        input_ids, attention_mask and labels, each [batch · 2n, window]: for a model with segments=2n.

    Raises:
        ValueError: The documents are no whole number of windows long.
    """
    length = documents.shape[1]
    if length == 0 or length % window:
        raise ValueError(f"documents of {length} tokens are no whole number of windows of {window} tokens")
    rows = []
    for document in documents:
        rows += document.split(window)
        for end in range(window, length + 1, window):
            start = int(torch.randint(end, (), generator=generator))
            rows.append(document[start : min(start + window, end)])
    return _padded(rows, [row.clone() for row in rows], window, pad)


def instruction_batch(
    contexts: Sequence[Tensor],
    conversations: Sequence[Tensor],
    labels: Sequence[Tensor],
    segments: int,
    pad: int,
) -> dict[str, Tensor]:
    """(Context, conversation) pairs as rows for `layout="completion"`: each context in pieces, then the conversation.

    Args:
        contexts: Tokens of each context, cut into `segments` - 1 pieces as equal as can be; no loss is taken on them.
        conversations: Tokens of each conversation.
        labels: Its labels, -100 where no loss is taken (all but the assistant's turns).
        segments: Rows a pair.
        pad: The token that fills short rows; it is masked.

    Returns:
        input_ids, attention_mask and labels, each [pairs · segments, longest].

    Raises:
        ValueError: A context is too short for so many pieces, or labels do not match their conversation.
    """
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    for i, (context, conversation, wanted) in enumerate(zip(contexts, conversations, labels, strict=True)):
        if segments < 2 or len(context) < segments - 1 or wanted.shape != conversation.shape:
            raise ValueError(
                f"pair {i}: a context of {len(context)} tokens and a conversation of {len(conversation)} with "
                f"{len(wanted)} labels do not fill {segments} segments"
            )
        pieces = context.tensor_split(segments - 1)
        rows += [*pieces, conversation]
        targets += [*(torch.full_like(piece, -100) for piece in pieces), wanted]
    return _padded(rows, targets, max(map(len, rows)), pad)


def _padded(rows: list[Tensor], targets: list[Tensor], length: int, pad: int) -> dict[str, Tensor]:
    def fill(parts: list[Tensor], value: int) -> Tensor:
        return torch.stack([torch.cat([p, p.new_full((length - len(p),), value)]) for p in parts])

    mask = fill([torch.ones_like(row) for row in rows], 0)
    return {"input_ids": fill(rows, pad), "attention_mask": mask, "labels": fill(targets, -100)}


def _tokens(text: str | Sequence[int] | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("a text needs its tokenizer: write(model, text, tokenizer=...)")
        text = tokenizer(text)["input_ids"]
    tokens = torch.as_tensor(text)
    if tokens.dim() != 1 or not len(tokens) or tokens.is_floating_point():
        raise ValueError(f"tokens must be whole numbers [tokens], at least one, not {list(tokens.shape)}")
    return tokens


def _check_generator(updates: dict[str, GenerativeUpdate], written: Written) -> None:
    if written.states.keys() != updates.keys():
        strange = ", ".join(sorted(written.states.keys() ^ updates.keys()))
        raise ValueError(f"the state was written on other layers: {strange}")
    for name, update in updates.items():
        own, theirs = update.sample(), written.samples[name]
        if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=_SAME, atol=0):
            raise ValueError(f"the state was written by another generator on layer '{name}'; write the text again")


def _cores(
    updates: dict[str, GenerativeUpdate], rows: Sequence[dict[str, Tensor] | None], adapter_name: str
) -> dict[tuple[str, str], Tensor]:
    """M of each row [rows, R₁, R₂] by (adapter, layer); each state is normalised once."""
    cores = {}
    distinct = {id(row): row for row in rows if row is not None}
    for name, update in updates.items():
        if distinct:
            with torch.no_grad():
                found = {key: update.normalise(row[name].to(update.A1.device)) for key, row in distinct.items()}
            nothing = torch.zeros_like(next(iter(found.values())))
            cores[adapter_name, name] = torch.stack([nothing if row is None else found[id(row)] for row in rows])
    return cores
