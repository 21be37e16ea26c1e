"""Soft prompts: trained vectors before the embedded text. The model's weights and layers stay as they are."""

from folklora.prompts.base import Prompt, PromptConfig
from folklora.prompts.host import prompts_of
from folklora.prompts.pool import PromptPool
from folklora.prompts.soft import SoftPrompt, fold

__all__ = ["Prompt", "PromptConfig", "PromptPool", "SoftPrompt", "fold", "prompts_of"]
