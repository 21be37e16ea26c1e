"""Every method on a GPU: it trains, is saved and loaded there, and computes what it computes on the processor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from folklora import learn, methods, tiny
from folklora.adapters.base import AdapterConfig
from folklora.merge import DynamicLogitFusion, FusionX, twin_merging
from folklora.merge.lessons import Collator, Lessons, read_texts
from folklora.stream.tasks import Example, Task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the processor has the other tests"),
]
DEVICE = "cuda"
ADAPTERS = {method.name: method.factory for method in methods("adapters")}
CONTINUAL = [method.name for method in methods("continual")]
EPS = torch.finfo(torch.float32).eps
# two blocks of seven products and a head, each a sum of at most 48 terms, whose roundings differ with its order
NEAR = 15 * 48**0.5 * EPS
TEXTS = ["Answer: yes", "a good film\nAnswer: positive", "a bad film", "no no no yes"]
QUICK = {"learning_rate": 0.02, "batch_size": 4, "max_length": 48, "epochs": 1}


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """float32 products of float32's own precision, and none after the test that it did not find."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def configured(factory: type[AdapterConfig]) -> AdapterConfig:
    config = tiny.sized(factory)
    if config.target_modules is None:
        config.target_modules = tiny.targets_of(config)
    return config


def two_steps(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Two of AdamW's; the loss stays finite, and every step moves something."""
    trained = [value for value in model.parameters() if value.requires_grad]
    assert trained
    assert {value.device.type for value in model.parameters()} == {DEVICE}
    optimizer = torch.optim.AdamW(trained, lr=0.03)
    model.train()
    for _ in range(2):
        before = [value.detach().clone() for value in trained]
        found = loss()
        assert torch.isfinite(found)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(old, value) for old, value in zip(before, trained, strict=True))
        assert all(torch.isfinite(value).all() for value in trained)
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_learns_is_loaded_and_is_the_processors(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.adapted(configured(ADAPTERS[name]), dtype=dtype, device=DEVICE)
    two_steps(model, lambda: tiny.loss(model))
    found = tiny.logits(model)
    assert found.device.type == DEVICE
    assert torch.isfinite(found).all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(dtype=dtype).to(DEVICE), tmp_path).eval()
    tiny.same(tiny.logits(loaded), found, "the logits of the loaded adapter and the saved one")
    if dtype == torch.float32:
        there = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
        tiny.close(found.cpu(), tiny.logits(there), NEAR, "the logits on the GPU and on the processor")


def test_fusion_x_learns_and_is_the_processors(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    target, source = tiny_llama(0, initializer_range=0.2), tiny_llama(1, initializer_range=0.2)
    readings = [read_texts(model.to(DEVICE), tiny_tokenizer, TEXTS) for model in (target, source)]
    lessons = Lessons.of(readings[0], {"source": readings[1]})
    torch.manual_seed(1)
    there = FusionX(target.cpu(), teachers=2)
    fusion = copy.deepcopy(there).to(DEVICE)
    batch = Collator(pad=1)(list(lessons))
    on_device = {key: value.to(DEVICE) for key, value in batch.items()}
    tiny.close(fusion(**on_device).loss.cpu(), there(**batch).loss, NEAR, "the loss on the GPU and on the processor")
    gate = copy.deepcopy(fusion.gate.state_dict())
    two_steps(fusion, lambda: fusion(**on_device).loss)
    assert any(not torch.equal(value, gate[key]) for key, value in fusion.gate.state_dict().items())


def test_dynamic_logit_fusion_generates_what_the_processor_does(tiny_llama: Any) -> None:
    sizes = {"initializer_range": 0.15, "eos_token_id": None}
    models = [tiny_llama(seed, **sizes) for seed in range(4)]
    prompt = torch.randint(2, 128, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0
    found = []
    for device in ("cpu", DEVICE):
        large, small, *specialists = (model.to(device) for model in models)
        fusion = DynamicLogitFusion(large, small, specialists)
        own = mask.to(device)
        out = large.generate(
            prompt.to(device),
            attention_mask=own,
            logits_processor=[fusion.start(own)],
            max_new_tokens=6,
            do_sample=False,
        )
        found.append((out.cpu(), fusion.alpha.cpu()))
    (expected, alpha), (tokens, own_alpha) = found
    assert torch.equal(tokens, expected)
    # as near as the search goes, which halves its interval until it is below the tolerance
    torch.testing.assert_close(own_alpha, alpha, rtol=0, atol=1e-4)


def test_twin_merging_gives_the_processors_models() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(24, 16, generator=generator)
    models = [base + 0.1 * torch.randn(24, 16, generator=generator) for _ in range(3)]
    expected = twin_merging(models, base, mask_rate=0.5)
    found = twin_merging([model.to(DEVICE) for model in models], base.to(DEVICE), mask_rate=0.5)
    for task in range(3):
        assert found.for_task(task).device.type == DEVICE
        # the directions' signs may differ, and their products do not
        tiny.close(found.for_task(task).cpu(), expected.for_task(task), 24 * EPS, "a task's weights")


def tasks() -> list[Task]:
    made = []
    for name, labels in (("xx", (" yes", " no")), ("yy", (" no", " positive"))):
        rows = tuple(Example(f"{name}: {'abcdefgh'[i]}\nAnswer:", labels[i % 2]) for i in range(8))
        made.append(Task(name, rows, rows[:4], labels))
    return made


@pytest.mark.parametrize("name", CONTINUAL)
def test_a_continual_method_learns_two_tasks(name: str, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = tiny_llama(1)
    run = learn(base, tasks(), name, out=tmp_path / "run", options=QUICK, tokenizer=tiny_tokenizer, seed=3)
    assert {value.device.type for value in base.parameters()} == {DEVICE}
    (entry,) = run.results["methods"].values()
    assert all(0 <= score <= 100 for score in entry["matrix"][-1])
    kept = [value for file in (tmp_path / "run").rglob("*.safetensors") for value in load_file(file).values()]
    assert kept
    assert all(torch.isfinite(value).all() for value in kept)
