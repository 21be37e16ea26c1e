"""An encoder-decoder that reads images: features projected and put behind the text; batches of several tasks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisualEmbedding(nn.Module):
    """Image features as tokens: v = LN(V₁ f) + LN(V₂ [box, area]) + image[i] + order[j].

    f [features] of region j of image i, box (x₁, y₁, x₂, y₂) in parts of the image; V₁, V₂, both norms and the image
    embeddings are trained. The order embeddings are the language model's frozen word embeddings and no part of this.

    Args:
        width: d of the language model.
        features: Width of f.
        images: How many images an example may have.
    """

    def __init__(self, width: int, features: int = 2048, images: int = 2) -> None:
        super().__init__()
        self.project, self.project_norm = nn.Linear(features, width), nn.LayerNorm(width)
        self.place, self.place_norm = nn.Linear(5, width), nn.LayerNorm(width)
        self.image = nn.Embedding(images, width)

    def forward(self, features: Tensor, boxes: Tensor, order: Tensor) -> Tensor:
        """Tokens of all images, one after the other.

        Args:
            features: [batch, images, regions, features].
            boxes: [batch, images, regions, 4].
            order: [regions, d], added to the regions of each image.

        Returns:
            [batch, images · regions, d].
        """
        if features.shape[1] > self.image.num_embeddings:
            raise ValueError(f"{features.shape[1]} images an example are more than the {self.image.num_embeddings} set")
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        places = torch.cat([boxes, area.unsqueeze(-1)], dim=-1)
        v = self.project_norm(self.project(features)) + self.place_norm(self.place(places))
        v = v + self.image.weight[: features.shape[1], None].to(v.dtype) + order.to(v.dtype)
        return v.flatten(1, 2)


class VisionLanguageModel(nn.Module):
    """An encoder-decoder language model whose encoder reads [text ; images].

    An encoder with a norm and positions of its own for its word embeddings (BART's) applies them to the text alone;
    T5's relative positions count over all tokens. A region's order embedding is the word embedding that many places
    before the end of the vocabulary, as it was when this was made.

    Args:
        language: The model, such as BART or T5 for conditional generation.
        features: Width of the image features.
        images: How many images an example may have.
    """

    def __init__(self, language: nn.Module, features: int = 2048, images: int = 2) -> None:
        super().__init__()
        self.language = language
        embedding = language.get_input_embeddings()
        self.last_word = embedding.num_embeddings - 1
        self.visual = VisualEmbedding(embedding.embedding_dim, features, images).to(embedding.weight)

    @property
    def config(self) -> Any:
        """The language model's configuration."""
        return self.language.config

    def get_encoder(self) -> nn.Module:
        """The language model's encoder."""
        return self.language.get_encoder()

    def get_decoder(self) -> nn.Module:
        """The language model's decoder."""
        return self.language.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's word embeddings."""
        return self.language.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor | None = None,
        boxes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The language model's output on a batch of text and images.

        Args:
            input_ids: The text [batch, tokens].
            features: [batch, regions, features], or [batch, images, regions, features]; None reads text alone.
            boxes: The regions' boxes, features' shape with 4 last; None takes zeros, for regions of a grid.
            attention_mask: [batch, tokens] of the text.
            **options: For the language model (labels, decoder_input_ids, ...).
        """
        if features is None:
            return self.language(input_ids=input_ids, attention_mask=attention_mask, **options)
        text, v, mask = self._parts(input_ids, features, boxes, attention_mask)
        with self._text_alone(v):
            return self.language(inputs_embeds=torch.cat([text, v], dim=1), attention_mask=mask, **options)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        features: Tensor | None = None,
        boxes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Generate the output text; arguments as in `forward`, options as in the language model's `generate`."""
        if features is None:
            return self.language.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        text, v, mask = self._parts(input_ids, features, boxes, attention_mask)
        with self._text_alone(v):
            read = self.get_encoder()(inputs_embeds=torch.cat([text, v], dim=1), attention_mask=mask, return_dict=True)
        return self.language.generate(encoder_outputs=read, attention_mask=mask, **options)

    def _parts(
        self, input_ids: Tensor, features: Tensor, boxes: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        embedding = self.get_input_embeddings()
        text = embedding(input_ids)
        if features.dim() == 3:
            features, boxes = features.unsqueeze(1), None if boxes is None else boxes.unsqueeze(1)
        boxes = features.new_zeros(*features.shape[:-1], 4) if boxes is None else boxes
        regions = features.shape[-2]
        order = embedding.weight[self.last_word + 1 - regions : self.last_word + 1].flip(0).detach()
        v = self.visual(features, boxes, order).to(text.dtype)
        limit = getattr(self.get_encoder(), "max_source_positions", None)
        if limit is not None and text.shape[1] + v.shape[1] > limit:
            raise ValueError(
                f"{text.shape[1]} tokens of text and {v.shape[1]} of images are more than the {limit} that the encoder "
                "takes; shorten the text or pool the regions"
            )
        mask = torch.ones_like(input_ids) if mask is None else mask
        return text, v, torch.cat([mask, mask.new_ones(v.shape[:2])], dim=1)

    @contextmanager
    def _text_alone(self, v: Tensor) -> Iterator[None]:
        norm = getattr(self.get_encoder(), "layernorm_embedding", None)
        if norm is None:
            yield
            return
        # what the encoder made of the images' places is put back as it was given
        handle = norm.register_forward_hook(lambda _, args, out: torch.cat([out[:, : -v.shape[1]], v], dim=1))
        try:
            yield
        finally:
            handle.remove()


def pool_grid(grid: Tensor, side: int = 6) -> Tensor:
    """Grid features [batch, rows, columns, features] as side² regions [batch, side², features], the largest of each."""
    return F.adaptive_max_pool2d(grid.movedim(-1, 1), side).flatten(2).mT


def answer_loss(logits: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
    """Cross-entropy, mean over the tokens of each example, times its score, then mean over examples.

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens], -100 where no loss is taken.
        scores: [batch], such as a soft score of the answer in visual question answering; None counts all the same.
    """
    each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
    each = each.sum(1) / (labels != -100).sum(1).clamp_min(1)
    return (each if scores is None else each * scores).mean()


def epoch_order(batches: Mapping[str, int], epoch: int) -> list[str]:
    """The tasks of an epoch's batches in order: each as often as it has batches, shuffled by the epoch's number.

    Args:
        batches: How many batches each task has.
        epoch: The epoch.
    """
    order = [task for task, count in batches.items() for _ in range(count)]
    random.Random(epoch).shuffle(order)
    return order
