"""The battery that every adapter method passes on a tiny Llama; public, for whoever writes a method.

    folklora.check_method(MyMethod)            # or an instance, or options: check_method(MyMethod, r=2)

Each check is a function of a configuration that raises AssertionError in words. What a method cannot do is an entry
of `EXCEPTIONS`, and an entry that is out of date is a failure too.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel

from folklora import tiny
from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.call import classes
from folklora.adapters.host.export import export_lora
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.kasa import KaSA
from folklora.adapters.lora import LoRA
from folklora.check_exceptions import EXCEPTIONS
from folklora.check_layers import (
    check_attention,
    check_base_values,
    check_convolution,
    check_dropout,
    check_embedding,
    check_plain_module,
    check_start_at_base,
    check_weighted,
)
from folklora.check_training import (
    NotHereError,
    check_adapter_dtype,
    check_bfloat16,
    check_checkpointing,
    check_compile,
    check_copies,
    check_float16,
)

_BOTH = ["default", "other"]


class ConformanceError(AssertionError):
    """A method failed checks; the message names each in words."""


@dataclass(frozen=True)
class Result:
    """What came of one check.

    Args:
        method: The method's name.
        check: The check's name.
        outcome: "excepted" is a failure that `EXCEPTIONS` foresees; "skipped" could not run on this machine.
        message: Why, where it did not pass.
    """

    method: str
    check: str
    outcome: Literal["passed", "excepted", "skipped", "failed"]
    message: str = ""


def check_method(config: AdapterConfig | type[AdapterConfig], **options: Any) -> list[Result]:
    """Run every check on a method.

    Args:
        config: A configuration, or its class: then rank 4 on three layers of each block unless `options` say else.
        **options: Options of the class, or changes to the configuration.

    Returns:
        One result a check, none of them "failed".

    Raises:
        ConformanceError: With every failed check and every exception that is out of date.
    """
    own = _configuration(config, options)
    results = [run_check(own, name) for name in CHECKS]
    failed = [result for result in results if result.outcome == "failed"]
    if failed:
        lines = [f"  {result.check}: {result.message}" for result in failed]
        raise ConformanceError("\n".join([f"{own.method} fails {len(failed)} of {len(results)} checks:", *lines]))
    return results


def run_check(config: AdapterConfig | type[AdapterConfig], name: str) -> Result:
    """Run one check of `CHECKS` on a method, never raising for what the method does wrong."""
    config = _configuration(config, {})
    reason = EXCEPTIONS.get((config.method, name))
    try:
        CHECKS[name](config)
    except NotHereError as error:
        return Result(config.method, name, "skipped", str(error))
    except Exception as error:
        message = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        return Result(config.method, name, "excepted" if reason else "failed", reason or message)
    if reason:
        return Result(config.method, name, "failed", f"passes, so the exception '{reason}' is out of date")
    return Result(config.method, name, "passed")


def check_start(config: AdapterConfig) -> None:
    """The model starts where its base is, or as its updates say not; and it computes what W + ΔW computes."""
    model, base = tiny.adapted(config, dtype=torch.float64).eval(), tiny.llama(dtype=torch.float64)
    start = tiny.logits(model)
    if all(update.starts_at_base for _, update in updates_of(model, "default")):
        tiny.close(start, tiny.logits(base), 1e-6, "the logits at the start and the base's")
    else:
        tiny.require(not torch.allclose(start, tiny.logits(base)), "starts_at_base is False, but the start is the base")
        if any(update.gated for _, update in updates_of(model, "default")):
            return  # there is no one ΔW to compare with
    tiny.close(start, tiny.logits(tiny.with_updates(model, base)), 1e-6, "the logits at the start and those of W + ΔW")


def check_merge(config: AdapterConfig) -> None:
    """Merged weights compute what the adapter computed."""
    model = tiny.trained(config)
    before = tiny.logits(model)
    model.merge_adapter(safe_merge=True)
    tiny.close(tiny.logits(model), before, 1e-5, "the logits merged and unmerged")
    with model.disable_adapter():
        tiny.same(tiny.logits(model), tiny.logits(tiny.llama()), "the logits merged, with the adapter disabled")
    merged = tiny.trained(config).merge_and_unload()
    tiny.close(tiny.logits(merged), before, 1e-5, "the logits of merge_and_unload and before")


def check_unmerge(config: AdapterConfig) -> None:
    """Unmerging gives back the base's weights and the adapter's output bit for bit."""
    model = tiny.trained(config)
    before = tiny.logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    for name, value in tiny.base_parameters(model).items():
        tiny.same(value, tiny.llama().state_dict()[name], f"the base's {name} after unmerging")
    tiny.same(tiny.logits(model), before, "the logits after unmerging")


def check_frozen(config: AdapterConfig) -> None:
    """AdamW with weight decay on all parameters changes neither the base nor what the method declares frozen."""
    model = tiny.adapted(config)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    tiny.train(model, list(model.parameters()))
    base = {id(value) for value in tiny.base_parameters(model).values()}
    stepped = {id(update.get_parameter(key)) for _, update in updates_of(model, "default") for key in update.stepped}
    for name, value in model.named_parameters():
        if id(value) in base or not value.requires_grad:
            tiny.require(value.grad is None, f"{name} is frozen and got a gradient")
            if id(value) not in stepped:
                tiny.same(value, start[name], f"{name}, which is frozen")
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, start[name])]
    tiny.require(moved, "three optimizer steps changed nothing")


def check_save(config: AdapterConfig) -> None:
    """A saved adapter loads onto a fresh base with the same logits.

    Nothing is decomposed while loading, except where a method leaves out of the file what it derives again.
    """
    model = tiny.trained(config)
    derives = any(update.unsaved for _, update in updates_of(model, "default"))
    decomposes = any(update.decomposes for _, update in updates_of(model, "default"))
    filed = nullcontext if derives else tiny.NoDecomposition
    # what derives may do so as late as in the first pass
    called = nullcontext if derives or decomposes else tiny.NoDecomposition
    with tempfile.TemporaryDirectory() as folder:
        with filed():
            model.save_pretrained(folder)
        for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
            with filed():
                loaded = PeftModel.from_pretrained(tiny.llama(), folder, **options)
            with called():
                tiny.same(tiny.logits(loaded), tiny.logits(model), f"the logits loaded with {options or 'no options'}")


def check_trainable_count(config: AdapterConfig) -> None:
    """As many parameters are trained as `trainable_count` says."""
    model = tiny.adapted(config)
    # not the options given: some are filled in from the model, or a rank read from the weight
    own = model.peft_config["default"]
    shapes = {layer.name: layer.kind.shape(layer.get_base_layer()) for layer in layers_of(model)}
    expected = own.shared_count(shapes)
    expected += sum(own.for_module(name).trainable_count(shape) for name, shape in shapes.items())
    found, _ = model.get_nb_trainable_parameters()
    tiny.require(found == expected, f"{found} parameters are trained, trainable_count says {expected}")


def check_mixing(config: AdapterConfig) -> None:
    """Two methods active at once add up layer by layer; each alone is as if the other were not there."""
    model = tiny.trained(config)
    alone = tiny.logits(model)
    model.add_adapter("other", _another(config))
    tiny.same(tiny.logits(model), alone, "the logits after a second method was added beside the active one")
    tiny.moved(model, "other")
    for layer in layers_of(model):
        x = tiny.layer_input(layer)
        with classes(model, [0, 1]) if tiny.reads_classes(model) else nullcontext():
            base, one, two, both = (tiny.layer_output(layer, names, x) for names in ([], ["default"], ["other"], _BOTH))
        tiny.close(one + two - base, both, 1e-5, f"the sum of two updates and both at once on {layer.name}")
    model.set_adapter("default")
    tiny.same(tiny.logits(model), alone, "the logits after switching to the other method and back")


def check_rows(config: AdapterConfig) -> None:
    """A batch whose rows have their own adapters equals the rows' separate passes."""
    model = tiny.trained(config)
    model.add_adapter("other", _another(config))
    tiny.moved(model, "other").eval()
    rows = ["default", "other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(**tiny.batch(model), adapter_names=rows).logits
        with model.disable_adapter():
            separate = {"__base__": model(**tiny.batch(model)).logits}
        for name in _BOTH:
            model.set_adapter(name)
            separate[name] = model(**tiny.batch(model)).logits
    expected = torch.stack([separate[name][row] for row, name in enumerate(rows)])
    tiny.close(mixed, expected, 1e-5, "the logits of a mixed batch and of separate passes")


def check_export(config: AdapterConfig) -> None:
    """Exported as a LoRA, stock PEFT computes the same logits."""
    model = tiny.trained(config)
    with tempfile.TemporaryDirectory() as folder:
        export_lora(model, f"{folder}/lora")
        stock = PeftModel.from_pretrained(tiny.llama(), f"{folder}/lora")
        tiny.require(not list(layers_of(stock)), "the export is no plain LoRA")
        tiny.close(tiny.logits(stock), tiny.logits(model), 1e-5, "the logits of the exported LoRA and of the adapter")


def check_accumulation(config: AdapterConfig) -> None:
    """The penalty's gradient enters once a step: the same for 1 x 4 and 4 x 1 rows, in transformers' own Trainer."""
    expected = tiny.penalty_gradients(tiny.precise(config))
    if not expected:
        return
    for accumulation in (1, 4):
        penalised, free = (dict(tiny.trainer_step(config, accumulation, on).named_parameters()) for on in (True, False))
        for name, gradient in expected.items():
            what = f"the penalty's gradient of {name} in a step of {accumulation} micro-batches and its formula"
            tiny.close(free[name] - penalised[name], gradient, 1e-6 * float(gradient.abs().max()), what)


def check_disable(config: AdapterConfig) -> None:
    """Disabled, the adapter leaves the base's logits bit for bit; enabled, it changes them."""
    model, base = tiny.trained(config), tiny.logits(tiny.llama())
    tiny.require(not torch.allclose(tiny.logits(model), base), "after training the model computes what its base does")
    with model.disable_adapter():
        tiny.same(tiny.logits(model), base, "the logits with the adapter disabled")
    tiny.same(tiny.logits(model.unload()), base, "the logits after unload")


def check_determinism(config: AdapterConfig) -> None:
    """In evaluation two passes are equal bit for bit, and a seed makes the start reproducible."""
    model = tiny.trained(config)
    tiny.same(tiny.logits(model), tiny.logits(model), "the logits of a second pass")
    twin = tiny.adapted(config).state_dict()
    for name, value in tiny.adapted(config).state_dict().items():
        tiny.same(value, twin[name], f"{name} of a second model from the same seed")


CHECKS: dict[str, Callable[[AdapterConfig], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_start,
        check_merge,
        check_unmerge,
        check_frozen,
        check_save,
        check_trainable_count,
        check_bfloat16,
        check_float16,
        check_checkpointing,
        check_compile,
        check_copies,
        check_mixing,
        check_rows,
        check_export,
        check_accumulation,
        check_copies,
        check_disable,
        check_determinism,
        check_start_at_base,
        check_adapter_dtype,
        check_dropout,
        check_plain_module,
        check_embedding,
        check_convolution,
        check_attention,
        check_weighted,
        check_base_values,
    )
}
"""Every check by its name."""


def _configuration(config: AdapterConfig | type[AdapterConfig], options: dict[str, Any]) -> AdapterConfig:
    own = isinstance(config, AdapterConfig)
    config = copy.deepcopy(config).changed(**options) if own else tiny.sized(config, **options)
    if config.target_modules is None:
        config.target_modules = tiny.targets_of(config)
    return config


def _another(config: AdapterConfig) -> AdapterConfig:
    chosen = KaSA if config.method == LoRA.method else LoRA
    # a feed-forward layer that is computed as a whole leaves no room in it
    inside = "up_proj" if "linear" in config.layer_kinds else "o_proj"
    return chosen(r=3, target_modules=["q_proj", inside])
