"""Losses of predictions alone, for adapters that are fitted to data without labels (test-time adaptation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NO_LABEL = -1
"""The label of an item that is not trusted."""


def prediction_entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the predictions, -Σ_c p_c log p_c with p = softmax(z); AdaMerging's loss.

    Args:
        logits: z [..., classes].
        mask: [...], true where a prediction counts; None takes all.
    """
    logs = logits.float().log_softmax(-1)
    entropies = -(logs.exp() * logs).sum(-1)
    return entropies.mean() if mask is None else entropies[mask.bool()].mean()


def trusted_labels(logits: Tensor, share: float = 0.1, largest: int = 100) -> Tensor:
    """Labels of the most confident items of each class, of a model's predictions before it is adapted.

    Of the items that are predicted as a class, the k with the highest probability, k = min(share N / C, largest), at
    least 1; all of them, if there are fewer.

    Args:
        logits: [N, C] of the whole data.
        share: Of the data that is trusted, if the classes are equally frequent.
        largest: Most items of a class.

    Returns:
        [N]: the predicted class where an item is trusted, `NO_LABEL` elsewhere.
    """
    if logits.dim() != 2 or not 0 < share <= 1 or largest < 1:
        raise ValueError(
            f"logits [N, classes], a share above 0 and at most 1 and at least 1 item are needed, not "
            f"{list(logits.shape)}, {share} and {largest}"
        )
    confidence, predicted = logits.float().softmax(-1).max(-1)
    count = max(1, min(int(share * len(logits) / logits.shape[1]), largest))
    labels = torch.full_like(predicted, NO_LABEL)
    for label in predicted.unique().tolist():
        own = (predicted == label).nonzero().squeeze(1)
        labels[own[confidence[own].topk(min(count, len(own))).indices]] = label
    return labels


def pseudo_label_loss(
    weak: Tensor, strong: Tensor, labels: Tensor | None = None, threshold: float = 0.99
) -> tuple[Tensor, Tensor]:
    """FixMatch-like loss: predictions of strongly augmented items shall be those of the weakly augmented ones.

    q = softmax(z_weak), not differentiated, or the label where an item is trusted; w = 1 where max q > threshold;
    L = Σ w H(q, softmax(z_strong)) / Σ w, and 0 where no w is 1. As in the paper: the authors' script trusts all items.

    Args:
        weak: Logits [N, C] of weakly augmented items.
        strong: Logits [N, C] of the same items, strongly augmented.
        labels: [N] of `trusted_labels`; None trusts no item. The authors have a quarter of a batch trusted.
        threshold: Below it a prediction does not count.

    Returns:
        The loss, and the share of items that count.
    """
    targets = weak.detach().float().softmax(-1)
    if labels is not None:
        own = F.one_hot(labels.clamp(min=0), weak.shape[-1]).to(targets)
        targets = torch.where((labels != NO_LABEL).unsqueeze(-1), own, targets)
    counts = (targets.amax(-1) > threshold).to(targets)
    losses = -(targets * strong.float().log_softmax(-1)).sum(-1)
    return (counts * losses).sum() / counts.sum().clamp(min=1), counts.mean()
