"""PEFT's own tests for custom models, run over Folklora's adapter methods.

    python benchmarks/peft_battery.py PEFT/tests [--methods lora kasa] [--only EXPRESSION] [--out FOLDER]

PEFT/tests is the folder of that name in a checkout of PEFT; it is not part of its wheel, and nothing of it is here.
Each method runs in a pytest of its own, which loads this file as a plugin: it puts our configuration in the place of
PEFT's in the tests' lists of parameters, and leaves the tests themselves as they are. Tests that take no
configuration of ours are left out. `docs/peft-battery.md` says what came out and why.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import types
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from peft_battery_reasons import explanation
from torch import Tensor, nn

import folklora
from folklora import tiny
from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.host.kinds import kind_of
from folklora.adapters.host.layer import FolkloraLayer
from folklora.adapters.host.targets import bare
from folklora.adapters.statistics import Statistics, shape_of

METHOD, RESULTS = "FOLKLORA_BATTERY_METHOD", "FOLKLORA_BATTERY_RESULTS"
# the custom models are tiny: the first of these sizes that fits all the layers of a test is taken
_RANKS: list[dict[str, Any]] = [{"r": 2}, {"r": 1}]
_SIZES: dict[str, list[dict[str, Any]]] = {
    "diffora": [{"r": 2, "shared_r": 2}, {"r": 1, "shared_r": 1}],
    "generative-adapter": [{"r": 4, "max_rank": 2, "hidden_size": 10}],
    "kasa": [*_RANKS, {"r": 1, "truncate": 0}],
    "kind": [{"learngenes": 1, "tailors": 1}, {"learngenes": 0, "tailors": 1}],
    "mixda": [{"reduction": 2, "gate_hidden": 4}, {"reduction": 1, "gate_hidden": 4}],
    "osft": [{}],
    "salt": [{"r": 1, "top": 1}],
    "smora": [{"r": 4, "k": 2}, {"r": 4, "k": 1}],
    "svfit": [{}],
    "vl-adapter": [{"reduction_factor": 2}, {"reduction_factor": 1}],
}
_LEFT_OUT = {"factorllm": "it adapts feed-forward layers as a whole, and none of the tests' models has one"}
_NOISE = 0.1


def _own_class(method: str) -> type:
    factory = next(found.factory for found in folklora.methods("adapters") if found.name == method)

    @dataclasses.dataclass
    class Battery(factory):
        """The method's configuration with what the tests ask of every one of PEFT's.

        Args:
            init_weights: False starts away from the base: noise is added to what is trained.
        """

        init_weights: bool = True

        def to_dict(self) -> dict[str, Any]:
            """The method's own options."""
            return {key: value for key, value in super().to_dict().items() if key != "init_weights"}

        def fit(self, model: nn.Module) -> None:
            """Choose sizes that fit the layers, and make the sources and draw the statistics that the method needs."""
            vars(self).update(_SIZES.get(method, _RANKS)[0] | tiny.example_sources(_without_adapters(model), self))
            super().fit(model)
            shapes = _shapes(model, self)
            self._choose_sizes(shapes)
            if self.needs:
                self.statistics = _drawn(shapes, sorted(self.needs))
            _let_name_classes(model)

        def _choose_sizes(self, shapes: dict[str, tuple[int, int]]) -> None:
            for options in _SIZES.get(method, _RANKS):
                vars(self).update(options)
                if not any(self.for_module(name).check(shape, name) for name, shape in shapes.items()):
                    return

        def update(self, *args: Any) -> Update:
            """At its start, or away from it."""
            update = super().update(*args)
            if not self.init_weights:
                frozen = update.frozen_parameters()
                with torch.no_grad():
                    for key, value in update.named_parameters():
                        if key not in frozen and value.requires_grad:
                            value += _NOISE * torch.randn_like(value)
            return update

    return Battery


def _shapes(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """The sizes of the layers that a configuration names, as far as the host can adapt them."""
    found = {}
    for name, module in model.named_modules():
        # the choice of layers may still be PEFT's
        named = config.target_modules is None or check_target_module_exists(config, name)
        if ".base_layer" not in name and named:
            with contextlib.suppress(TypeError):
                base = bare(module)
                found[name] = kind_of(base, name).shape(base)
    return found


def _without_adapters(model: nn.Module) -> nn.Module:
    """A copy of the base: a second adapter's sources are made of what the first one's were."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, (FolkloraLayer, ModulesToSaveWrapper)):
            base = bare(module) if isinstance(module, FolkloraLayer) else module.original_module
            twin.set_submodule(name, base)
    return twin


def _drawn(shapes: dict[str, tuple[int, int]], kinds: list[str]) -> Statistics:
    """Statistics of no data at all: the tests ask how a method is carried, not what it learns."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        found[name] = {}
        for kind in kinds:
            wanted = shape_of(kind, shape)
            value = torch.randn(wanted, generator=generator)
            found[name][kind] = value @ value.T if kind == "covariance" else value
    return Statistics(found)


def _let_name_classes(model: nn.Module) -> nn.Module:
    if not any(hook is _name_classes for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_name_classes, with_kwargs=True, prepend=True)
    return model


def _name_classes(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    # PEFT's tests name no classes
    return args, {**kwargs, "class_labels": [0]} if tiny.reads_classes(model) else kwargs


@dataclasses.dataclass
class _Refused:
    """In the place of a configuration that the method refuses: the tests that carry it fail with its reason."""

    reason: ValueError


Battery = _own_class(os.environ[METHOD]) if METHOD in os.environ else None
if Battery is not None:
    # so that models that hold one can be pickled
    Battery.__module__, Battery.__qualname__ = __name__, "Battery"


def _own_options(options: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration of PEFT's has a meaning for ours."""
    kept = {key: options[key] for key in ("target_modules", "modules_to_save", "target_parameters") if options.get(key)}
    if options.get("lora_dropout"):
        kept["dropout"] = options["lora_dropout"]
    if options.get("lora_bias"):
        kept["train_bias"] = True
    if False in (options.get("init_lora_weights"), options.get("init_weights")):
        kept["init_weights"] = False
    for key, value in kept.items():
        kept[key] = sorted(value) if isinstance(value, set) else value
    return kept


def _translated(value: Any, lora: type) -> Any:
    """PEFT's LoRA in a list of parameters, replaced; None where a row is of another of its methods."""
    if value is lora:
        return Battery
    if isinstance(value, lora):
        try:
            return Battery(**_own_options(value.to_dict()))
        except ValueError as error:
            return _Refused(error)
    if isinstance(value, (tuple, list)) and type(value) is tuple:
        found = tuple(_translated(part, lora) for part in value)
        of_peft = [part for part in value if _is_peft(part)]
        ours = [part for part in found if _is_ours(part)]
        return found if len(of_peft) == len(ours) and ours else None
    return None if _is_peft(value) else value


def _is_peft(value: Any) -> bool:
    from peft import PeftConfig

    if _is_ours(value):
        return False
    return isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig))


def _custom_models(rows: list[tuple]) -> list[tuple]:
    """Every custom model with every choice of its layers that the tests make for any of PEFT's methods, once."""
    found: dict[str, tuple] = {}
    for _, model, cls, options in rows:
        if cls.__name__ in ("LNTuningConfig", "TrainableTokensConfig"):
            continue  # they train norms and single tokens, and name no layer
        own = _own_options({key: value for key, value in options.items() if not key.startswith("init_")})
        if not own.keys() & {"target_modules", "target_parameters"}:
            continue  # a method that chooses all linear layers by itself
        name = " ".join([model, *(f"{key}={value}" for key, value in own.items())])
        name = re.sub(r"[\[\]'\"{}]", "", name)
        found.setdefault(name, (name, model, Battery, own))
    return list(found.values())


def _pairs(rows: list[tuple]) -> list[tuple]:
    """The cases of two adapters at once that PEFT has for its LoRA."""
    return [
        (name.replace("LoRA", "Folklora"), tuner, Battery, _own_options(first), _own_options(second))
        for name, tuner, cls, first, second in rows
        if tuner == "lora" and cls.__name__ == "LoraConfig"
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Put our configuration into the tests' lists, before they are collected."""
    folder = Path(config.invocation_params.args[0].partition("::")[0]).resolve().parent
    sys.path.insert(0, str(folder.parent))
    try:
        importlib.import_module("diffusers")
    except ImportError:
        # the tests' common part imports it for models that none of these tests takes
        sys.modules["diffusers"] = types.SimpleNamespace(StableDiffusionPipeline=None)
    names = ["tests.test_custom_models", "tests.testing_common"]
    pytest.register_assert_rewrite(*names)
    module = importlib.import_module(names[0])
    made = module.MockTransformerWrapper.from_pretrained
    # an adapter that is loaded has the method's own configuration
    module.MockTransformerWrapper.from_pretrained = staticmethod(lambda *a, **k: _let_name_classes(made(*a, **k)))
    module.TEST_CASES[:] = _custom_models(module.TEST_CASES)
    module.ALL_PEFT_CONFIG_CLASSES[:] = [Battery]
    module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = _pairs(module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES)
    shared = (module.TEST_CASES, module.ALL_PEFT_CONFIG_CLASSES, module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES)
    done = {id(rows) for rows in shared}
    for cls in vars(module).values():
        for function in vars(cls).values() if isinstance(cls, type) else ():
            for mark in getattr(function, "pytestmark", ()):
                rows = mark.args[1] if mark.name == "parametrize" else None
                if isinstance(rows, list) and id(rows) not in done:
                    done.add(id(rows))
                    if any(_is_peft(part) for row in rows for part in (row if isinstance(row, tuple) else (row,))):
                        rows[:] = [found for row in rows if (found := _translated(row, module.LoraConfig)) is not None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that take a configuration of ours."""
    items[:] = [
        item for item in items if any(map(_is_ours, getattr(getattr(item, "callspec", None), "params", {}).values()))
    ]


def _is_ours(value: Any) -> bool:
    return value is Battery or isinstance(value, (Battery, _Refused))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a test whose configuration the method refuses."""
    for value in getattr(getattr(item, "callspec", None), "params", {}).values():
        if isinstance(value, _Refused):
            raise value.reason


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how each test ended."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr or "")
        row = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome, "message": message}
        with open(os.environ[RESULTS], "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def run(method: str, tests: Path, out: Path, arguments: list[str]) -> None:
    """The tests over one method; how each ended goes into a file."""
    results = out / f"{method}.jsonl"
    results.unlink(missing_ok=True)
    here = Path(__file__).resolve()
    environment = {
        **os.environ,
        METHOD: method,
        RESULTS: str(results.resolve()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", str(tests / "test_custom_models.py"), "-p", here.stem, "-c", os.devnull]
    command += ["--rootdir", str(tests.parent), "-q", "-p", "no:cacheprovider", "--timeout=120"]
    # the other styles parse the tests' large file for every failure
    command += ["--tb=native"]
    with open(out / f"{method}.log", "w", encoding="utf-8") as log:
        subprocess.run([*command, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not results.exists():
        raise RuntimeError(f"no test ran; {out / method}.log says why")


def summary(method: str, rows: list[dict[str, str]]) -> str:
    """A row of the table, and a line for each reason that there is."""
    outcomes, reasons = Counter(row["outcome"] for row in rows), Counter()
    for row in rows:
        if row["outcome"] == "failed":
            reason = explanation(method, row["test"], row["message"])
            name = row["test"].partition("::")[2].partition("[")[0]
            reasons[reason or f"NOT EXPLAINED: {name}: {row['message'].splitlines()[0][:120]}"] += 1
    lines = [f"| {method} | {outcomes['passed']} | {outcomes['failed']} | {outcomes['skipped']} |"]
    return "\n".join([*lines, *(f"  {count:4d} {reason}" for reason, count in reasons.most_common())])


def main() -> None:
    """Run the tests over the methods asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder of PEFT's tests")
    parser.add_argument("--methods", nargs="+", default=[m.name for m in folklora.methods("adapters")])
    parser.add_argument("--out", type=Path, default=Path("peft-battery"), help="where the results go")
    parser.add_argument("--again", action="store_true", help="only say once more what the results in --out are")
    parser.add_argument("--only", default="", help="pytest's -k: an expression of names of tests")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for method in chosen.methods:
        if method in _LEFT_OUT:
            print(f"{method} is left out: {_LEFT_OUT[method]}")
            continue
        if not chosen.again:
            run(method, chosen.tests, chosen.out, ["-k", chosen.only] if chosen.only else [])
        rows = [json.loads(line) for line in (chosen.out / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()]
        print(summary(method, rows), flush=True)


if __name__ == "__main__":
    main()
