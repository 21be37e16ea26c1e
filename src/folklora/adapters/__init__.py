"""Adapters: one file a method, all carried by the host in `folklora.adapters.host`."""

from folklora.adapters.am_lora import AMLoRA
from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.generative_adapter import GenerativeAdapter
from folklora.adapters.kasa import KaSA
from folklora.adapters.lora import LoRA
from folklora.adapters.pissa import PiSSA
from folklora.adapters.vl_adapter import VLAdapter

__all__ = ["AMLoRA", "AdapterConfig", "GenerativeAdapter", "KaSA", "LoRA", "PiSSA", "Update", "VLAdapter"]
