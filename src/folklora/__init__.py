"""Folklora: teach a pretrained model new knowledge, task after task, without losing what it knew."""

import importlib
from typing import Any

from folklora.adapters import (
    ATLAS,
    KIND,
    LTSFT,
    OSFT,
    SALT,
    SORSA,
    AdapterConfig,
    AdapterFusion,
    AMLoRA,
    CoDyRA,
    CorDA,
    DiffoRA,
    ExSSNeT,
    FactorLLM,
    GenerativeAdapter,
    KaSA,
    LoRA,
    LoRASB,
    LoRAXS,
    MixDA,
    PiSSA,
    RandLoRA,
    Rocket,
    ScaLearn,
    SMoRA,
    SoMA,
    SVFit,
    Update,
    ViDA,
    VLAdapter,
)
from folklora.adapters.am_lora import add_task
from folklora.adapters.calibrate import calibrate
from folklora.adapters.contexts import Written, applied, write
from folklora.adapters.host import steps as _steps
from folklora.adapters.host import tuner as _tuner
from folklora.adapters.host.call import classes
from folklora.adapters.host.export import export_lora
from folklora.adapters.host.steps import activation_penalty, penalty
from folklora.adapters.rocket import expert_use
from folklora.adapters.schedules import anneal_weight_decay, cosine_weight_decay, early_blocks
from folklora.adapters.statistics import Statistics
from folklora.adapters.vision import VisionLanguageModel
from folklora.adapters.vl_adapter import use_task
from folklora.domain import HomeostaticAdaptation
from folklora.factored import Factors, concatenate, factored_linear
from folklora.methods import methods
from folklora.prompts import host as _prompts

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # the stream brings TRL, datasets and matplotlib with it; adapters alone do not need them
    if name in ("learn", "Run", "Task", "Example", "load_task", "TrainSettings"):
        module = {"learn": "learn", "Run": "run", "TrainSettings": "train"}.get(name, "tasks")
        return getattr(importlib.import_module(f"folklora.stream.{module}"), name)
    if name == "merge_models":
        return importlib.import_module("folklora.merge.engine").merge_models
    if name in ("check_method", "ConformanceError"):
        return getattr(importlib.import_module("folklora.check"), name)
    raise AttributeError(f"module 'folklora' has no attribute '{name}'")


_tuner.register()
_steps.register()
_prompts.register()

__all__ = [
    "ATLAS",
    "KIND",
    "LTSFT",
    "OSFT",
    "SALT",
    "SORSA",
    "AMLoRA",
    "AdapterConfig",
    "AdapterFusion",
    "CoDyRA",
    "CorDA",
    "DiffoRA",
    "ExSSNeT",
    "Example",
    "FactorLLM",
    "Factors",
    "GenerativeAdapter",
    "HomeostaticAdaptation",
    "KaSA",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "MixDA",
    "PiSSA",
    "RandLoRA",
    "Rocket",
    "Run",
    "SMoRA",
    "SVFit",
    "ScaLearn",
    "SoMA",
    "Statistics",
    "Task",
    "TrainSettings",
    "Update",
    "VLAdapter",
    "ViDA",
    "VisionLanguageModel",
    "Written",
    "activation_penalty",
    "add_task",
    "anneal_weight_decay",
    "applied",
    "calibrate",
    "check_method",
    "classes",
    "concatenate",
    "cosine_weight_decay",
    "early_blocks",
    "expert_use",
    "export_lora",
    "factored_linear",
    "learn",
    "load_task",
    "merge_models",
    "methods",
    "penalty",
    "use_task",
    "write",
]
