"""The tiny Llama that `folklora.check` puts every method on, how it is trained there, and how results are compared."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from folklora.adapters.base import AdapterConfig
from folklora.adapters.calibrate import calibrate
from folklora.adapters.host.layer import FolkloraLayer, layers_of
from folklora.adapters.host.steps import activation_penalty
from folklora.tiny_files import source_adapters, task_vectors, trained_adapters

TARGETS = ["q_proj", "v_proj", "down_proj"]
ROWS, POSITIONS, VOCABULARY = 4, 6, 61
CLASSES = [0, 1, 0, -1]
_SIZES = {"r": 4, "segments": ROWS, "gate_hidden": 16}
_DECOMPOSITIONS = ("eig", "svd", "qr", "geqrf", "cholesky", "lu_factor", "inv_ex", "lstsq", "solve_ex")


def llama(layers: int = 2, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of width 32 with grouped key-value heads, the same at every call, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return LlamaForCausalLM(config).to(dtype).eval()


class TwoLayers(nn.Module):
    """A wide layer `q` [20, 32] and a tall one `v` [36, 20] with a tanh between them, the same at every call.

    Args:
        transposed: Made of transformers' `Conv1D`, which stores its weight as [in, out]; it computes the same.
    """

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.q, self.v = nn.Linear(32, 20), nn.Linear(20, 36)
        if transposed:
            self.q, self.v = _as_conv1d(self.q), _as_conv1d(self.v)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 32] to [..., 36]."""
        return self.v(torch.tanh(self.q(x)))


def _as_conv1d(linear: nn.Linear) -> Conv1D:
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight.data, layer.bias.data = linear.weight.data.T.contiguous(), linear.bias.data.clone()
    return layer


def bart(dtype: torch.dtype = torch.float32) -> BartForConditionalGeneration:
    """An encoder-decoder of width 32 with two blocks each, the same at every call, in evaluation mode."""
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        init_std=0.2,
        dropout=0.0,
        forced_eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return BartForConditionalGeneration(config).to(dtype).eval()


def sized(factory: type[AdapterConfig], **options: Any) -> AdapterConfig:
    """A configuration with sizes that fit the tiny model and `batch()`, unless `options` say else."""
    known = {field.name for field in dataclasses.fields(factory)}
    return factory(**{name: value for name, value in _SIZES.items() if name in known} | options)


def targets_of(config: AdapterConfig | type[AdapterConfig]) -> list[str]:
    """Layers of the tiny Llama that a method adapts: linear ones, or the feed-forward layers where it takes those."""
    return list(TARGETS) if "linear" in config.layer_kinds else ["mlp"]


def adapted(
    config: AdapterConfig, layers: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PeftModel:
    """A fresh tiny Llama with the adapter at its seeded start."""
    model = llama(layers, dtype).to(device)
    config = calibrated(model, config)
    torch.manual_seed(5)
    return get_peft_model(model, config)


def calibrated(model: nn.Module, config: AdapterConfig, batches: Sequence[Any] = ()) -> AdapterConfig:
    """A copy of a configuration, with the statistics that its method needs of a model that carries no adapter yet.

    Args:
        model: The model.
        config: The method.
        batches: What to calibrate on; a model's loss on them is its output's mean square. None take `batch()` and a
            language model's own loss.
    """
    config = copy.deepcopy(config)
    if composed := example_sources(model, config):
        config = config.changed(**composed)
    if not config.needs or config.statistics is not None:
        return config
    loss = _mean_square if batches else None
    return config.calibrated(
        calibrate(model, batches or [labelled_batch()], config.needs, target_modules=config, loss=loss)
    )


def example_sources(model: nn.Module, config: AdapterConfig) -> dict[str, dict[str, str]]:
    """Options that name what a method composes of others' training, where a configuration names none; empty else."""
    if getattr(config, "vectors", None) == {}:
        return {"vectors": task_vectors(model)}
    if getattr(config, "sources", None) == {}:
        make = trained_adapters if config.example_sources == "lora" else source_adapters
        return {"sources": make(model, config.target_modules)}
    return {}


def trained(config: AdapterConfig) -> PeftModel:
    """A tiny Llama whose adapter has left its start, in evaluation mode."""
    model = adapted(config)
    train(model)
    return model.eval()


def precise(config: AdapterConfig) -> PeftModel:
    """A tiny Llama in float64 whose adapter was moved off its start by noise."""
    return moved(adapted(config, dtype=torch.float64)).double()


def train(model: nn.Module, parameters: list[nn.Parameter] | None = None) -> None:
    """Three steps of AdamW with weight decay on `parameters` (by default those that are trained)."""
    chosen = parameters or [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=0.03, weight_decay=0.1)
    model.train()
    torch.manual_seed(17)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    optimizer.zero_grad()


def moved(model: PeftModel, adapter_name: str = "default") -> PeftModel:
    """The model with noise on every trained parameter of one adapter, which becomes the active one."""
    model.set_adapter(adapter_name)
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn(value.shape, generator=generator).to(value)
    return model


def batch(model: nn.Module | None = None) -> dict[str, Tensor]:
    """Four rows of tokens, the last with two positions of padding; and classes, if the model's adapters read them.

    They lie where the model's parameters do.
    """
    tokens = torch.randint(VOCABULARY, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(19))
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if model is not None and reads_classes(model):
        inputs["class_labels"] = torch.tensor(CLASSES)
    device = "cpu" if model is None else next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def reads_classes(model: nn.Module) -> bool:
    """Whether an update on the model needs the classes of a batch's rows."""
    return any(update.reads_classes for layer in layers_of(model) for update in layer.folklora_updates.values())


def labelled_batch(model: nn.Module | None = None) -> dict[str, Tensor]:
    """`batch(model)` with its tokens as labels, padding left out."""
    inputs = batch(model)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def logits(model: nn.Module) -> Tensor:
    """The model's logits on `batch()` in evaluation mode; its own mode is restored."""
    training = model.training
    with torch.no_grad():
        result = model.eval()(**batch(model)).logits
    model.train(training)
    return result


def loss(model: nn.Module, call: Any = None) -> Tensor:
    """The language-modelling loss on `batch()` with the method's activation penalty; `call` computes it."""
    value = (model if call is None else call)(**labelled_batch(model)).loss
    extra = activation_penalty(model)
    return value if extra is None else value + extra


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that are there, by parameter."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base model's own parameters by the names that they have without adapters."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in model.named_parameters()
        if ".folklora_" not in name
    }


def with_updates(model: nn.Module, base: nn.Module) -> nn.Module:
    """`base` with the dense ΔW of the model's active updates added to its weights; gated updates add nothing."""
    for layer in layers_of(model):
        weight = base.get_submodule(layer.name).weight
        for name in layer.active_adapters:
            if not layer.folklora_updates[name].gated:
                weight.data += layer.kind.layout(layer.get_base_layer(), change(layer, name)).to(weight)
    return base


def change(layer: FolkloraLayer, adapter_name: str = "default") -> Tensor:
    """The ΔW [out, in] of an adapter on a layer, float64; not of a gated one, which has none."""
    update = layer.folklora_updates[adapter_name]
    if update.is_dense:
        return update.dense(layer.kind.matrix(layer.get_base_layer()).double())
    factors = update.factors()
    return dataclasses.replace(factors, A=factors.A.double(), B=factors.B.double()).dense()


def layer_input(layer: FolkloraLayer) -> Tensor:
    """Two rows of five positions: token numbers for an embedding, values for a linear layer."""
    width = layer.kind.shape(layer.get_base_layer())[-1]
    generator = torch.Generator().manual_seed(3)
    if layer.kind.name == "embedding":
        return torch.randint(width, (2, 5), generator=generator)
    return torch.randn(2, 5, width, generator=generator)


def layer_output(layer: FolkloraLayer, names: list[str], x: Tensor) -> Tensor:
    """One layer's output with just these adapters active, no gradients."""
    layer.set_adapter([name for name in names if name in layer.folklora_updates])
    with torch.no_grad():
        return layer(x)


def penalty_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of all penalties from their formula, by parameter; empty where the method has none."""
    values: dict[str, list[Tensor]] = defaultdict(list)
    reductions: dict[str, str] = {}
    for layer in layers_of(model):
        for name, update in layer.folklora_updates.items():
            value = update.penalty() if any(p.requires_grad for p in update.parameters()) else None
            if value is not None:
                values[name].append(value)
                reductions[name] = layer.reductions[name]
    if not values:
        return {}
    total = sum(
        torch.stack(parts).mean() if reductions[name] == "mean" else torch.stack(parts).sum()
        for name, parts in values.items()
    )
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, found, strict=True) if value is not None}


def trainer_step(
    config: AdapterConfig, accumulation: int, penalised: bool = True, rows: Tensor | None = None
) -> PeftModel:
    """A tiny Llama in float64 after one step of SGD with rate 1 in transformers' Trainer.

    Args:
        config: The method.
        accumulation: Into how many micro-batches the four rows of a process are split.
        penalised: Whether the updates' penalties are left on.
        rows: Tokens [rows, positions], four rows a process; None takes `batch()`.
    """
    # slow to import, and no other check needs it
    from transformers import PrinterCallback, Trainer, TrainingArguments

    model = precise(config)
    if not penalised:
        for layer in layers_of(model):
            for update in layer.folklora_updates.values():
                update.penalty = lambda: None
    rows = batch()["input_ids"] if rows is None else rows
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=ROWS // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0,
            seed=3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        examples = [{"input_ids": row, "labels": row} for row in rows]
        if reads_classes(model):
            examples = [{**example, "class_labels": CLASSES[i % ROWS]} for i, example in enumerate(examples)]
        trainer = Trainer(model, arguments, train_dataset=examples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def require(condition: Any, what: str) -> None:
    """Refuse what is not so."""
    if not condition:
        raise AssertionError(what)


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Refuse two tensors that differ by more than `tolerance` times the larger of 1 and the largest expected value."""
    require(actual.shape == expected.shape, f"{what} have shapes {list(actual.shape)} and {list(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    if not expected.numel():
        return
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    error = float((actual - expected).abs().max())
    require(error <= allowed, f"{what} differ by {error:.2e}, more than {allowed:.2e}")


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Refuse two tensors that are not equal bit for bit."""
    if not torch.equal(actual, expected):
        error = float((actual.double() - expected.double()).abs().max())
        raise AssertionError(f"{what}: not equal bit for bit (largest difference {error:.2e})")


def _mean_square(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(output, "logits", output).square().mean()


class NoDecomposition(TorchDispatchMode):
    """While active, a matrix decomposition or inverse raises AssertionError."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation unless it is a decomposition."""
        name = func.__name__.partition(".")[0]
        if name.lstrip("_").removeprefix("linalg_").startswith(_DECOMPOSITIONS):
            raise AssertionError(f"a decomposition ({name}) ran where none may")
        return func(*args, **(kwargs or {}))
