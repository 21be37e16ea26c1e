"""Checks of `folklora.check` on what a method is trained in: precisions, checkpointing, compilation, copies."""

from __future__ import annotations

import copy
import pickle

import torch
from peft import PeftModel, get_peft_model

from folklora import tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.layer import updates_of


class NotHereError(Exception):
    """A check cannot run on this machine; the message says why."""


def check_bfloat16(config: AdapterConfig) -> None:
    """Over a bfloat16 base, loss and gradients are finite and the trained parameters float32."""
    _check_half(config, torch.bfloat16)


def check_float16(config: AdapterConfig) -> None:
    """Over a float16 base, loss and gradients are finite and the trained parameters float32."""
    _check_half(config, torch.float16)


def check_checkpointing(config: AdapterConfig) -> None:
    """Gradient checkpointing gives the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny.moved(tiny.adapted(config)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        tiny.loss(model).backward()
        gradients.append(tiny.gradients(model))
    for name, expected in gradients[0].items():
        tiny.close(gradients[1][name], expected, 1e-6, f"the gradients of {name} with and without checkpointing")


def check_compile(config: AdapterConfig) -> None:
    """torch.compile takes the model whole, forward and backward, and changes nothing."""
    model = tiny.moved(tiny.adapted(config, layers=1)).eval()
    expected = tiny.loss(model)
    if not expected.requires_grad:
        # all that it learns from is there in training alone
        expected = tiny.loss(model.train())
    expected.backward()
    gradients = tiny.gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    loss = tiny.loss(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    loss.backward()
    tiny.close(loss, expected, 1e-6, "the compiled loss and the eager one")
    for name, value in tiny.gradients(model).items():
        tiny.close(value, gradients[name], 1e-5, f"the compiled gradient of {name} and the eager one")


def check_adapter_dtype(config: AdapterConfig) -> None:
    """With `autocast_adapter_dtype=False` the adapter is held and trained in the base's dtype."""
    base = tiny.llama(dtype=torch.bfloat16)
    torch.manual_seed(5)
    model = get_peft_model(base, tiny.calibrated(base, config), autocast_adapter_dtype=False)
    for name, value in model.named_parameters():
        if value.is_floating_point():
            tiny.require(value.dtype == torch.bfloat16, f"{name} is held in {value.dtype}, and the base in bfloat16")
    tiny.train(tiny.moved(model))
    tiny.require(torch.isfinite(tiny.loss(model)), "the loss after three steps in bfloat16 is not finite")


def check_copies(config: AdapterConfig) -> None:
    """Deep copies and pickles of a model in training compute the same, and are regularised on their own."""
    model = tiny.adapted(config)
    tiny.train(model)
    # what a pass leaves behind in the updates must not stand in the way
    model(**tiny.batch(model))
    for how, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        tiny.same(tiny.logits(twin), tiny.logits(model), f"the logits of the model's {how}")
        original = copy.deepcopy(model.state_dict())
        expected = dict(_stepped(copy.deepcopy(twin)).named_parameters())
        twin.zero_grad()
        torch.optim.SGD(twin.parameters(), lr=1.0).step()
        for name, value in twin.named_parameters():
            tiny.close(value, expected[name], 1e-6, f"a penalised step on {name} of the {how} and its formula")
        for name, value in model.state_dict().items():
            tiny.same(value, original[name], f"the original's {name} after a step on its {how}")


@torch.no_grad()
def _stepped(model: PeftModel) -> PeftModel:
    """The model after a step of SGD with rate 1 on its penalties alone, and what its updates do after a step."""
    with torch.enable_grad():
        gradients = tiny.penalty_gradients(model)
    for name, value in model.named_parameters():
        if name in gradients:
            value -= gradients[name]
    for _, update in updates_of(model, "default"):
        update.after_step()
    return model


def _check_half(config: AdapterConfig, dtype: torch.dtype) -> None:
    model = tiny.moved(tiny.adapted(config, dtype=dtype)).train()
    torch.manual_seed(7)
    try:
        loss = tiny.loss(model)
        loss.backward()
    except RuntimeError as error:
        if "not implemented for" in str(error):
            raise NotHereError(f"this PyTorch has no {dtype} here: {error}") from error
        raise
    tiny.require(torch.isfinite(loss), f"the loss over a {dtype} base is {loss}")
    found = tiny.gradients(model)
    for name, value in model.named_parameters():
        if value.requires_grad:
            tiny.require(value.dtype == torch.float32, f"{name} is trained in {value.dtype}, not float32")
            tiny.require(name in found, f"{name} is trained and got no gradient")
            tiny.require(torch.isfinite(found[name]).all(), f"the gradient of {name} is not finite")
