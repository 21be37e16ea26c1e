"""What a domain adapter learns from: masked words of the domain's sentences, and general text that must stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from folklora.adapters.carriers import carriers
from folklora.adapters.host.blocks import block_of
from folklora.adapters.host.layer import FolkloraLayer
from folklora.adapters.mixda import MixDAUpdate

IGNORED = -100


def domain_loss(
    model: PeftModel, knowledge: Mapping[str, Tensor], sample: Mapping[str, Tensor], adapter_name: str = "default"
) -> Tensor:
    """0.5 L_K + L_S, the loss of MixDA's first stage, of two batches.

    Args:
        model: A language model (masked, causal or with an encoder and a decoder) that carries the adapter.
        knowledge: A batch of the domain, with `labels` where a word is to be predicted and -100 elsewhere.
        sample: A batch of general text; its labels, if any, are not read.
        adapter_name: The adapter.

    Raises:
        ValueError: The model has no such MixDA adapter.
    """
    weight = _updates(model, adapter_name)[0][1].config.knowledge_weight
    return weight * knowledge_loss(model, knowledge, adapter_name) + sample_loss(model, sample, adapter_name)


def knowledge_loss(model: PeftModel, batch: Mapping[str, Tensor], adapter_name: str = "default") -> Tensor:
    """L_K: the cross-entropy of the labelled words, a mean over those of a row, then over rows that have any."""
    with _rest_of(model, adapter_name):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        base, labels = model.get_base_model(), batch["labels"]
        if base.config.is_encoder_decoder:
            logits = model(**batch).logits
        elif type(base).__name__.endswith("ForMaskedLM"):
            logits = model(**inputs).logits
        else:
            logits, labels = model(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    known = (labels != IGNORED).to(losses.dtype)
    counts = known.sum(1)
    rows = losses.view_as(known).sum(1) / counts.clamp(min=1)
    return rows.sum() / (counts > 0).sum().clamp(min=1)


def sample_loss(model: PeftModel, batch: Mapping[str, Tensor], adapter_name: str = "default") -> Tensor:
    """L_S: how far general text is from the base, a mean square over the adapted layers, real tokens and dimensions.

    Either of each block's output with the adapters from that without any, of one input, or of the adapter's output
    from the layer's own, as the options' `sample_target` says.
    """
    found: list[Tensor] = []
    pairs = _updates(model, adapter_name)
    with _rest_of(model, adapter_name):
        if pairs[0][1].config.sample_target == "layer":
            context = pairs[0][0].context
            blocks = dict.fromkeys(block_of(layer.name) for layer, _ in pairs)
            base = model.get_base_model()
            handles = [
                base.get_submodule(name).register_forward_hook(_block_hook(found, context), with_kwargs=True)
                for name in blocks
            ]
        else:
            handles = [layer.register_forward_hook(_layer_hook(found, update)) for layer, update in pairs]
        try:
            model(**{"use_cache": False, **{key: value for key, value in batch.items() if key != "labels"}})
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack([_mean_over(square, batch.get("attention_mask")) for square in found]).mean()


def mask_slots(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[tuple[str, Sequence[str]]], max_length: int | None = None
) -> dict[str, Tensor]:
    """A batch for `knowledge_loss`: sentences whose slots are filled, masked there, and labelled there.

    Args:
        tokenizer: A fast one; where it has no mask token (a causal model) the words are left in place.
        sentences: Text with a {} for each slot, and the words that fill them.
        max_length: Tokens of a row; longer ones are cut.

    Raises:
        ValueError: A text has not as many slots as words.
    """
    filled = [_filled(text, words) for text, words in sentences]
    encoded = tokenizer(
        [text for text, _ in filled],
        padding=True,
        truncation=max_length is not None,
        max_length=max_length,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    offsets, ids = encoded.pop("offset_mapping"), encoded["input_ids"]
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for row, (_, spans) in enumerate(filled):
        for start, end in spans:
            # special tokens have no width
            first, last = offsets[row, :, 0], offsets[row, :, 1]
            chosen[row] |= (first < end) & (last > start) & (last > first)
    batch = {**encoded, "labels": ids.masked_fill(~chosen, IGNORED)}
    if tokenizer.mask_token_id is not None:
        batch["input_ids"] = ids.masked_fill(chosen, tokenizer.mask_token_id)
    return batch


def _filled(text: str, words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text with its slots filled, and where each word begins and ends."""
    parts = text.split("{}")
    if len(parts) != len(words) + 1:
        raise ValueError(f"'{text}' has {len(parts) - 1} slots, and there are {len(words)} words for them")
    whole, spans = parts[0], []
    for word, part in zip(words, parts[1:], strict=True):
        spans.append((len(whole), len(whole) + len(word)))
        whole += word + part
    return whole, spans


def _updates(model: PeftModel, adapter_name: str) -> list[tuple[FolkloraLayer, MixDAUpdate]]:
    return carriers(model, adapter_name, MixDAUpdate, "MixDA")


@contextmanager
def _rest_of(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Within this block all of the model but the adapter's own parts is in evaluation mode; these are in their own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    own = {part for _, update in _updates(model, adapter_name) for part in update.modules()}
    try:
        for module, mode in modes:
            if module in own:
                module.training = mode
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _block_hook(found: list[Tensor], context: Any) -> Any:
    def compare(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        before, context.alone = context.alone, ()
        try:
            with torch.no_grad():
                expected = block.forward(*args, **kwargs)
        finally:
            context.alone = before
        found.append((_hidden(output) - _hidden(expected)).square())

    return compare


def _layer_hook(found: list[Tensor], update: MixDAUpdate) -> Any:
    def compare(layer: FolkloraLayer, args: tuple, output: Tensor) -> None:
        with torch.no_grad():
            expected = layer.get_base_layer()(args[0])
        found.extend((adapter(args[0]) - expected).square() for adapter in update.adapters)

    return compare


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _mean_over(squares: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != squares.shape[:-1]:
        return squares.mean()
    real = mask.to(squares.dtype)
    return (squares.mean(-1) * real).sum() / real.sum().clamp(min=1)
