"""Adapters: one file a method, all carried by the host in `folklora.adapters.host`."""

from folklora.adapters.adapterfusion import AdapterFusion
from folklora.adapters.am_lora import AMLoRA
from folklora.adapters.atlas import ATLAS
from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.codyra import CoDyRA
from folklora.adapters.corda import CorDA
from folklora.adapters.diffora import DiffoRA
from folklora.adapters.exssnet import ExSSNeT
from folklora.adapters.factorllm import FactorLLM
from folklora.adapters.generative_adapter import GenerativeAdapter
from folklora.adapters.kasa import KaSA
from folklora.adapters.kind import KIND
from folklora.adapters.lora import LoRA
from folklora.adapters.lora_sb import LoRASB
from folklora.adapters.lora_xs import LoRAXS
from folklora.adapters.lt_sft import LTSFT
from folklora.adapters.mixda import MixDA
from folklora.adapters.osft import OSFT
from folklora.adapters.pissa import PiSSA
from folklora.adapters.randlora import RandLoRA
from folklora.adapters.rocket import Rocket
from folklora.adapters.salt import SALT
from folklora.adapters.scalearn import ScaLearn
from folklora.adapters.smora import SMoRA
from folklora.adapters.soma import SoMA
from folklora.adapters.sorsa import SORSA
from folklora.adapters.svfit import SVFit
from folklora.adapters.vida import ViDA
from folklora.adapters.vl_adapter import VLAdapter

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
    "FactorLLM",
    "GenerativeAdapter",
    "KaSA",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "MixDA",
    "PiSSA",
    "RandLoRA",
    "Rocket",
    "SMoRA",
    "SVFit",
    "ScaLearn",
    "SoMA",
    "Update",
    "VLAdapter",
    "ViDA",
]
