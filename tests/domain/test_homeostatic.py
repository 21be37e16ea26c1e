"""ViDA's loop: allotment, teacher and student, restoration, what it never touches, saving and resuming."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTForImageClassification

from folklora import HomeostaticAdaptation, LoRA, ViDA
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.vida import scaled
from folklora.domain import SourceOnly, corrupt
from folklora.domain import adaptation as parts
from folklora.domain.homeostatic import allot

Maker = Callable[..., ViTForImageClassification]
EPS32 = torch.finfo(torch.float32).eps


def stream(batches: int = 3, rows: int = 4) -> list[Tensor]:
    clean = torch.rand(batches, rows, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return [corrupt(images, "gaussian-noise", seed=i) for i, images in enumerate(clean)]


def made(tiny_vit: Maker, **options: Any) -> HomeostaticAdaptation:
    """On a tiny ViT whose adapters left their start, so that both scales matter."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_vit(), ViDA(r=8, low_rank=2, start="kaiming"))
    with torch.no_grad():
        for _, update in updates_of(model, "default"):
            update.B.normal_(std=0.3)
    return HomeostaticAdaptation(model, **{"views": 3, "lr": 1e-2, "threshold": 0.05} | options)


def teacher_logits(method: HomeostaticAdaptation, images: Tensor, low: float, high: float) -> Tensor:
    method.model.set_adapter("teacher", inference_mode=True)
    with torch.no_grad(), scaled(method.model, low, high):
        return method.model(pixel_values=(images - 0.5) / 0.5).logits


@pytest.mark.parametrize("inverted", [False, True])
def test_scales_add_up_and_the_threshold_decides(inverted: bool) -> None:
    u = torch.tensor([0.0, 1e-3, 0.0499, 0.05, 0.2, 0.9, 3.0])
    low, high = allot(u, 0.05, inverted)
    assert torch.equal(low + high, torch.full_like(u, 2.0))
    assert ((high >= 1) == ((u >= 0.05) != inverted))[1:].all()
    assert low[0] == high[0] == 1
    capped = u.clamp(max=1)
    torch.testing.assert_close((high - 1).abs(), capped, rtol=0, atol=2 * EPS32)
    assert low.min() >= 0
    assert high.min() >= 0


def test_average_with_one_keeps_the_teacher_and_with_zero_copies_the_student() -> None:
    student = {"a": torch.randn(50), "b": torch.randn(50)}
    for decay, expected in ((1.0, "teacher"), (0.0, "student"), (0.25, "mean")):
        teacher = {"a": torch.randn(50), "b": torch.randn(50)}
        before = {name: value.clone() for name, value in teacher.items()}
        parts.average(teacher, student, decay, ["a"])
        wanted = {"teacher": before["a"], "student": student["a"], "mean": 0.25 * before["a"] + 0.75 * student["a"]}
        assert torch.allclose(teacher["a"], wanted[expected], rtol=0, atol=0 if decay != 0.25 else 8 * EPS32)
        assert torch.equal(teacher["b"], before["b"])


def test_restoration_with_one_gives_the_start_and_with_zero_nothing() -> None:
    start, moved = {"a": torch.zeros(4000)}, {"a": torch.ones(4000)}
    generator = torch.Generator().manual_seed(0)
    parts.restore(moved, start, 0.0, generator)
    assert moved["a"].all()
    parts.restore(moved, start, 0.1, generator)
    # five standard deviations of a binomial
    assert moved["a"].mean().item() == pytest.approx(0.9, abs=5 * (0.09 / 4000) ** 0.5)
    parts.restore(moved, start, 1.0, generator)
    assert torch.equal(moved["a"], start["a"])


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decay_and_restoration_in_the_loop(tiny_vit: Maker, decay: float) -> None:
    method = made(tiny_vit, decay=decay)
    method.predict(stream()[0])
    assert any(not torch.equal(value, method.start[name]) for name, value in method.student.items())
    for name, value in method.teacher.items():
        assert torch.equal(value, method.start[name] if decay else method.student[name])
    method = made(tiny_vit, restore=1.0)
    method.predict(stream()[0])
    for name, value in method.student.items():
        assert torch.equal(value, method.start[name])


@pytest.mark.parametrize("allotment", ["homeostatic", "inverted", "none"])
def test_prediction_is_the_teachers_before_the_update(tiny_vit: Maker, allotment: str) -> None:
    method, images = made(tiny_vit, decay=0.5, allotment=allotment), stream()
    method.predict(images[0])
    state = method.generator.get_state()
    u = 0.0 if allotment == "none" else float(method.measure(images[1]))
    method.generator.set_state(state)
    high = 1 + u if (u >= 0.05) != (allotment == "inverted") else 1 - u
    expected = teacher_logits(method, images[1], 2 - high, high)
    found = method.predict(images[1])
    # scales of float32 and of float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad
    assert not torch.allclose(teacher_logits(method, images[1], 2 - high, high), expected, atol=1e-4)
    if allotment != "none":
        assert u > 0
        assert sum(method.counts[way] for way in ("above", "below")) == 2


def test_each_image_can_have_scales_of_its_own(tiny_vit: Maker) -> None:
    images = stream()[0]
    method = made(tiny_vit, per_sample=True)
    state = method.generator.get_state()
    u = method.measure(images)
    assert u.shape == (4,)
    threshold = float(u.sort().values[1:3].mean())
    method.settings["threshold"] = threshold
    method.generator.set_state(state)
    rows = [
        teacher_logits(method, image[None], *map(float, allot(v, threshold)))
        for image, v in zip(images, u, strict=True)
    ]
    torch.testing.assert_close(method.predict(images), torch.cat(rows), rtol=1e-4, atol=1e-4)
    assert method.counts == {"batches": 1, "above": 2, "below": 2}
    whole = made(tiny_vit)
    torch.testing.assert_close(whole.measure(images), u.mean())


def test_identical_views_leave_both_scales_at_one(tiny_vit: Maker) -> None:
    images = stream()[0]
    method = made(tiny_vit, view=lambda images, generator: images)
    expected = teacher_logits(method, images, 1.0, 1.0)
    found = method.predict(images)
    # the mean of equal numbers may differ from them by a rounding, whose square is no uncertainty
    assert float(method.uncertainty) <= (8 * EPS32 * float(expected.abs().max())) ** 2
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * EPS32 * float(expected.abs().max()))


def test_both_scales_reach_teacher_and_student(tiny_vit: Maker) -> None:
    method, images = made(tiny_vit), stream()[0]
    plain = teacher_logits(method, images, 1.0, 1.0)
    assert not torch.allclose(teacher_logits(method, images, 0.5, 1.0), plain, atol=1e-3)
    assert not torch.allclose(teacher_logits(method, images, 1.0, 0.5), plain, atol=1e-3)
    seen = []
    for layer in list(layers_of(method.model))[:1]:
        layer.register_forward_pre_hook(
            lambda module, args: seen.append((module.active_adapters[0], module.context.told.get("vida_scales")))
        )
    method.predict(images)
    assert [name for name, _ in seen] == ["teacher"] * 3 + ["teacher", "default"]
    low, high = allot(method.uncertainty, 0.05)
    assert [scales is None for _, scales in seen] == [True] * 3 + [False] * 2
    for _, scales in seen[3:]:
        assert torch.equal(scales, torch.stack([low, high]))


def test_no_label_is_asked_for_or_passed_on(tiny_vit: Maker) -> None:
    given = []
    model = tiny_vit()
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append((args, set(kwargs))), with_kwargs=True)
    method = HomeostaticAdaptation(model, ViDA(r=4), views=2)
    method.predict(stream()[0])
    assert list(inspect.signature(method.predict).parameters) == ["images"]
    assert len(given) == 4
    assert all(args == () and names == {"pixel_values"} for args, names in given)


@pytest.mark.parametrize("options", [{}, {"base_lr": 1e-3, "base_decay": 0.5, "restore": 0.1}])
def test_the_base_is_never_written_to(tiny_vit: Maker, options: dict[str, Any]) -> None:
    model = tiny_vit().requires_grad_(True)
    own = {id(value): value.detach().clone() for value in model.parameters()}
    tensors = {id(value): value for value in model.parameters()}
    method = HomeostaticAdaptation(model, ViDA(r=4), views=2, lr=1e-2, **options)
    answers = [method.predict(images) for images in stream()]
    for key, value in tensors.items():
        assert torch.equal(value, own[key])
        assert value.grad is None
    # one model, two adapters
    inside = {id(value) for name, value in method.model.named_parameters() if ".folklora_" not in name}
    assert inside == set(own)
    fresh = tiny_vit()
    if options:
        assert any(value.any() for name, value in method.teacher.items() if name.startswith("base."))
        assert {name for name in method.student if name.startswith("base.")} == {
            f"base.{name}" for name in method.model.state_dict() if ".folklora_" not in name
        }
    with torch.no_grad(), method.model.disable_adapter():
        images = stream()[0]
        expected = fresh(pixel_values=(images - 0.5) / 0.5).logits
        assert torch.equal(method.model(pixel_values=(images - 0.5) / 0.5).logits, expected)
    assert not torch.allclose(answers[0], method.predict(images), atol=1e-4)


def test_alone_the_teachers_cross_entropy_teaches_a_student_that_equals_it_nothing(tiny_vit: Maker) -> None:
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    one = torch.autograd.grad(parts.consistency(z.detach(), z), z)[0]
    assert one.abs().max() <= 16 * torch.finfo(torch.float64).eps
    p = z.detach().softmax(1)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    both = torch.autograd.grad(parts.consistency(z.detach(), z, symmetric=True), z)[0]
    # half of the entropy's gradient, by hand
    torch.testing.assert_close(both, -p * (p.log() + entropy) / 12)


def test_a_repeated_batch_becomes_more_certain(tiny_vit: Maker) -> None:
    method, images = made(tiny_vit, decay=0.5, allotment="none"), stream(rows=8)[0]
    answers = [method.predict(images) for _ in range(12)]
    first, last = (float(parts.consistency(z, z)) for z in (answers[0], answers[-1]))
    assert last < 0.9 * first


def test_a_resumed_stream_is_the_whole_one(tiny_vit: Maker, tmp_path: Path) -> None:
    for options in ({"restore": 0.2}, {"base_lr": 1e-3, "optimizer": "sgd"}):
        images, whole = stream(4), made(tiny_vit, decay=0.9, **options)
        expected = [whole.predict(batch) for batch in images]
        first = made(tiny_vit, decay=0.9, **options)
        for batch in images[:2]:
            first.predict(batch)
        first.save(tmp_path / "state.safetensors")
        second = made(tiny_vit, decay=0.9, **options)
        second.resume(tmp_path / "state.safetensors")
        for batch, answer in zip(images[2:], expected[2:], strict=True):
            assert torch.equal(second.predict(batch), answer)
        assert second.counts == whole.counts
        second.reset()
        for batch, answer in zip(images, expected, strict=True):
            assert torch.equal(second.predict(batch), answer)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_state_that_does_not_fit_is_refused(tiny_vit: Maker, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    method = made(tiny_vit)
    method.predict(stream()[0])
    method.save(path)
    with pytest.raises(ValueError, match=r"other settings:\n  views = 3, here 2"):
        made(tiny_vit, views=2).resume(path)
    other = HomeostaticAdaptation(tiny_vit(seed=1), ViDA(r=8, low_rank=2), views=3, lr=1e-2, threshold=0.05)
    with pytest.raises(ValueError, match="another base model"):
        other.resume(path)
    with pytest.raises(ValueError, match="no state of SourceOnly but of HomeostaticAdaptation"):
        SourceOnly(tiny_vit()).resume(path)


def test_the_teacher_is_what_is_deployed(tiny_vit: Maker, tmp_path: Path) -> None:
    method = made(tiny_vit, decay=0.0, allotment="none")
    method.predict(stream()[0])
    images = stream()[1]
    with torch.no_grad():
        expected = method.model(pixel_values=(images - 0.5) / 0.5).logits
    assert torch.equal(method.predict(images), expected)
    method.model.save_pretrained(tmp_path, selected_adapters=["teacher"])
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "teacher").eval()
    with torch.no_grad():
        after = method.model(pixel_values=(images - 0.5) / 0.5).logits
        assert torch.equal(loaded(pixel_values=(images - 0.5) / 0.5).logits, after)


def test_images_are_normalised_by_channel(tiny_vit: Maker) -> None:
    model, images = tiny_vit(), stream()[0]
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    method = HomeostaticAdaptation(tiny_vit(), ViDA(r=4), allotment="none", mean=mean, std=std)
    pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(method.predict(images), model(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allotment": "other"}, "allotment must be homeostatic, inverted or none"),
        ({"views": 1}, "views must be at least 2"),
        ({"factor": -1.0}, "factor must be at least 0"),
        ({"decay": 1.5}, "decay of the teacher .* not 1.5"),
        ({"restore": -0.1}, "restore, a probability"),
        ({"optimizer": "adamw"}, "optimizer must be one of adam, sgd"),
        ({"adapter": LoRA(r=4)}, "must be a ViDA"),
    ],
)
def test_options_are_checked(tiny_vit: Maker, options: dict[str, Any], message: str) -> None:
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        HomeostaticAdaptation(model, **{"adapter": ViDA(r=4)} | options)
    assert not list(layers_of(model))


def test_what_cannot_be_adapted_is_refused(tiny_vit: Maker) -> None:
    method = HomeostaticAdaptation(tiny_vit(), ViDA(r=4), views=2)
    for images, message in (
        (torch.rand(3, 16, 16), r"\[N, C, H, W\]"),
        (2 * torch.rand(2, 3, 16, 16) + 0.5, r"in \[0, 1\]"),
        (torch.full((2, 3, 16, 16), torch.nan), r"in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            method.predict(images)
    method.model.set_adapter("student")
    with pytest.raises(ValueError, match="an adapter 'teacher' already"):
        HomeostaticAdaptation(method.model)
    with pytest.raises(ValueError, match="'default' is no ViDA"):
        HomeostaticAdaptation(get_peft_model(tiny_vit(), LoRA(r=2, target_modules="all-linear")))
    with pytest.raises(ValueError, match="has an adapter already"):
        HomeostaticAdaptation(get_peft_model(tiny_vit(), ViDA(r=2)), ViDA(r=2))
    with pytest.raises(ValueError, match=r"modules of its own \(classifier\)"):
        HomeostaticAdaptation(get_peft_model(tiny_vit(), ViDA(r=2, modules_to_save=["classifier"])))


def test_a_loss_that_is_not_finite_changes_nothing(tiny_vit: Maker) -> None:
    method = made(tiny_vit, allotment="none")
    nn.init.constant_(method.model.get_submodule("base_model.model.classifier").bias, torch.inf)
    with pytest.raises(FloatingPointError, match="batch 1 is nan; nothing was learnt"):
        method.predict(stream()[0])
    for values in (method.student, method.teacher):
        for name, value in values.items():
            assert torch.equal(value, method.start[name])
