"""Folklora: teach a pretrained model new knowledge, task after task, without losing what it knew."""

from folklora.adapters import AdapterConfig, AMLoRA, KaSA, LoRA, PiSSA, Update
from folklora.adapters.am_lora import add_task
from folklora.adapters.host import steps as _steps
from folklora.adapters.host import tuner as _tuner
from folklora.adapters.host.export import export_lora
from folklora.adapters.host.steps import activation_penalty, penalty
from folklora.factored import Factors, concatenate, factored_linear
from folklora.methods import methods

__version__ = "0.1.0"

_tuner.register()
_steps.register()

__all__ = [
    "AMLoRA",
    "AdapterConfig",
    "Factors",
    "KaSA",
    "LoRA",
    "PiSSA",
    "Update",
    "activation_penalty",
    "add_task",
    "concatenate",
    "export_lora",
    "factored_linear",
    "methods",
    "penalty",
]
