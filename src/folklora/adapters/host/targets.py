"""Which layers a configuration names, and what speaks against adapting them; in words, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.host.feed_forward import feed_forward_problems, layout_of
from folklora.adapters.host.kinds import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    LINEAR,
    TRANSPOSED,
    Kind,
    in_attention,
    kind_of,
    weight_matrices,
)
from folklora.adapters.host.layer import FolkloraLayer
from folklora.adapters.host.weights import chosen_weights, is_named, own_weights


def target_problems(config: AdapterConfig, name: str, base: nn.Module) -> list[str]:
    """What speaks against adapting a layer with these options; nothing if empty."""
    try:
        kind = kind_of(base, name)
    except TypeError as error:
        return [str(error)]
    if kind in (EXPERTS, ATTENTION):
        return _problems_of_several(config, kind, name, base)
    if kind.name not in config.layer_kinds:
        kinds = ", ".join(sorted(config.layer_kinds))
        return [f"{config.method} adapts {kinds} layers; '{name}' is a {type(base).__name__}"]
    if kind is FEED_FORWARD and (problems := feed_forward_problems(base, name)):
        return problems
    return config.for_module(name).check(kind.shape(base), name)


def all_linear(config: AdapterConfig, model: nn.Module) -> list[str]:
    """What "all-linear" stands for: every linear layer but the output head, those that are adapted already too."""
    chosen = set(_maybe_include_all_linear_layers(replace(config), model).target_modules)
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    # a part of torch's attention is adapted with the whole
    chosen = {name.rpartition(".")[0] if in_attention(model.get_submodule(name)) else name for name in chosen}
    computed = tuple(f"{name}." for name, _ in _computed_whole(model))
    chosen = {name for name in chosen if not (computed and name.startswith(computed))}
    # PEFT knows a layer that is adapted already only by a class name with "Linear" in it
    for name, module in model.named_modules():
        if isinstance(module, FolkloraLayer) and module is not head and module.kind in (LINEAR, TRANSPOSED):
            chosen.add(name)
    return sorted(chosen)


def problems_inside(config: AdapterConfig, model: nn.Module) -> list[str]:
    """A sentence on each target that is a part of a feed-forward layer whose output an adapter computes itself."""
    return [
        f"layer '{name}.{part}' is a part of '{name}', whose output an adapter on the model computes by slices of its "
        f"weights, past that layer: leave it out, or merge {config.method} into it before that adapter is added"
        for name, layer in _computed_whole(model)
        for part in layout_of(layer.get_base_layer()).names
        if check_target_module_exists(config, f"{name}.{part}")
    ]


def _computed_whole(model: nn.Module) -> Iterator[tuple[str, FolkloraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, FolkloraLayer) and module.kind is FEED_FORWARD:
            yield name, module


def bare(module: nn.Module) -> nn.Module:
    """The base layer, whether it is adapted already or not."""
    return module.get_base_layer() if isinstance(module, FolkloraLayer) else module


def named_weights(config: AdapterConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of which `target_parameters` names a weight."""
    for name, module in model.named_modules():
        keys = own_weights(bare(module)) if config.target_parameters and ".base_layer" not in name else ()
        if any(is_named(f"{name}.{key}", config.target_parameters) for key in keys):
            yield name, module


def _problems_of_several(config: AdapterConfig, kind: Kind, name: str, base: nn.Module) -> list[str]:
    what = f"the {kind.name} '{name}'"
    if "linear" not in config.layer_kinds:
        return [f"{config.method} adapts no linear layers, and {what} is a {type(base).__name__} made of them"]
    if config.needs:
        return [f"{config.method} needs statistics of each layer, which are hidden inside {what}: leave that out"]
    if config.dropout:
        return [f"{what} can have no adapter dropout, for the inputs are hidden inside: set dropout=0"]
    problems = []
    for key in chosen_weights(base, name, config):
        own, shape = config.for_module(f"{name}.{key}"), tuple(weight_matrices(base, key).shape[1:])
        found = own.check(shape, f"{name}.{key}")
        # a rank that is still to be read from the weight makes no difference here
        sized = own.changed(r=1) if getattr(own, "r", 1) is None else own
        if not found:
            found = _unstackable(config, sized.empty(shape), what)
        problems += found
        if found:
            break
    return problems


def _unstackable(config: AdapterConfig, update: Update, what: str) -> list[str]:
    """Why the updates of several matrices cannot be one; nothing if empty."""
    if update.gated or update.is_function:
        return [f"{config.method} reads each layer's input, which is hidden inside {what}: leave that out"]
    if update.is_dense:
        return [f"{config.method} changes entries of weights, for which there is no room in {what}: leave that out"]
    if type(config).shared is not AdapterConfig.shared or next(update.buffers(), None) is not None:
        return [
            f"{config.method} keeps more than each weight's own parameters, for which there is no room in {what}: "
            "leave that out"
        ]
    return []


def without_match(config: AdapterConfig, model: nn.Module) -> list[str]:
    """A sentence on each name among the targets that nothing in the model bears."""
    problems = []
    if isinstance(config.target_modules, list):
        names = [name for name, _ in model.named_modules()]
        lost = [target for target in config.target_modules if not any(is_named(n, [target]) for n in names)]
        problems += [f"target module '{target}' matches no layer; {_candidates(config, model)}" for target in lost]
    known = [f"{name}.{key}" for name, module in model.named_modules() for key in own_weights(module)]
    for target in config.target_parameters or []:
        if not any(is_named(name.replace(".base_layer", ""), [target]) for name in known):
            there = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in known})) or "none"
            problems.append(f"target parameter '{target}' matches no weight; weights here: {there}")
    return problems


def nothing_matched(config: AdapterConfig, model: nn.Module) -> str:
    """What to say where the targets match no layer at all."""
    what = f"target_modules={config.target_modules!r} matches no layer of {type(model).__name__}"
    return f"{what}; {_candidates(config, model)}"


def _candidates(config: AdapterConfig, model: nn.Module) -> str:
    names = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if _adaptable(config, name, module)}
    )
    return f"layers that can be adapted: {', '.join(names)}"


def _adaptable(config: AdapterConfig, name: str, module: nn.Module) -> bool:
    try:
        kind = kind_of(bare(module), name)
    except TypeError:
        return False
    # those of several weights are made of linear ones
    own = "linear" if kind in (EXPERTS, ATTENTION) else kind.name
    return own in config.layer_kinds and ".base_layer" not in name and name != ""


def check_statistics(config: AdapterConfig, targets: dict[str, nn.Module]) -> None:
    """Refuse targets that the configuration carries no fitting statistics for.

    Raises:
        ValueError: With every problem found, or how to calibrate.
    """
    if config.statistics is None:
        wanted = ", ".join(f'"{kind}"' for kind in sorted(config.needs))
        raise ValueError(
            f"{config.method} must know the {' and '.join(sorted(config.needs))} of each layer beforehand: pass "
            f"config.calibrated(folklora.calibrate(model, batches, {{{wanted}}}, target_modules=config))"
        )
    lost = [name for name in targets if name not in config.statistics]
    problems = [f"the statistics have no layer '{name}'" for name in lost]
    if lost:
        problems.append(f"layers that they have: {', '.join(config.statistics)}")
    for name, base in targets.items():
        if name not in lost:
            shape = kind_of(base, name).shape(base)
            problems += config.for_module(name).check_statistics(config.statistics[name], shape, name)
    if problems:
        raise ValueError("\n".join(problems))


def with_chosen_rank(
    config: AdapterConfig, own: AdapterConfig, target: nn.Module, name: str, waiting: bool
) -> AdapterConfig:
    """The options for one layer with the rank that the method reads from its weight, which `config` notes down."""
    if waiting or type(own).chosen_rank is AdapterConfig.chosen_rank:
        return own
    base = bare(target)
    if not kind_of(base, name).has_matrix:
        found = {f"{name}.{key}": weight_matrices(base, key) for key in chosen_weights(base, name, config)}
    else:
        found = {name: [kind_of(base, name).matrix(base)]}
    ranks = {key: [own.chosen_rank(matrix) for matrix in matrices] for key, matrices in found.items()}
    if any(None in values for values in ranks.values()):
        return own
    # anchored: PEFT matches a key against the end of a name
    config.rank_pattern = {
        **{f"^{re.escape(key)}": max(values) for key, values in ranks.items()},
        **config.rank_pattern,
    }
    return replace(own, rank_pattern=config.rank_pattern).for_module(name)
