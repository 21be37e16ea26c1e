"""Images in an encoder-decoder: what the visual embedding computes, and a VL-Adapter trained and saved with it."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from folklora import VisionLanguageModel, VLAdapter, tiny
from folklora.adapters.vision import VisualEmbedding, answer_loss, epoch_order, pool_grid

D, FEATURES, REGIONS = 32, 10, 4
EPS32 = torch.finfo(torch.float32).eps


def model(language: nn.Module | None = None) -> VisionLanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return VisionLanguageModel(tiny.bart() if language is None else language, features=FEATURES).eval()


def batch(images: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(3, images, REGIONS, 2, generator=generator)
    return {
        "input_ids": torch.randint(3, 61, (3, 5), generator=generator),
        "labels": torch.randint(3, 61, (3, 4), generator=generator),
        "features": torch.randn(3, images, REGIONS, FEATURES, generator=generator),
        "boxes": torch.cat([corners, corners + 0.3], dim=-1),
    }


@torch.no_grad()
def logits(net: nn.Module, **changes: Any) -> Tensor:
    return net(**batch() | changes).logits


def close(actual: Tensor, expected: Tensor) -> None:
    # two blocks of sums of at most 48 terms in float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * EPS32 * float(expected.abs().max()))


@torch.no_grad()
def test_the_visual_embedding_is_the_sum_of_its_four_parts():
    torch.manual_seed(0)
    visual, inputs, order = VisualEmbedding(D, FEATURES), batch(2), torch.randn(REGIONS, D)
    v = visual(inputs["features"], inputs["boxes"], order)
    assert v.shape == (3, 2 * REGIONS, D)
    for image in range(2):
        for region in range(REGIONS):
            f, (x1, y1, x2, y2) = inputs["features"][1, image, region], inputs["boxes"][1, image, region]
            place = torch.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)])
            expected = F.layer_norm(visual.project(f), (D,)) + F.layer_norm(visual.place(place), (D,))
            expected = expected + visual.image.weight[image] + order[region]
            torch.testing.assert_close(v[1, image * REGIONS + region], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 images an example are more than the 2 set"):
        visual(torch.zeros(1, 3, REGIONS, FEATURES), torch.zeros(1, 3, REGIONS, 4), order)


@torch.no_grad()
def test_the_encoder_reads_the_text_as_before_and_the_images_as_they_are():
    net, inputs, seen = model(), batch(), {}
    block = net.get_encoder().layers[0]
    handle = block.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    logits(net)
    read = seen["h"]
    net.language(input_ids=inputs["input_ids"], labels=inputs["labels"])
    handle.remove()
    close(read[:, :5], seen["h"])
    words = net.language.get_input_embeddings().weight
    order = words[60 - torch.arange(REGIONS)]
    close(read[:, 5:], net.visual(inputs["features"], inputs["boxes"], order))
    assert not net.get_encoder().layernorm_embedding._forward_hooks


def test_without_boxes_they_are_zeros_and_without_images_it_is_the_language_model():
    net, inputs = model(), batch()
    assert torch.equal(logits(net, boxes=None), logits(net, boxes=torch.zeros_like(inputs["boxes"])))
    flat = {"features": inputs["features"][:, 0], "boxes": inputs["boxes"][:, 0]}
    assert torch.equal(logits(net, **flat), logits(net))
    text = {name: inputs[name] for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert torch.equal(net(**text).logits, net.language(**text).logits)


def test_more_than_the_encoder_takes_is_refused():
    with pytest.raises(ValueError, match="5 tokens of text and 60 of images are more than the 64"):
        logits(model(), features=torch.zeros(3, 60, FEATURES), boxes=None)


def test_padding_of_the_text_does_not_count():
    net, inputs = model(), batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, 3:] = 0
    changed = torch.where(mask.bool(), inputs["input_ids"], 7)
    close(logits(net, input_ids=changed, attention_mask=mask), logits(net, attention_mask=mask))
    assert not torch.allclose(logits(net), logits(net, attention_mask=mask))


def test_images_change_places_only_through_their_image_embedding():
    net, inputs = model(), batch(2)
    swapped = inputs | {name: inputs[name].flip(1) for name in ("features", "boxes")}
    with torch.no_grad():
        assert not torch.allclose(net(**inputs).logits, net(**swapped).logits, rtol=1e-3)
        net.visual.image.weight.zero_()
        close(net(**inputs).logits, net(**swapped).logits)


def test_a_resized_vocabulary_does_not_shift_the_order():
    net = model()
    expected = logits(net)
    net.language.resize_token_embeddings(70, mean_resizing=False)
    close(logits(net)[..., :61], expected)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_trained_with_its_visual_embedding_saved_and_loaded(kind: str, tiny_t5: Any, tmp_path: Path):
    def base() -> VisionLanguageModel:
        return model(tiny_t5() if kind == "t5" else None)

    torch.manual_seed(1)
    net = get_peft_model(base(), VLAdapter(tasks=["vqa"], train_layer_norms=True))
    assert "visual" in net.peft_config["default"].modules_to_save
    before = {name: value.clone() for name, value in base().state_dict().items()}
    assert torch.equal(logits(net), logits(base()))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        net.train()(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(net.eval())
    assert not torch.allclose(trained, logits(base()))
    for name, value in net.base_model.model.state_dict().items():
        own = name.replace(".base_layer", "").replace(".original_module", "")
        if own in before and ".modules_to_save." not in name:
            assert torch.equal(value, before[own]), name
    with net.disable_adapter():
        assert torch.equal(logits(net), logits(base()))
    assert torch.equal(logits(copy.deepcopy(net)), trained)
    net.save_pretrained(tmp_path)
    fresh = base()
    torch.manual_seed(9)
    fresh.visual = VisualEmbedding(fresh.visual.image.embedding_dim, FEATURES)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path)), trained)


def test_the_paper_setting_trains_4_18_percent_of_bart_base():
    sizes = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 6), ("ffn_dim", 3072))}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    with torch.device("meta"):
        language = BartForConditionalGeneration(BartConfig(vocab_size=50265, d_model=768, **sizes, **heads))
        base = VisionLanguageModel(language)
        before = sum(parameter.numel() for parameter in base.parameters())
        net = get_peft_model(base, VLAdapter(tasks=["vqa", "gqa", "nlvr", "caption"], train_layer_norms=True))
    assert net.get_nb_trainable_parameters()[0] == 6_081_600
    # of BART-base and what is new in it; the layer norms' copies are none of that
    assert before + 4_449_600 == 145_452_864
    assert round(100 * 6_081_600 / 145_452_864, 2) == 4.18


@pytest.mark.parametrize("beams", [1, 3])
def test_it_generates_from_images(beams: int, tiny_t5: Any):
    for language in (None, tiny_t5()):
        net = get_peft_model(model(language), VLAdapter()).eval()
        inputs = {name: value for name, value in batch().items() if name != "labels"}
        call = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        out = net.generate(**inputs, **call)
        assert torch.equal(out, net.generate(**inputs, **call, use_cache=False))
        if beams == 1:
            with torch.no_grad():
                again = net(**inputs, decoder_input_ids=out[:, :-1]).logits.argmax(-1)
            ended = net.config.eos_token_id
            real = (out[:, 1:] == ended).cumsum(1) - (out[:, 1:] == ended).long() == 0
            assert torch.equal(again[real], out[:, 1:][real])


def test_grid_features_are_pooled_to_the_largest_of_each_part():
    grid = torch.randn(2, 7, 7, 3)
    pooled = pool_grid(grid)
    assert pooled.shape == (2, 36, 3)
    assert torch.equal(pooled[0, 0], grid[0, :2, :2].amax((0, 1)))
    assert torch.equal(pooled[1, 35], grid[1, 5:, 5:].amax((0, 1)))


def test_the_answer_loss_is_a_mean_of_means_weighted_by_scores():
    torch.manual_seed(0)
    scores, labels = torch.tensor([0.3, 1.0]), torch.tensor([[4, 5, 6], [7, -100, -100]])
    predicted = torch.randn(2, 3, 11)
    each = [
        torch.stack([-predicted[i, j].log_softmax(-1)[t] for j, t in enumerate(row) if t >= 0]).mean()
        for i, row in enumerate(labels.tolist())
    ]
    torch.testing.assert_close(answer_loss(predicted, labels), (each[0] + each[1]) / 2)
    torch.testing.assert_close(answer_loss(predicted, labels, scores), (0.3 * each[0] + each[1]) / 2)
    assert torch.equal(answer_loss(predicted, labels, torch.ones(2)), answer_loss(predicted, labels))


def test_an_epoch_has_every_batch_of_every_task_once():
    batches = {"vqa": 5, "gqa": 3, "caption": 1}
    order = epoch_order(batches, 0)
    assert Counter(order) == batches
    assert order == epoch_order(batches, 0)
    assert any(epoch_order(batches, epoch) != order for epoch in (1, 2))
