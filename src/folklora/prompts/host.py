"""The PEFT tuner that carries soft prompts: it puts them among the embedded tokens of every call of a model.

The part that embeds the tokens (a causal model's decoder, the encoder of an encoder-decoder model) gets hooks, and the
prompts lie in one module at the model's root. Outside of that part nobody sees them: token ids, masks, position
numbers, labels and logits keep the lengths that they have without. So training, generation and scoring need not know
of them; only a cache, an encoder's output and the inner hidden states are longer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from folklora.adapters.host.call import remove_hooks
from folklora.adapters.host.kinds import evenly_spaced, same_sample
from folklora.prompts.base import PROMPT_TYPE, Prompt, PromptConfig
from folklora.prompts.places import extended_mask, extended_positions, extended_rows, first_real, tokens
from folklora.prompts.question import Question, frozen_pass, mean_of, question_length, question_mask

# where a model's root keeps its prompts
LAYER = "soft_prompts"
_NEEDED = ("inputs_embeds", "attention_mask")


class PromptLayer(nn.Module, BaseTunerLayer):
    """The soft prompts of one model, by adapter; of the active ones the last named stands first."""

    adapter_layer_names = ("folklora_prompts",)
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.folklora_prompts = nn.ModuleDict()
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [], []
        self.labels: Tensor | None = None
        """Those of the call that runs; what is learnt is no question."""
        self.question: Question | None = None
        """What is asked in place of the call's own question, within `asking` and `generate`."""
        self.remembers = False
        self.put = 0
        """How many positions the last call of the part that embeds got."""
        self.kept: Tensor | None = None
        """Where the tokens are among them, [rows, positions]; None where they are the last."""

    def active(self) -> list[Prompt]:
        """The prompts that stand before a row, in that order; none while they are disabled."""
        names = [] if self.disable_adapters else reversed(self.active_adapters)
        return [self.folklora_prompts[name] for name in names if name in self.folklora_prompts]

    @property
    def soft_positions(self) -> int:
        """How many positions stand before each row."""
        return sum(prompt.length for prompt in self.active())

    @property
    def late(self) -> bool:
        """Whether the active prompts stand before their question's last token."""
        return any(prompt.place == "answer" for prompt in self.active())

    def add(self, adapter_name: str, prompt: Prompt, embedding: nn.Module, place: str) -> None:
        """Take a prompt for a model with these input embeddings."""
        others = {other.place for other in self.folklora_prompts.values()} - {place}
        if others:
            raise ValueError(f"all prompts on a model stand at one place: at {others.pop()!r}, not at {place!r}")
        prompt.place = place
        prompt.base_sample = nn.Parameter(evenly_spaced(embedding.weight.detach()), requires_grad=False)
        self.folklora_prompts[adapter_name] = prompt
        self._device = embedding.weight.device

    def vectors(self, rows: Tensor, query: Tensor | None) -> Tensor:
        """What stands before embedded rows [rows, positions, width], in their dtype: [rows, soft positions, width]."""
        parts = [prompt.vectors(query if prompt.reads_query else None).to(rows) for prompt in self.active()]
        return torch.cat([part.expand(len(rows), -1, -1) for part in parts], dim=1)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose which prompts stand before the text, in their order, and train them."""
        super().set_adapter(adapter_names, inference_mode)
        self._freeze_samples()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Train prompts, or leave them."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_samples()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own asks a layer that this one would stand around
        self.folklora_prompts[adapter_name].to(device or self._device)

    def _freeze_samples(self) -> None:
        for prompt in self.folklora_prompts.values():
            prompt.base_sample.requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "labels": None, "question": None, "kept": None}


class _Hook:
    """A hook of the tuner's; classes, so that models can be pickled and copied."""

    def __init__(self, layer: PromptLayer, part: nn.Module) -> None:
        self.layer = layer
        self.names = list(inspect.signature(part.forward).parameters)

    def named(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class _PutBefore(_Hook):
    """Before the part that embeds: the prompts' vectors into a text, their places into masks always."""

    def __call__(self, part: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given, layer = self.named(args, kwargs), self.layer
        layer.put, layer.kept = 0, None
        length = layer.soft_positions
        if length == 0:
            return (), given
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        _check_mask(mask)
        if cache is not None and cache.get_seq_length() > 0:
            for name in ("position_ids", "cache_position"):
                if given.get(name) is not None:
                    given[name] = given[name] + length
            if mask is not None:
                given["attention_mask"] = extended_mask(mask, length)
        else:
            self._begin(part, given, mask, length)
        return (), given

    def _begin(self, part: nn.Module, given: dict[str, Any], mask: Tensor | None, length: int) -> None:
        layer, rows = self.layer, given.get("inputs_embeds")
        question = layer_question(layer, part, given)
        at = None if mask is None else first_real(mask)
        if layer.late:
            at = _before_last(question.length, mask)
        if rows is None:
            rows = part.get_input_embeddings()(given.pop("input_ids"))
        query = None if question is None else question.query
        given["inputs_embeds"] = extended_rows(rows, layer.vectors(rows, query), at)
        if mask is not None:
            given["attention_mask"] = extended_mask(mask, length, at)
        if given.get("position_ids") is not None:
            given["position_ids"] = extended_positions(given["position_ids"], length, at)
        if given.get("cache_position") is not None:
            given["cache_position"] = extended_positions(given["cache_position"], length, None)
        layer.put = length
        layer.kept = tokens(at, length, rows.shape[1]) if layer.late else None


class _TakeOff(_Hook):
    """After a causal model's decoder: hidden states of the tokens alone."""

    def __call__(self, part: nn.Module, args: tuple, output: Any) -> Any:
        put, self.layer.put = self.layer.put, 0
        kept, self.layer.kept = self.layer.kept, None
        if put == 0:
            return output

        def cut(states: Tensor) -> Tensor:
            if kept is None:
                # what is cut off on the left may be padding, if a prompt stands behind it; nobody reads padding
                return states[:, put:]
            return states.gather(1, kept.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1]))

        if isinstance(output, tuple):
            return (cut(output[0]), *output[1:])
        output.last_hidden_state = cut(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(cut(states) for states in output.hidden_states)
        return output


class _Lengthen(_Hook):
    """Before the decoder of an encoder-decoder model: the encoder's output has the prompts' positions."""

    def __call__(self, part: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given, length = self.named(args, kwargs), self.layer.soft_positions
        mask = given.get("encoder_attention_mask")
        if length and mask is not None:
            _check_mask(mask)
            given["encoder_attention_mask"] = extended_mask(mask, length)
        return (), given


class PromptModel(BaseTuner):
    """Carries soft prompts, several at once, on one frozen model.

    Made by `peft.get_peft_model(model, config)` and `PeftModel.from_pretrained`; not called directly.
    """

    prefix = "folklora_prompts"
    tuner_layer_cls = PromptLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add a soft prompt.

        Raises:
            ValueError: The model takes no embeddings in place of tokens.
        """
        config = self.peft_config[adapter_name]
        part = embedding_part(model)
        if not hasattr(model, LAYER):
            setattr(model, LAYER, PromptLayer())
            _put_hooks(model, part, getattr(model, LAYER))
        self._create_and_replace(config, adapter_name, getattr(model, LAYER), LAYER, part, LAYER, **kwargs)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _create_and_replace(
        self,
        config: PromptConfig,
        adapter_name: str,
        target: PromptLayer,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        low_cpu_mem_usage: bool = False,
        **optional: Any,
    ) -> None:
        embedding = parent.get_input_embeddings()
        target.add(adapter_name, config.prompt(embedding), embedding, config.place)
        if low_cpu_mem_usage:
            target.folklora_prompts[adapter_name].to("meta")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; its labels say which tokens are no question."""
        layer = getattr(self.model, LAYER)
        # an encoder's input holds no answer
        layer.labels = None if self.model.config.is_encoder_decoder else kwargs.get("labels")
        try:
            return self.model(*args, **kwargs)
        finally:
            layer.labels = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own; without a cache, too, the answer so far is no part of the question."""
        layer = getattr(self.model, LAYER)
        before, layer.remembers = layer.remembers, True
        held = layer.question
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            layer.remembers, layer.question = before, held

    @contextmanager
    def asking(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
        """Within this block these are the questions [rows, positions], whatever else the rows hold."""
        layer, part = getattr(self.model, LAYER), embedding_part(self.model)
        held, layer.question = layer.question, None
        layer.question = layer_question(layer, part, {"input_ids": input_ids, "attention_mask": attention_mask})
        try:
            yield
        finally:
            layer.question = held

    def query(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the active prompts choose by for these questions, [rows, width]."""
        with self.asking(input_ids, attention_mask):
            return getattr(self.model, LAYER).question.query

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise ValueError("a soft prompt is an input and no part of the weights, so it cannot be merged into them")
        model = self.model
        for part in _parts(model):
            remove_hooks(part, (_Hook,))
        delattr(model, LAYER)
        del model.peft_config
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, found, tail = key.partition(f".{cls.prefix}.")
        return head + found + tail.removeprefix(f"{adapter_name}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PromptConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_saved(model, adapter_name, f".{LAYER}.{cls.prefix}.{adapter_name}.", renamed)
        return renamed


def prompts_of(model: nn.Module) -> dict[str, Prompt]:
    """The soft prompts on a model by the name of their adapter; empty where it carries none."""
    layers = (module for module in model.modules() if isinstance(module, PromptLayer))
    return {name: prompt for layer in layers for name, prompt in layer.folklora_prompts.items()}


def layer_question(layer: PromptLayer, part: nn.Module, given: dict[str, Any]) -> Question | None:
    """What is asked in a call of the part that embeds; None where the active prompts do not depend on it."""
    reads = any(prompt.reads_query for prompt in layer.active())
    if not reads and not layer.late:
        return None
    rows = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if layer.question is not None:
        return layer.question.of(len(rows))
    asked = rows, given.get("attention_mask"), layer.labels
    query = mean_of(frozen_pass(part, given), question_mask(*asked)) if reads else None
    question = Question(question_length(*asked), query)
    if layer.remembers:
        layer.question = question
    return question


def embedding_part(model: nn.Module) -> PreTrainedModel:
    """The part of a model that embeds its tokens and reads them.

    Raises:
        ValueError: It is no model of transformers, or takes no embeddings in place of tokens, or keeps a cache that
            cannot be asked how long it is.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"soft prompts need a language model of transformers, not {type(model).__name__}")
    part = model.get_encoder() if model.config.is_encoder_decoder else model.get_decoder()
    needed = _NEEDED if model.config.is_encoder_decoder else (*_NEEDED, "past_key_values")
    missing = [name for name in needed if name not in inspect.signature(part.forward).parameters]
    if missing:
        raise ValueError(
            f"{type(model).__name__} cannot take soft prompts: {type(part).__name__} knows no {', '.join(missing)}"
        )
    return part


def _parts(model: PreTrainedModel) -> list[nn.Module]:
    if model.config.is_encoder_decoder:
        return [model.get_encoder(), model.get_decoder()]
    return [embedding_part(model)]


def _put_hooks(model: PreTrainedModel, part: nn.Module, layer: PromptLayer) -> None:
    part.register_forward_pre_hook(_PutBefore(layer, part), with_kwargs=True)
    if model.config.is_encoder_decoder:
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(_Lengthen(layer, decoder), with_kwargs=True)
    else:
        part.register_forward_hook(_TakeOff(layer, part))


def _before_last(length: Tensor, mask: Tensor | None) -> Tensor:
    """Position of the last token of each row's question, [rows]; of its first token where there is no question."""
    last = (length - 1).clamp(min=0)
    if mask is None:
        return last
    real = mask.ne(0).int()
    if (real.diff(dim=1) == 1).sum(dim=1).add(real[:, 0]).gt(1).any():
        raise ValueError('place="answer" needs rows whose real tokens stand together: the attention mask has a hole')
    return first_real(mask) + last


def _check_mask(mask: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(
            "soft prompts need an attention mask [rows, positions]; generation with a static or compiled cache makes "
            "another one: leave cache_implementation out"
        )


def _check_saved(model: nn.Module, adapter_name: str, place: str, values: dict[str, Tensor]) -> None:
    """Refuse saved values that are incomplete, of other shapes, not finite, or made for another base model."""
    own = {f".{key}".partition(place)[2]: value for key, value in model.state_dict().items() if place in f".{key}"}
    saved = {f".{key}".partition(place)[2]: value for key, value in values.items() if place in f".{key}"}
    problems = [f"  no value for {key}" for key in own if key not in saved]
    problems += [f"  {key} is not known here" for key in saved if key not in own]
    for key in own.keys() & saved.keys():
        if saved[key].shape != own[key].shape:
            problems.append(f"  {key} has shape {list(saved[key].shape)}, not {list(own[key].shape)}")
        elif not torch.isfinite(saved[key]).all():
            problems.append(f"  {key} holds values that are not finite")
    if not problems and not own["base_sample"].is_meta and not same_sample(own["base_sample"], saved["base_sample"]):
        problems.append("  it was made for another base model's weights")
    if problems:
        raise ValueError("\n".join([f"the saved soft prompt does not fit this model ({adapter_name}):", *problems]))


def register() -> None:
    """Tell PEFT about the type FOLKLORA_PROMPT; called once, when the package is imported."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PROMPT_TYPE] = PromptConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PROMPT_TYPE] = PromptModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PROMPT_TYPE] = PromptModel.prefix
