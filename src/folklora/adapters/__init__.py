"""Adapters: one file a method, all carried by the host in `folklora.adapters.host`."""

from folklora.adapters.am_lora import AMLoRA
from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.corda import CorDA
from folklora.adapters.kasa import KaSA
from folklora.adapters.lora import LoRA
from folklora.adapters.lora_sb import LoRASB
from folklora.adapters.lora_xs import LoRAXS
from folklora.adapters.pissa import PiSSA
from folklora.adapters.salt import SALT
from folklora.adapters.soma import SoMA
from folklora.adapters.sorsa import SORSA
from folklora.adapters.svfit import SVFit

__all__ = [
    "SALT",
    "SORSA",
    "AMLoRA",
    "AdapterConfig",
    "CorDA",
    "KaSA",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "PiSSA",
    "SVFit",
    "SoMA",
    "Update",
]
