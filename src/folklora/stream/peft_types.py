"""PEFT's own adapter types in a stream: found by name, and refused where the stream cannot train them as they are."""

from __future__ import annotations

import dataclasses
import difflib

from peft import PeftConfig
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from folklora.adapters.base import PEFT_TYPE, AdapterConfig
from folklora.prompts.base import PROMPT_TYPE, PromptConfig

PREFIX = "peft:"
_REFUSED = {
    "adalora": "its ranks are shared out by calls between the steps, which the stream does not make",
    "adaption_prompt": "it changes the attention rather than layers",
    "poly": "it must be given task numbers with every batch",
    "shadow": "it changes what the model returns",
    "xlora": "it mixes adapters that were trained before",
}
_OWN_TYPES, _OWN = (PEFT_TYPE, PROMPT_TYPE), (AdapterConfig, PromptConfig)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def peft_config_class(name: str) -> type[PeftConfig]:
    """The configuration class of one of PEFT's types, such as `peft:loha`.

    Raises:
        ValueError: There is none, or the stream cannot train it; the message gives the nearest names.
    """
    classes = {_type_name(kind): found for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind not in _OWN_TYPES}
    wanted = name.removeprefix(PREFIX).lower()
    trained = [kind for kind, found in classes.items() if _reason(kind, found) is None]
    if wanted not in classes:
        near = difflib.get_close_matches(wanted, trained, n=3, cutoff=0.5)
        hint = f"; the nearest are {', '.join(PREFIX + one for one in near)}" if near else ""
        raise ValueError(f"PEFT has no type '{wanted}'{hint}. Types to train: {', '.join(sorted(trained))}")
    _refuse_type(wanted, classes[wanted])
    return classes[wanted]


def adapter_name(config: PeftConfig) -> str:
    """What an adapter is called in settings: its method, or `peft:` and PEFT's name of the type."""
    return config.method if isinstance(config, _OWN) else PREFIX + _type_name(config.peft_type)


def check_trainable(config: PeftConfig) -> None:
    """Refuse a configuration of PEFT's that the stream cannot train, or that would write to the base model.

    Raises:
        ValueError: With the option and what would be valid.
    """
    if isinstance(config, _OWN):
        return
    _refuse_type(_type_name(config.peft_type), type(config))
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} makes PEFT rewrite the base model's weights, or asks for a pass over data "
            f"that the stream does not make; valid are {', '.join(map(repr, _PLAIN_STARTS))}, and the adapters pissa, "
            "corda and lora-sb start from the base or from data and leave it as it is"
        )
    if getattr(config, "bias", "none") not in ("none", False):
        raise ValueError(f"bias={config.bias!r} trains the base model's own biases in place; valid is 'none'")
    if getattr(config, "layer_replication", None):
        raise ValueError("layer_replication changes the base model's layers; leave it out")


def same_again(config: PeftConfig) -> None:
    """Make the configuration once more from its values, as a resumed run does.

    Raises:
        ValueError: PEFT would not read it again.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    try:
        type(config)(**{key: value for key, value in values.items() if key != "peft_type"})
    except ValueError as error:
        raise ValueError(
            f"{adapter_name(config)} would be saved in a form that PEFT refuses to load: {error}"
        ) from error


def _refuse_type(name: str, config_type: type[PeftConfig]) -> None:
    reason = _reason(name, config_type)
    if reason is not None:
        raise ValueError(f"a stream cannot train {PREFIX}{name}: {reason}")


def _reason(name: str, config_type: type[PeftConfig]) -> str | None:
    if issubclass(config_type, PromptLearningConfig):
        return "it learns a prompt, which several tasks cannot stack or switch like adapters of layers"
    return _REFUSED.get(name)


def _type_name(kind: object) -> str:
    return str(getattr(kind, "value", kind)).lower()
