"""Folklora: teach a pretrained model new knowledge, task after task, without losing what it knew."""

__version__ = "0.1.0"
