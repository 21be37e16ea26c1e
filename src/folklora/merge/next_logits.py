"""What models say comes next in texts that grow: each keeps a cache of its own, beside the one that generates.

A logits processor is told the texts and nothing else. So the rows of the last call are looked up in those of this one:
a row that goes on by one token continues from the cache, wherever it stood (beam search moves and copies rows), and
texts that do not are read from their start.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from folklora.adapters.host.past import restore_past, saved_past


class NextLogits:
    """The logits of the next token of texts, by several models.

    Args:
        readers: The models.
        vocabulary: How many tokens they share; logits after those are padding and left out.
    """

    def __init__(self, readers: Sequence[Reader], vocabulary: int) -> None:
        self.readers, self.vocabulary = list(readers), vocabulary
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None

    def forget(self) -> None:
        """Let go of the texts and of all caches."""
        self.tokens = self.mask = None
        for reader in self.readers:
            reader.cache = None

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits [lanes of all readers, rows, vocabulary] in float32, where the texts are.

        Args:
            tokens: [rows, positions].
            mask: [rows, positions], 0 where a row is padded.
        """
        parents = self._parents(tokens, mask)
        # a pass that fails leaves caches of unlike lengths behind
        self.tokens = None
        logits = [reader(tokens, mask, parents)[..., : self.vocabulary].to(tokens.device) for reader in self.readers]
        self.tokens, self.mask = tokens.clone(), mask
        return torch.cat(logits)

    def _parents(self, tokens: Tensor, mask: Tensor) -> Tensor | None:
        """The row of the last call that each row goes on from by one token; None where one goes on from none."""
        if self.tokens is None or tokens.shape[1] != self.tokens.shape[1] + 1:
            return None
        head, seen = tokens[:, :-1], mask[:, :-1]
        if torch.equal(head, self.tokens) and torch.equal(seen, self.mask):
            return torch.arange(len(head), device=tokens.device)
        same = (head[:, None] == self.tokens).all(dim=-1) & (seen[:, None] == self.mask).all(dim=-1)
        return same.int().argmax(dim=1) if bool(same.any(dim=1).all()) else None


class Reader:
    """One model with its cache; of a PEFT model, several of its adapters in one batched pass.

    Args:
        model: A decoder-only language model in evaluation mode, wrapped by PEFT or not.
        adapters: One lane each: names of adapters of the model, "__base__" for none. Empty: one lane, as the model is.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str] = ()) -> None:
        base = _bare(model)
        self.model, self.adapters, self.lanes = model, tuple(adapters), max(1, len(adapters))
        self.accepts = frozenset(inspect.signature(base.forward).parameters)
        self.keeps = not any(getattr(module, "needs_full_sequence", False) for module in model.modules())
        self.longest = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self.cache: Any = None
        self.rows = 0

    def __call__(self, tokens: Tensor, mask: Tensor, parents: Tensor | None) -> Tensor:
        """[lanes, rows, vocabulary]; `parents` are the rows of the last call that these go on from, None if of none."""
        rows, count = tokens.shape
        if self.longest is not None and count > self.longest:
            raise ValueError(
                f"a text of {count} tokens is longer than the {self.longest} positions of {type(self.model).__name__}: "
                "shorten the prompt or lower max_new_tokens"
            )
        if parents is None or not self._take(parents):
            self.cache = None
        device = next(self.model.parameters()).device
        tokens, mask = tokens.to(device).repeat(self.lanes, 1), mask.to(device).repeat(self.lanes, 1)
        logits = self._forward(tokens if self.cache is None else tokens[:, -1:], mask)
        return logits.unflatten(0, (self.lanes, rows))

    def _take(self, parents: Tensor) -> bool:
        """Let the cache's rows be those of the parents; whether there is a cache that can."""
        if self.cache is None:
            return False
        before = self.rows // self.lanes
        if torch.equal(parents, torch.arange(before, device=parents.device)):
            return True
        if not hasattr(self.cache, "reorder_cache"):
            return False
        taken = (torch.arange(self.lanes, device=parents.device)[:, None] * before + parents).flatten()
        remembered = saved_past(self.model, self.rows)
        self.cache.reorder_cache(taken)
        restore_past(remembered, taken)
        return True

    def _forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        optional = {"position_ids": positions, "use_cache": self.keeps, "logits_to_keep": 1}
        given = {key: value for key, value in optional.items() if key in self.accepts}
        if self.cache is not None:
            given["past_key_values"] = self.cache
        if self.adapters:
            # one name a row: PEFT's own tuners take no shorter list
            rows = len(tokens) // self.lanes
            given["adapter_names"] = [name for name in self.adapters for _ in range(rows)]
        output = self.model(input_ids=tokens, attention_mask=mask, **given)
        self.cache = getattr(output, "past_key_values", None) if self.keeps else None
        self.rows = len(tokens)
        return output.logits[:, -1].float()


def readers_of(small: nn.Module, specialists: Sequence[nn.Module] | Sequence[str]) -> list[Reader]:
    """The readers of a small base, first, and of its specialists: models, or names of adapters on the base.

    Raises:
        ValueError: There are none, there is no such adapter, or a model cannot be read.
    """
    if not specialists:
        raise ValueError("name at least one specialist")
    named = [specialist for specialist in specialists if isinstance(specialist, str)]
    if named and len(named) < len(specialists):
        raise ValueError("specialists must be all models or all names of adapters on the small base")
    models = [small] if named else [small, *specialists]
    for model in models:
        _check_readable(model)
    if named:
        there = getattr(small, "peft_config", {})
        if unknown := sorted(set(named) - set(there)):
            raise ValueError(f"the small base has no adapter {', '.join(unknown)}; it has {', '.join(there) or 'none'}")
        return [Reader(small, ["__base__", *named])]
    if any(_bare(specialist) is _bare(small) for specialist in specialists):
        raise ValueError(
            "a specialist is made of the very layers of the small base, which would be read with its adapters: give "
            "the PEFT model as the small base, and the names of its adapters as specialists"
        )
    return [Reader(model) for model in models]


def _bare(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_readable(model: nn.Module) -> None:
    what = type(_bare(model)).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{what} is an encoder-decoder; only decoders can be read along a text")
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            f"{what} has an adapter of virtual tokens, which its cache would mistake for those of the text"
        )
    if model.training:
        raise ValueError(f"{what} is in training mode, where dropout changes its logits: call eval()")


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens a model gives logits of."""
    return model.config.get_text_config().vocab_size


def shared_vocabulary(
    models: Mapping[str, nn.Module], vocabulary: int | None, tokenizers: Sequence[PreTrainedTokenizerBase] = ()
) -> int:
    """How many tokens the models share.

    Args:
        models: By what they are called.
        vocabulary: How many it should be, where models have more; None: all of them.
        tokenizers: To be compared.

    Raises:
        ValueError: They have different numbers, or less than they should share, or different tokens.
    """
    sizes = {what: vocabulary_size(model) for what, model in models.items()}
    listed = ", ".join(f"{what} has {size}" for what, size in sizes.items())
    least = min(sizes.values())
    if vocabulary is None and least < max(sizes.values()):
        raise ValueError(
            f"the models need one vocabulary, but of tokens {listed}; where only padding follows the tokens that they "
            "share, say vocabulary=<how many they share>"
        )
    count = least if vocabulary is None else vocabulary
    if not 0 < count <= least:
        raise ValueError(f"vocabulary is {count}, but of tokens {listed}")
    _check_tokens(tokenizers, count)
    return count


def _check_tokens(tokenizers: Sequence[PreTrainedTokenizerBase], count: int) -> None:
    tables = [{i: token for token, i in tokenizer.get_vocab().items() if i < count} for tokenizer in tokenizers]
    for number, table in enumerate(tables[1:], start=2):
        for i in sorted(table.keys() | tables[0].keys()):
            first, other = tables[0].get(i), table.get(i)
            if first != other:
                raise ValueError(
                    f"the models need one vocabulary, but token {i} is {first!r} for the first tokenizer and {other!r} "
                    f"for number {number}"
                )


def padding_tokens(models: Sequence[nn.Module]) -> set[int]:
    """What the models' prompts may be padded with: their padding tokens, or else the ends of text."""
    settings = [part for model in models for part in (getattr(model, "generation_config", None), model.config) if part]
    found = {getattr(part, "pad_token_id", None) for part in settings} - {None}
    if found:
        return found
    ends = [getattr(part, "eos_token_id", None) for part in settings]
    return {token for end in ends if end is not None for token in (end if isinstance(end, list) else [end])}
