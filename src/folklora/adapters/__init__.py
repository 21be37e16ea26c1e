"""Adapters: one file a method, all carried by the host in `folklora.adapters.host`."""

from folklora.adapters.am_lora import AMLoRA
from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.codyra import CoDyRA
from folklora.adapters.diffora import DiffoRA
from folklora.adapters.kasa import KaSA
from folklora.adapters.lora import LoRA
from folklora.adapters.pissa import PiSSA
from folklora.adapters.randlora import RandLoRA

__all__ = ["AMLoRA", "AdapterConfig", "CoDyRA", "DiffoRA", "KaSA", "LoRA", "PiSSA", "RandLoRA", "Update"]
