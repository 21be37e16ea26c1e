"""What keeps the old tasks alive while a stream of tasks goes by; one file a method."""

from folklora.continual.am_lora import AMLoRAStream
from folklora.continual.base import AdapterPerTask, ContinualMethod
from folklora.continual.ewc import EWC
from folklora.continual.inc_lora import IncLoRA
from folklora.continual.l2p import L2P
from folklora.continual.lwf import LwF
from folklora.continual.multi_task import MultiTask
from folklora.continual.o_lora import OLoRA
from folklora.continual.osft import OSFTStream
from folklora.continual.per_task import PerTask
from folklora.continual.progprompt import ProgPrompt
from folklora.continual.replay import Replay
from folklora.continual.seq_lora import SeqLoRA

__all__ = [
    "EWC",
    "L2P",
    "AMLoRAStream",
    "AdapterPerTask",
    "ContinualMethod",
    "IncLoRA",
    "LwF",
    "MultiTask",
    "OLoRA",
    "OSFTStream",
    "PerTask",
    "ProgPrompt",
    "Replay",
    "SeqLoRA",
]
