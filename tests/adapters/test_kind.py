"""KIND: components behind the class gate, the two starts, cutting out and attaching classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import folklora
from folklora import KIND, LoRA, export_lora
from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.kind import KINDUpdate, attach, extract

EPS32 = torch.finfo(torch.float32).eps
IN, OUT, N_G, T, CLASSES = 20, 16, 4, 2, [0, 1, 5]
R = N_G + T * len(CLASSES)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.head = nn.Linear(IN, OUT), nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.q(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(moved: bool = True, **options: Any) -> PeftModel:
    base = net()
    torch.manual_seed(1)
    defaults = {"learngenes": N_G, "tailors": T, "classes": CLASSES, "target_modules": ["q"]}
    model = get_peft_model(base, KIND(**defaults | options))
    if moved:
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(0.3 * torch.randn_like(value))
    return model


def the_layer(model: nn.Module, name: str = "default") -> tuple[FolkloraLayer, KINDUpdate]:
    return next(updates_of(model, name))


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, IN, generator=torch.Generator().manual_seed(2))


def layer_output(model: PeftModel, x: Tensor, labels: Any) -> Tensor:
    with folklora.classes(model, labels):
        return the_layer(model)[0](x)


def close32(actual: Tensor, expected: Tensor) -> None:
    # sums of some twenty products each
    torch.testing.assert_close(actual, expected, rtol=0, atol=100 * EPS32 * float(expected.detach().abs().max()))


def sliced(update: KINDUpdate, slots: list[int]) -> Tensor:
    """U diag(σ) Vᵀ over the learngenes and these classes' tailors, column by column."""
    part, total = update.components, 0
    for i in [*range(N_G), *(N_G + T * slot + j for slot in slots for j in range(T))]:
        total = total + part.sigma[i] * torch.outer(part.U[:, i], part.V[i])
    return total


def test_the_overlay_starts_at_the_base() -> None:
    model = adapted(moved=False)
    assert torch.equal(model(inputs(), class_labels=[0, 1, 5, -1]), net()(inputs()))
    _, update = the_layer(model)
    # one factor is zero and not both, so that a gradient reaches it
    assert update.components.V.abs().min() > 0
    assert (update.components.sigma == 1).all()


def test_with_all_gates_open_it_is_the_dense_product() -> None:
    model, x = adapted(), inputs()
    layer, update = the_layer(model)
    part = update.components
    dense = part.U @ torch.diag(part.sigma) @ part.V
    close32(layer_output(model, x, torch.ones(4, 3)), layer.base_layer(x) + x @ dense.T)


@pytest.mark.parametrize("start", ["zero", "weight"])
def test_every_row_has_the_components_of_its_class(start: str) -> None:
    model, x = adapted(start=start), inputs()
    layer, update = the_layer(model)
    mixed = layer_output(model, x, [5, 0, -1, 1])
    for row, slots in enumerate([[2], [0], [], [1]]):
        delta = sliced(update, slots)
        if start == "weight":
            delta = delta - update.origin.U @ torch.diag(update.origin.sigma) @ update.origin.V
        close32(mixed[row], layer.base_layer(x[row]) + x[row] @ delta.T)
        # the same row in a batch of its own class
        label = CLASSES[slots[0]] if slots else -1
        close32(layer_output(model, x[row : row + 1], [label])[0], mixed[row])


def test_a_class_teaches_the_learngenes_and_its_own_tailors_alone() -> None:
    model = adapted()
    _, update = the_layer(model)
    model(inputs(), class_labels=[1, 1, -1, 1]).square().sum().backward()
    touched = torch.zeros(R, dtype=torch.bool)
    touched[:N_G] = touched[N_G + T : N_G + 2 * T] = True
    part = update.components
    for gradient in (part.U.grad.T, part.V.grad, part.sigma.grad.unsqueeze(1)):
        assert torch.equal(gradient.abs().amax(1) > 0, touched)
    model.zero_grad()
    model(inputs(), class_labels=[-1] * 4).square().sum().backward()
    assert torch.equal(part.V.grad.abs().amax(1) > 0, torch.arange(R) < N_G)


def test_a_soft_gate_that_is_one_hot_is_the_hard_one() -> None:
    model, x = adapted(), inputs()
    hard = layer_output(model, x, [0, 5, 1, -1])
    weights = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]], requires_grad=True)
    soft = layer_output(model, x, weights)
    assert torch.equal(soft, hard)
    soft.square().sum().backward()
    assert (weights.grad[:3].abs() > 0).all()


def test_the_weight_start_is_the_weight_with_all_gates_open() -> None:
    model = adapted(moved=False, start="weight", keep_variance=False, learngenes=10)
    layer, update = the_layer(model)
    weight = layer.base_layer.weight
    full = update.components.U @ torch.diag(update.components.sigma) @ update.components.V
    # r = min(in, out): nothing is left of W beside the components
    close32(full, weight)
    close32(layer_output(model, inputs(), torch.ones(4, 3)), layer.base_layer(inputs()))
    assert not torch.allclose(layer_output(model, inputs(), [0] * 4), layer.base_layer(inputs()))
    # strong and weak ones are spread, not the strong ones given to the learngenes
    sigma = update.components.sigma
    assert not torch.equal(sigma, sigma.sort(descending=True).values)
    close32(sigma.sort(descending=True).values, torch.linalg.svdvals(weight))
    # with their variance kept, the open twelve of sixteen are as large as the whole
    kept = the_layer(adapted(moved=False, start="weight", learngenes=10))[1]
    close32(kept.components.sigma, sigma * (16 / 12) ** 0.5)
    close32(kept.origin.sigma, sigma)


def test_a_classes_weight_has_the_rank_of_what_is_open() -> None:
    model = adapted(start="weight", learngenes=10)
    layer, update = the_layer(model)
    for slots in ([0], [2], []):
        weight = layer.base_layer.weight.double() + update.fixed(slots).dense().double()
        assert torch.linalg.matrix_rank(weight, rtol=1e-5) == 10 + T * len(slots)


@pytest.mark.parametrize("start", ["zero", "weight"])
def test_numbers_of_parameters(start: str) -> None:
    model = adapted(start=start)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == R * (IN + OUT + 1)
    attach(model, [7])
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == T * (IN + OUT + 1)
    assert model.peft_config["default"].trainable_count((OUT, IN)) == T * (IN + OUT + 1)


@pytest.mark.parametrize("start", ["zero", "weight"])
def test_extracted_classes_compute_what_they_did(start: str) -> None:
    model, x, labels = adapted(start=start), inputs(), [5, 0, -1, 5]
    before = model(x, class_labels=labels)
    extract(model, [5, 0], "two")
    model.set_adapter("two")
    close32(model(x, class_labels=labels), before)
    assert the_layer(model, "two")[1].components.U.shape == (OUT, N_G + 2 * T)
    with pytest.raises(ValueError, match=r"class 1 is unknown; the classes are \[5, 0\]"):
        model(x, class_labels=[1] * 4)
    # the original still knows it
    model.set_adapter("default")
    assert torch.equal(model(x, class_labels=labels), before)


@pytest.mark.parametrize("label", [5, -1])
@pytest.mark.parametrize("options", [{}, {"start": "weight", "learngenes": 10}])
def test_a_single_class_is_a_lora_that_merges_and_exports(tmp_path: Path, label: int, options: dict[str, Any]) -> None:
    model, x = adapted(**options, modules_to_save=["head"]), inputs()
    expected = model(x, class_labels=[label] * 4)
    extract(model, label, into="one")
    model.set_adapter("one")
    close32(model(x), expected)
    assert isinstance(model.peft_config["one"], LoRA)
    # 26 or more terms over a weight of rank 16 are written as 16
    assert model.peft_config["one"].r == (OUT if options else N_G + T * (label >= 0))
    export_lora(model, tmp_path / "lora", "one")
    stock = PeftModel.from_pretrained(net(), tmp_path / "lora")
    close32(stock(x), expected)
    close32(model.merge_and_unload()(x), expected)


def test_it_cannot_merge_or_export_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"its update depends on the class of each row \(folklora\.adapters\.kind\.ext"
    ):
        adapted().merge_adapter()
    with pytest.raises(
        ValueError, match=r"its update depends on the class of each row \(folklora\.adapters\.kind\.extract"
    ):
        export_lora(adapted(), tmp_path / "lora")


@pytest.mark.parametrize("start", ["zero", "weight"])
def test_attached_classes_learn_and_nothing_else_does(start: str, tmp_path: Path) -> None:
    model, x, old = adapted(start=start), inputs(), [0, 1, 5, -1]
    before = model(x, class_labels=old)
    attach(model, [9, 7])
    # new tailors add nothing to the learngenes yet, and the old classes compute what they did
    close32(model(x, class_labels=[9, 9, 7, -1])[:3], model(x, class_labels=[-1] * 4)[:3])
    close32(model(x, class_labels=old), before)
    before = model(x, class_labels=old)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        model(x, class_labels=[9, 9, 7, 7]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)
    assert torch.equal(model(x, class_labels=old), before)
    after = model(x, class_labels=[9, 7, 0, -1])
    assert not torch.allclose(after[:2], model(x, class_labels=[-1] * 4)[:2])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(x, class_labels=[9, 7, 0, -1]), after)
    trained = {name for name, value in loaded.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in model.named_parameters() if value.requires_grad}
    attach(loaded, [11])
    close32(loaded(x, class_labels=[9, 7, 0, -1]), after)
    assert loaded.peft_config["default"].classes == [*CLASSES, 9, 7, 11]


def test_new_classes_may_start_from_the_learngenes_alone() -> None:
    model, x = adapted(), inputs()
    alone = model(x, class_labels=[-1] * 4)
    extract(model, [], into="learngenes")
    model.set_adapter("learngenes")
    attach(model, [3], "learngenes")
    close32(model(x, class_labels=[3, -1, 3, 3]), alone)
    assert the_layer(model, "learngenes")[1].components.U.shape == (OUT, N_G)


def test_a_call_without_classes_is_an_error_that_says_how_to_name_them() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"adapter default on layer 'q' needs the class of each row .* class_labels="):
        model(inputs())
    model(inputs(), class_labels=[0] * 4)
    with pytest.raises(ValueError, match="needs the class of each row"):
        model(inputs())
    with model.disable_adapter():
        assert torch.equal(model(inputs()), net()(inputs()))
        assert torch.equal(model(inputs(), class_labels=[0] * 4), net()(inputs()))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 9], r"adapter default: class 2, 9 is unknown; the classes are \[0, 1, 5\], and -1 is none of them"),
        ([0, 1, 5], "class_labels has 3 entries, and the batch of 4 rows that layer 'q' sees is no multiple of that"),
        (torch.ones(4, 2), r"weights of 3 classes are \[rows, classes\], not \[4, 2\]"),
        (torch.zeros(4, 1, dtype=torch.int64), "one number a row"),
    ],
)
def test_classes_that_do_not_fit_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted()(inputs(), class_labels=labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tailors": 0}, "tailors >= 1"),
        ({"learngenes": 0, "classes": []}, "at least one component"),
        ({"classes": [1, 2, 1]}, r"given twice: \[1\]"),
        ({"classes": [1, -1]}, r"at least 0, not \[-1\]"),
        ({"attached": 3}, "attached must be between 0 and the 2 classes"),
        ({"start": "svd"}, "start must be"),
        ({"start": "weight", "dropout": 0.1}, "takes no dropout"),
        ({"orthogonality": -1.0}, "orthogonality"),
        ({"rank_pattern": {"q": 3}}, "no rank_pattern"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KIND(**options)


def test_what_does_not_fit_a_layer_or_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"18 components of a class \(learngenes \+ tailors\) are above 16"):
        adapted(learngenes=16)
    with pytest.raises(ValueError, match="17 components are above 16, the rank of layer 'q'"):
        adapted(learngenes=11, start="weight")
    model = adapted()
    with pytest.raises(ValueError, match=r"knows no class \[3\]; its classes are \[0, 1, 5\]"):
        extract(model, [0, 3], "x")
    with pytest.raises(ValueError, match=r"given twice: \[5\]"):
        attach(model, [5])
    with pytest.raises(ValueError, match="no KIND adapter named 'other'"):
        attach(model, [6], "other")


def test_the_penalty_is_that_of_both_sides() -> None:
    model = adapted(orthogonality=0.5)
    part = the_layer(model)[1].components
    gram = [part.U.T @ part.U, part.V @ part.V.T]
    expected = 0.5 * sum(float((g - torch.eye(R)).square().sum()) for g in gram)
    assert float(folklora.penalty(model)) == pytest.approx(expected, rel=1e-5)
    assert float(folklora.penalty(adapted())) == 0
