"""Tiny image classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., ViTForImageClassification]:
    """`tiny_vit(seed=0, **config)`: a new float32 ViT for images [N, 3, 16, 16] of four classes, evaluating."""

    def make(seed: int = 0, **config: Any) -> ViTForImageClassification:
        sizes = {
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "num_labels": 4,
            # large enough that logits differ, so that there is something to be uncertain about
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ViTForImageClassification(ViTConfig(**sizes | config)).float().eval()

    return make
