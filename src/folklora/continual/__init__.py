"""What keeps the old tasks alive while a stream of tasks goes by; one file a method."""

from folklora.continual.adapt_infty import AdaptInfty
from folklora.continual.am_lora import AMLoRAStream
from folklora.continual.base import AdapterPerTask, ContinualMethod, Phase
from folklora.continual.codyra import CoDyRAStream
from folklora.continual.ewc import EWC
from folklora.continual.exssnet import ExSSNeTStream
from folklora.continual.inc_lora import IncLoRA
from folklora.continual.l2p import L2P
from folklora.continual.lt_sft import LTSFTStream
from folklora.continual.lwf import LwF
from folklora.continual.multi_task import MultiTask
from folklora.continual.o_lora import OLoRA
from folklora.continual.osft import OSFTStream
from folklora.continual.per_task import PerTask
from folklora.continual.progprompt import ProgPrompt
from folklora.continual.replay import Replay
from folklora.continual.seq_lora import SeqLoRA
from folklora.continual.slm import SLM

__all__ = [
    "EWC",
    "L2P",
    "SLM",
    "AMLoRAStream",
    "AdaptInfty",
    "AdapterPerTask",
    "CoDyRAStream",
    "ContinualMethod",
    "ExSSNeTStream",
    "IncLoRA",
    "LTSFTStream",
    "LwF",
    "MultiTask",
    "OLoRA",
    "OSFTStream",
    "PerTask",
    "Phase",
    "ProgPrompt",
    "Replay",
    "SeqLoRA",
]
