"""MixDA: domain adapters beside the second matrix of a feed-forward layer, and a gate that mixes them with it."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.bottlenecks import Dense
from folklora.adapters.choices import check_choices
from folklora.adapters.host.blocks import block_of
from folklora.adapters.host.kinds import evenly_spaced, kind_of, same_sample
from folklora.adapters.host.targets import bare
from folklora.stream.files import read_json

_CHOICES = {
    "gate": ("softmax", "sigmoid"),
    "gate_reads": ("last", "mean", "token"),
    "sample_target": ("layer", "adapter"),
}
_SECOND = ("output.dense", "down_proj", "fc2", "mlp.c_proj", "wo", "w2", "lin2", "fc_out", "dense_4h_to_h")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_VALUES, _LAYER = "adapter_model.safetensors", "base_model.model.{}.folklora_updates."


@dataclass
class MixDA(AdapterConfig):
    r"""A mixture of domain adapters, which stand beside a feed-forward layer's second matrix and learn from raw text.

    The second matrix of a frozen feed-forward layer gives v = W₂ u + b₂ of the hidden units u [positions, f]. Domain
    adapter k reads u too, a_k(u) = U_k gelu(D_k u + b) + c with D_k [f/ρ, f] uniform as a linear layer's, U_k [d, f/ρ]
    and both biases 0 at the start. A gate, an MLP with `gate_layers` hidden layers of width `gate_hidden`, mixes them:
        g = softmax(MLP(u of the last real token))     [rows, 1, n + 1], one weight a branch for the whole row
        f = Σ_k g_k a_k(u) + g_{n+1} v                 in the place of v, before the block's dropout, residual and norm
    At the start a_k = 0 and g_{n+1} is about 1/(n + 1), so the base is scaled, not kept; `gate_bias` on the last branch
    lessens that (4 gives it 0.98). A gate by row and nonlinear adapters: it neither merges nor exports.

    Stage 1, for each domain by itself (n = 1): adapter and gate are trained in the chosen blocks by
        L = 0.5 L_K + L_S            `folklora.adapters.knowledge.domain_loss(model, knowledge, sample)`
    L_K is the cross-entropy of the masked words of the domain's sentences, a mean over words, then over sentences
    (`mask_slots` masks what is named; a causal model predicts it). L_S keeps general text: the mean square between the
    output of each chosen block with and without the adapter, of one input. With `sample_target="adapter"`, as in the
    paper's text, it is between a_k(u) and v: the adapter imitates what the layer knows. Dropout of the frozen model
    rests in this stage, as in the authors' code.
    Stage 2: `domains={"law": "runs/law", ...}` reads n such adapters, which stay frozen, and trains a new gate over
    n + 1 branches, beside a task adapter of any method and a head:
        model.add_adapter("task", VLAdapter(...)); model.base_model.set_adapter(["default", "task"])
    What is saved holds the domain adapters: their folders are needed no more.
    f d/ρ + f/ρ + d f/ρ + d trained parameters of an adapter a layer, and the gate's.

    Departures: the authors read position -1 for the gate, which is padding in a batch padded on the right, and we the
    last real token. Their code and their text differ in the gate (the text has independent sigmoids) and in L_S; the
    code's are the defaults. The targets of L_S get no gradient, theirs do. A task adapter that stands behind the layer
    (Pfeiffer's) reads v here, not f. The learned weights of general samples and the retriever are left out. A gate
    that reads the last token or the mean lets early positions of a causal model see later ones: take
    `gate_reads="token"` there, each position's own.

    Source: Diao, Xu, Xu, Wang, Zhang, "Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge to
    Pre-trained Language Models' Memories", ACL 2023, arXiv 2306.05406. Defaults are those of its scripts, which adapt
    blocks 7 and 11 (`layers_to_transform`; None takes all).

    When to choose:
        There is unlabelled text of a domain and few labelled examples of the task, or several domains are to be mixed.
        For one task with enough examples a LoRA costs less and merges. The gate adds an MLP a layer to each pass.

    Equation:
        f = \sum_{k=1}^{n} g_k \left( U_k \, \mathrm{gelu}(D_k u + b_k) + c_k \right) + g_{n+1} (W_2 u + b_2)
        L = \tfrac{1}{2} L_K + L_S, \quad L_S = \overline{\left( h(f) - h(v) \right)^2}

    Example:
        import torch
        from peft import get_peft_model
        from folklora import LoRA, MixDA, tiny
        from folklora.adapters.knowledge import domain_loss

        general, domain = tiny.batch(), tiny.labelled_batch()
        options = {"gate_hidden": 16, "gate_reads": "token", "reduction": 4}
        for name in ("law", "medicine"):  # each with its own text
            model = get_peft_model(tiny.llama(), MixDA(**options))
            trained = [value for value in model.parameters() if value.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.05)
            for _ in range(2):
                domain_loss(model, domain, general).backward()
                optimizer.step()
                optimizer.zero_grad()
            model.save_pretrained(name)
        model = get_peft_model(tiny.llama(), MixDA(domains={"law": "law", "medicine": "medicine"}, **options))
        model.add_adapter("task", LoRA(r=4, target_modules=["q_proj", "v_proj"]))
        model.base_model.set_adapter(["default", "task"])
        model(**tiny.labelled_batch()).loss.backward()

    Args:
        domains: Folder of the trained adapter of each domain, by its name; empty trains one of its own.
        reduction: ρ; of adapters that are read: theirs.
        gate: "softmax", or a "sigmoid" for each branch.
        gate_reads: u of the "last" real token of a row, their "mean", or of each "token" for itself.
        gate_hidden: Width of the gate's hidden layers.
        gate_layers: How many there are.
        gate_dropout: Dropout before each of the gate's linear layers.
        gate_bias: Start of the gate's bias on the layer's own branch.
        sample_target: What L_S compares: outputs of the "layer" (its block), or the "adapter" with v.
        knowledge_weight: Weight of L_K.
    """

    method: str = "mixda"
    domains: dict[str, str] = field(default_factory=dict)
    reduction: int = 16
    gate: Literal["softmax", "sigmoid"] = "softmax"
    gate_reads: Literal["last", "mean", "token"] = "last"
    gate_hidden: int = 768
    gate_layers: int = 3
    gate_dropout: float = 0.2
    gate_bias: float = 0.0
    sample_target: Literal["layer", "adapter"] = "layer"
    knowledge_weight: float = 0.5

    paper: ClassVar[str] = "Diao et al. 2023, arXiv 2306.05406"
    trains: ClassVar[str] = "domain adapters in feed-forward layers, and gates that mix them"
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    module: ClassVar[str] = ""
    """Name of the layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, _CHOICES)
        if self.dropout or self.rank_pattern or self.alpha_pattern:
            raise ValueError("MixDA takes no dropout, rank_pattern or alpha_pattern: it has no rank and no alpha")
        for name in ("reduction", "gate_hidden", "gate_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.gate_dropout < 1 or self.knowledge_weight < 0:
            raise ValueError(
                "gate_dropout must be at least 0 and below 1, and knowledge_weight at least 0, not "
                f"{self.gate_dropout} and {self.knowledge_weight}"
            )
        # the order of the branches; a saved configuration is sorted too
        self.domains = {name: str(folder) for name, folder in sorted(self.domains.items())}

    @property
    def branches(self) -> int:
        """n."""
        return max(1, len(self.domains))

    def fit(self, model: nn.Module) -> None:
        """Choose the second matrices of feed-forward layers where none are named, or those that the domains adapt.

        Raises:
            ValueError: There are none, or a domain's adapter is of another method, layers, width or base.
            FileNotFoundError: A domain's folder holds no adapter.
        """
        if self.target_modules is not None and (self.restoring or not self.domains):
            return
        if self.domains:
            self._fit_to_domains(model)
        else:
            self.target_modules = list(_second_matrices(model, self.layers_to_transform))
            if not self.target_modules:
                raise ValueError(
                    f"no layer of {type(model).__name__} that is chosen ends in one of {', '.join(_SECOND)}, outside "
                    "attention; name the second matrices of its feed-forward layers as target_modules"
                )

    def _fit_to_domains(self, model: nn.Module) -> None:
        kept = {name: _options(name, folder) for name, folder in self.domains.items()}
        first, *others = kept.values()
        for key in ("target_modules", "reduction"):
            if any(other[key] != first[key] for other in others):
                said = "; ".join(f"{name}: {options[key]}" for name, options in kept.items())
                raise ValueError(f"the domains' adapters differ in {key}, and are mixed layer by layer: {said}")
        self.target_modules, self.reduction = first["target_modules"], first["reduction"]
        modules = {key: bare(module) for key, module in model.named_modules()}
        for name, folder in self.domains.items():
            for layer, sample in _samples(folder).items():
                if layer not in modules or not _fits(modules[layer], layer, sample):
                    raise ValueError(f"the adapter of domain '{name}' was made for another base model ('{layer}')")

    def for_module(self, name: str) -> MixDA:
        """The options for one layer, which know its name."""
        own = copy.copy(super().for_module(name))
        own.module = name
        return own

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """The units must be at least ρ."""
        if shape[1] < self.reduction:
            return [f"reduction {self.reduction} is above {shape[1]}, the inputs of layer '{name}'"]
        return []

    def update(self, weight: Tensor) -> MixDAUpdate:
        """A new gate, with a new adapter or the domains'."""
        update = MixDAUpdate(self, tuple(weight.shape))
        for adapter, folder in zip(update.adapters, self.domains.values(), strict=False):
            adapter.load_state_dict(_values(folder, self.module))
        return update.to(weight.device)

    def empty(self, shape: tuple[int, int]) -> MixDAUpdate:
        """The same shapes, to be filled."""
        return MixDAUpdate(self, shape)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """The gate's, and those of an adapter that is none of the `domains`."""
        (out, units), hidden = shape, self.gate_hidden
        inner = units // self.reduction
        gate = Dense.count(units, hidden) + (self.gate_layers - 1) * Dense.count(hidden, hidden)
        gate += Dense.count(hidden, self.branches + 1)
        return gate + (0 if self.domains else Dense.count(units, inner) + Dense.count(inner, out))


class DomainAdapter(nn.Module):
    """a(u) = U gelu(D u + b) + c with D [inner, units], U [out, inner]."""

    def __init__(self, units: int, inner: int, out: int) -> None:
        super().__init__()
        self.down, self.up = Dense(units, inner, "linear"), Dense(inner, out, "zero")
        nn.init.zeros_(self.down.bias)

    def forward(self, u: Tensor) -> Tensor:
        """[..., units] -> [..., out]."""
        return self.up(F.gelu(self.down(u)))


class MixDAUpdate(Update):
    """The domain adapters beside one second matrix, and the gate's linear layers."""

    gated: ClassVar[bool] = True
    depends_on: ClassVar[str] = "each row's hidden units, and not linearly"
    is_function: ClassVar[bool] = True
    starts_at_base = False

    def __init__(self, config: MixDA, shape: tuple[int, int]) -> None:
        super().__init__()
        out, units = shape
        self.config = config
        self.needs_full_sequence = config.gate_reads != "token"
        self.adapters = nn.ModuleList(
            DomainAdapter(units, units // config.reduction, out) for _ in range(config.branches)
        )
        widths = [units, *[config.gate_hidden] * config.gate_layers, config.branches + 1]
        self.gate = nn.ModuleList(Dense(columns, rows, "linear") for columns, rows in itertools.pairwise(widths))
        with torch.no_grad():
            self.gate[-1].bias[-1] += config.gate_bias

    def frozen_parameters(self) -> frozenset[str]:
        """Adapters that were read from the domains' folders."""
        frozen = dict(self.adapters.named_parameters(prefix="adapters")) if self.config.domains else {}
        return frozenset(frozen)

    def weights(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """g [rows, 1, n + 1], or [rows, positions, n + 1] where each token has its own; the layer's own branch last."""
        z = self._read(u, mask)
        for number, layer in enumerate(self.gate):
            z = layer(F.dropout(torch.relu(z) if number else z, self.config.gate_dropout, self.training))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z.softmax(-1) if self.config.gate == "softmax" else z.sigmoid()

    def _read(self, u: Tensor, mask: Tensor | None) -> Tensor:
        """What the gate reads of u [rows, positions, units]; without positions each input is a row."""
        if self.config.gate_reads == "token" or u.dim() < 3:
            return u
        if mask is None:
            return u[:, -1:] if self.config.gate_reads == "last" else u.mean(1, keepdim=True)
        real = (mask != 0).to(u.dtype).unsqueeze(-1)
        if self.config.gate_reads == "mean":
            return (real * u).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        places = torch.arange(u.shape[1], device=u.device)
        last = torch.where(mask != 0, places, 0).amax(1)
        return u.gather(1, last.view(-1, 1, 1).expand(-1, 1, u.shape[-1]))

    def function(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """f - v, of the units x and the layer's own output y = v."""
        *parts, own = self.weights(x, mask).to(y.dtype).split(1, dim=-1)
        mixed = sum(g * adapter(x) for g, adapter in zip(parts, self.adapters, strict=True))
        return mixed.to(y.dtype) + (own * y - y)


def _second_matrices(model: nn.Module, blocks: list[int] | int | None) -> Iterator[str]:
    chosen = {blocks} if isinstance(blocks, int) else None if blocks is None else set(blocks)
    for name, module in model.named_modules():
        if not any(f".{name}".endswith(f".{ending}") for ending in _SECOND) or _ATTENTION.search(name):
            continue
        linear = isinstance(getattr(bare(module), "weight", None), Tensor)
        if linear and (chosen is None or int(block_of(name).rpartition(".")[2]) in chosen):
            yield name.replace(".base_layer", "")


def _options(name: str, folder: str) -> dict[str, Any]:
    file = Path(folder) / "adapter_config.json"
    if not file.is_file() or not (Path(folder) / _VALUES).is_file():
        raise FileNotFoundError(f"the folder of domain '{name}', {folder}, holds no adapter ({file.name}, {_VALUES})")
    options = read_json(file)
    if options.get("method") != MixDA.method or options["domains"]:
        raise ValueError(f"the folder of domain '{name}', {folder}, holds no MixDA adapter of its first stage")
    return options


def _samples(folder: str) -> dict[str, Tensor]:
    """Samples of the base weights that an adapter was made for, by layer."""
    head, tail = _LAYER.split("{}")[0], _LAYER.split("{}")[1] + "base_sample"
    with safe_open(Path(folder) / _VALUES, framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys() if key.endswith(tail)}  # noqa: SIM118
    return {key.removeprefix(head).removesuffix(tail): value.float() for key, value in found.items()}


def _fits(base: nn.Module, layer: str, sample: Tensor) -> bool:
    """Whether a sample is of this base weight; a weight that is not there yet passes."""
    weight = kind_of(base, layer).matrix(base)
    return weight.is_meta or same_sample(evenly_spaced(weight), sample)


def _values(folder: str, layer: str) -> dict[str, Tensor]:
    """The values of a domain's adapter on one layer."""
    prefix = _LAYER.format(layer) + "adapters.0."
    with safe_open(Path(folder) / _VALUES, framework="pt") as file:
        return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
