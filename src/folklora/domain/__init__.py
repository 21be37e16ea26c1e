"""Adapting to another domain: streams of corrupted images, and classifiers that follow them without labels."""

from folklora.domain.baselines import TENT, CoTTA, SourceOnly
from folklora.domain.corruptions import CORRUPTIONS, corrupt
from folklora.domain.homeostatic import HomeostaticAdaptation

__all__ = ["CORRUPTIONS", "TENT", "CoTTA", "HomeostaticAdaptation", "SourceOnly", "corrupt"]
