"""VL-Adapter: bottleneck adapters after the sublayers of an encoder-decoder, shared across tasks or one a task."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.bottlenecks import ACTIVATIONS, Dense, Generated, Kronecker
from folklora.adapters.choices import check_choices
from folklora.adapters.host.blocks import block_of
from folklora.adapters.host.layer import layers_of
from folklora.adapters.vision import VisualEmbedding

_CHOICES = {
    "form": ("adapter", "compacter", "hyperformer"),
    "sharing": ("single", "multiple", "down", "up"),
    "start": ("zero", "normal", "linear"),
    "activation": tuple(ACTIVATIONS),
}
_SITES = ("out_proj", "fc2", "SelfAttention.o", "EncDecAttention.o", "wo")
_CROSS = re.compile(r"encoder_attn|encdecattention|cross_?att", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass
class VLAdapter(AdapterConfig):
    r"""Bottleneck adapters for several vision-and-language tasks on one frozen encoder-decoder.

    A site is the last linear layer of a sublayer, y = W x + b with d outputs; then the adapter adds
        y + W_u gelu(W_d y + b_d) + b_u,  W_d [d/ρ, d], W_u [d, d/ρ], gelu in its tanh form
    before dropout, the block's residual and its norm. Sites are by default the outputs of self-attention, attention
    to the encoder, and the feed-forward layer. A nonlinear function of y is no ΔW: it neither merges nor exports.
    What is added reads the base layer's own y, so that adapters of other methods on the layer add up with it.
    `form="compacter"`: W_d, W_u are Σ_i C_i ⊗ W_i with n terms, n³ + d (d/ρ)/n numbers a matrix.
    `form="hyperformer"`: for each of encoder and decoder a network makes the weights of all its sites from trained
    embeddings of task and block (`bottlenecks.Generated`); the network is held by the stack's first site.
    Tasks: `sharing="single"` is one adapter a site for all tasks; "multiple" is one a task; "down" and "up" are one a
    task of which all hold the same W_d, b_d (or W_u, b_u). Except with "single" or one task, `folklora.use_task(model,
    "vqa")` says which task a batch is of. Sites never share with one another except in Hyperformer.
    2 d (d/ρ) + d/ρ + d trained parameters a site and adapter.
    On the outputs of any model's feed-forward layers, `activation="relu"`, `reduction_factor=16`, `start="normal"` is
    Pfeiffer et al.'s adapter, but that theirs reads y after the block's residual and norm: the first stage of
    `AdapterFusion` and `ScaLearn`, which compose adapters of one site and task (not Hyperformers).

    Images: `folklora.VisionLanguageModel` puts projected image features behind the text in the encoder; its visual
    embedding is trained in full and saved beside the adapter (`modules_to_save`), as the layer norms are with
    `train_layer_norms`, the paper's setting. A trained share of 4.18 % of BART-base is then the paper's.

    `start="zero"` sets W_u = b_u = 0, so that the first step sees the base. The authors' start does not: "normal" is
    theirs on BART (and the published one of the other two forms), "linear" theirs on T5. The optional layer norms in
    the adapter, off by default there, and Compacter's C shared by all sites are left out. A Hyperformer cannot be
    sharded by FSDP2, whose blocks each hold their own parameters.

    Source: Sung, Cho, Bansal, "VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks", CVPR
    2022, arXiv 2112.06825; Houlsby et al. 2019, arXiv 1902.00751, and Pfeiffer et al. 2021, arXiv 2005.00247 (adapter);
    Karimi Mahabadi et al. 2021, arXiv 2106.04647 (Compacter) and arXiv 2106.04489 (Hyperformer).

    When to choose:
        One frozen generator must serve several tasks on images, or a nonlinear adapter is wanted. The single form is
        the paper's best at a quarter of the parameters. Where the weights must be merged or served without extra
        layers, take LoRA.

    Equation:
        y \leftarrow y + W_u \, \mathrm{gelu}(W_d\, y + b_d) + b_u
        W_d = \sum_{i=1}^{n} C_i \otimes W_i \quad \text{(Compacter)}

    Example:
        import torch
        from peft import get_peft_model
        from folklora import VisionLanguageModel, VLAdapter, tiny, use_task

        base = VisionLanguageModel(tiny.bart(), features=10)
        model = get_peft_model(base, VLAdapter(tasks=["vqa", "caption"], sharing="down", train_layer_norms=True))
        model.print_trainable_parameters()
        use_task(model, "caption")
        text = tiny.batch()["input_ids"]
        model(input_ids=text, features=torch.randn(4, 36, 10), labels=text).loss.backward()

    Args:
        form: "adapter", "compacter" or "hyperformer".
        sharing: "single", "multiple", "down" or "up".
        tasks: Names of the tasks.
        reduction_factor: ρ.
        bottleneck_size: Inner width, in the place of d/ρ; None takes that.
        activation: "gelu" or "relu".
        start: "zero", "normal" or "linear".
        hypercomplex_division: n of Compacter; divides d and d/ρ.
        factor_rank: Rank of Compacter's W_i; None trains them in full.
        embedding_size: Width of Hyperformer's embeddings.
        hyper_hidden: Width of its hidden layer.
        projected_size: Width of what its generators read.
        z_penalty: λ of the penalty λ · mean over sites of mean(gelu(W_d y + b_d)²).
        train_layer_norms: Train all layer norms of the model too, in copies of their own.
    """

    method: str = "vl-adapter"
    form: Literal["adapter", "compacter", "hyperformer"] = "adapter"
    sharing: Literal["single", "multiple", "down", "up"] = "single"
    tasks: list[str] = field(default_factory=lambda: ["default"])
    reduction_factor: int = 8
    bottleneck_size: int | None = None
    activation: Literal["gelu", "relu"] = "gelu"
    start: Literal["zero", "normal", "linear"] = "zero"
    hypercomplex_division: int = 2
    factor_rank: int | None = None
    embedding_size: int = 512
    hyper_hidden: int = 128
    projected_size: int = 8
    z_penalty: float = 0.0
    train_layer_norms: bool = False

    paper: ClassVar[str] = "Sung et al. 2022, arXiv 2112.06825"
    trains: ClassVar[str] = "bottleneck adapters, a visual embedding, layer norms"
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, _CHOICES)
        if self.dropout or self.rank_pattern or self.alpha_pattern:
            raise ValueError("VLAdapter takes no dropout, rank_pattern or alpha_pattern: it has no rank and no alpha")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be at least one name, each once, not {self.tasks}")
        if self.form != "adapter" and self.start == "linear":
            raise ValueError(f'start="linear" is for form="adapter"; {self.form} starts by "zero" or "normal"')
        if self.form == "hyperformer" and self.sharing != "single":
            raise ValueError("a Hyperformer shares one network across tasks: leave sharing at single")
        for name in ("reduction_factor", "hypercomplex_division", "embedding_size", "hyper_hidden", "projected_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("factor_rank", "bottleneck_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or None, not {getattr(self, name)}")
        if self.z_penalty < 0:
            raise ValueError(f"z_penalty must be at least 0, not {self.z_penalty}")

    def fit(self, model: nn.Module) -> None:
        """Choose the sites where none are named; train visual embeddings, and norms where asked for, in full."""
        names = [name for name, _ in model.named_modules()]
        if self.target_modules is None:
            self.target_modules = [site for site in _SITES if any(f".{name}".endswith(f".{site}") for name in names)]
            if not self.target_modules:
                raise ValueError(
                    f"no sublayer of {type(model).__name__} ends in one of {', '.join(_SITES)}; name its last linear "
                    "layers as target_modules"
                )
        whole = list(_trained_whole(model, self.train_layer_norms))
        if whole:
            self.modules_to_save = sorted({*(self.modules_to_save or []), *whole})

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """The width must be large enough for ρ and divide as Compacter needs it; a Hyperformer needs blocks."""
        width, n = shape[0], self.hypercomplex_division
        if not self.bottleneck(shape):
            return [f"reduction_factor {self.reduction_factor} is above {width}, the outputs of layer '{name}'"]
        if self.form == "compacter" and (width % n or self.bottleneck(shape) % n):
            return [
                f"hypercomplex_division {n} must divide {width}, the outputs of layer '{name}', and the bottleneck "
                f"{self.bottleneck(shape)}"
            ]
        if self.form == "hyperformer":
            try:
                block_of(name)
            except ValueError as error:
                return [f"{error}, and a Hyperformer makes its weights by block"]
        return []

    def update(self, weight: Tensor) -> VLAdapterUpdate:
        """New adapters for one site."""
        return VLAdapterUpdate(self, tuple(weight.shape)).to(weight.device)

    def empty(self, shape: tuple[int, int]) -> VLAdapterUpdate:
        """The same shapes, to be filled."""
        return VLAdapterUpdate(self, shape)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """Of the site's own adapters; a Hyperformer's sites have none (see `shared_count`)."""
        if self.form == "hyperformer":
            return 0
        width, inner = shape[0], self.bottleneck(shape)
        options = () if self.form == "adapter" else (self.hypercomplex_division, self.factor_rank)
        kind = Dense if self.form == "adapter" else Kronecker
        return self.copies("down") * kind.count(width, inner, *options) + self.copies("up") * kind.count(
            inner, width, *options
        )

    def shared_count(self, layers: dict[str, tuple[int, int]]) -> int:
        """Of the Hyperformers' networks, one a stack of blocks."""
        if self.form != "hyperformer":
            return 0
        stacks: dict[str, list[tuple[str, str, tuple[int, int]]]] = defaultdict(list)
        for name, shape in layers.items():
            stack, block, kind = _site(name)
            stacks[stack].append((block, kind, shape))
        return sum(
            Generated.count(
                sites[0][2][0],
                self.bottleneck(sites[0][2]),
                len(self.tasks),
                len({block for block, _, _ in sites}),
                len({kind for _, kind, _ in sites}),
                self.generator_sizes,
            )
            for sites in stacks.values()
        )

    def bottleneck(self, shape: tuple[int, int]) -> int:
        """The inner width at a site whose weight is of `shape` (d, in)."""
        return self.bottleneck_size or shape[0] // self.reduction_factor

    def copies(self, side: str) -> int:
        """How many projections "down" or "up" a site holds."""
        return 1 if self.sharing in ("single", side) else len(self.tasks)

    @property
    def generator_sizes(self) -> tuple[int, int, int]:
        """Widths of a Hyperformer's embeddings, its hidden layer, and what its generators read."""
        return self.embedding_size, self.hyper_hidden, self.projected_size


class VLAdapterUpdate(Update):
    """The adapters of one site: `down` and `up` hold one projection, or one a task."""

    gated: ClassVar[bool] = True
    depends_on: ClassVar[str] = "the layer's output, and not linearly"
    is_function: ClassVar[bool] = True

    def __init__(self, config: VLAdapter, shape: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.width, self.inner = config, shape[0], config.bottleneck(shape)
        self.starts_at_base = config.start == "zero"
        self._penalty: Tensor | None = None
        if config.form != "hyperformer":
            down = "normal" if config.start == "zero" else config.start
            self.down = nn.ModuleList(
                self._projection(self.width, self.inner, down) for _ in range(config.copies("down"))
            )
            self.up = nn.ModuleList(
                self._projection(self.inner, self.width, config.start) for _ in range(config.copies("up"))
            )

    def __getstate__(self) -> dict[str, Any]:
        # a penalty that nobody took hangs on the last pass's graph, which can neither be copied nor pickled
        return {**self.__dict__, "_penalty": None}

    def _projection(self, columns: int, out: int, start: str) -> nn.Module:
        config = self.config
        if config.form == "adapter":
            return Dense(columns, out, start)
        return Kronecker(columns, out, start, config.hypercomplex_division, config.factor_rank)

    def placed(self, layer: Any, adapter_name: str) -> None:
        """Note the call's context; find the Hyperformer of the stack, or hold it as the first of its sites."""
        self.context = layer.context
        if self.config.form != "hyperformer":
            return
        self.stack, self.block, self.kind = _site(layer.name)
        first = next((other for other in layer.updates_elsewhere(adapter_name) if other.stack == self.stack), None)
        if first is None:
            config = self.config
            self.generated = Generated(self.width, self.inner, len(config.tasks), config.start, config.generator_sizes)
        elif first.width != self.width:
            raise ValueError(
                f"a Hyperformer makes adapters of one width, but layer '{layer.name}' has {self.width} outputs and "
                f"others of '{self.stack}' have {first.width}"
            )
        # in a tuple, so that it is a part of the first site alone: trained, saved and counted once
        self._network = (self.generated if first is None else first.network,)
        self.network.make_room(self.block, self.kind)

    @property
    def network(self) -> Generated:
        """The Hyperformer of the site's stack."""
        return self._network[0]

    def adapter(self, task: str | None = None) -> tuple[nn.Module, nn.Module]:
        """The projections (down, up) of a task; of the one that `use_task` named by default."""
        number = self._task(task)
        return self.down[number % len(self.down)], self.up[number % len(self.up)]

    def function(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """W_u gelu(W_d y + b_d) + b_u, or with relu."""
        activation = ACTIVATIONS[self.config.activation]
        if self.config.form == "hyperformer":
            made = self.network.weights(self._task(), self.block, self.kind)
            made = {name: value.to(y.dtype) for name, value in made.items()}
            z = activation(F.linear(y, made["down"], made["down_bias"]))
            added = F.linear(z, made["up"], made["up_bias"])
        else:
            down, up = self.adapter()
            z = activation(down(y))
            added = up(z)
        if self.training and self.config.z_penalty > 0:
            self._penalty = self.config.z_penalty * z.float().square().mean()
        return added.to(y.dtype)

    def activation_penalty(self) -> Tensor | None:
        """λ mean(z²) of the last forward pass in training mode; taken once."""
        penalty, self._penalty = self._penalty, None
        return penalty

    def _task(self, task: str | None = None) -> int:
        names = self.config.tasks
        if len(names) == 1 or (self.config.sharing == "single" and self.config.form != "hyperformer"):
            return 0
        task = self.context.told.get("task") if task is None else task
        if task not in names:
            said = "none was named" if task is None else f"'{task}' is none of them"
            raise ValueError(
                f"this VLAdapter has adapters for the tasks {', '.join(names)}, and {said}: "
                f'folklora.use_task(model, "{names[0]}") says which one a batch is of'
            )
        return names.index(task)


def use_task(model: nn.Module, task: str | None) -> None:
    """Say which task the coming batches are of, until another is named.

    Args:
        model: A model with a `VLAdapter` of several tasks.
        task: The task; None names none.

    Raises:
        ValueError: No adapter on the model knows the task.
    """
    layers = list(layers_of(model))
    updates = [update for layer in layers for update in layer.folklora_updates.values()]
    known = {name for update in updates if isinstance(update, VLAdapterUpdate) for name in update.config.tasks}
    if task is not None and task not in known:
        raise ValueError(
            f"no VLAdapter of the model has a task '{task}'; there are {', '.join(sorted(known)) or 'none'}"
        )
    for layer in layers:
        layer.context.told = {**layer.context.told, "task": task}


def _site(name: str) -> tuple[str, str, str]:
    """The stack of blocks that a layer is in, its block there, and its kind: "cross", "self" or "ff"."""
    block = block_of(name)
    stack, _, number = block.rpartition(".")
    inside = name.removeprefix(block)
    return stack, number, "cross" if _CROSS.search(inside) else "self" if _ATTENTION.search(inside) else "ff"


def _trained_whole(model: nn.Module, norms: bool) -> Iterator[str]:
    """Names of visual embeddings and, if asked for, of norms outside them; each once, however it is wrapped."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        wrapped = isinstance(module, AuxiliaryTrainingWrapper)
        own = module.original_module if wrapped else module
        visual = isinstance(own, VisualEmbedding)
        if visual or wrapped:
            inside = (*inside, f"{name}.")
        if visual or (norms and type(own).__name__.endswith("Norm")):
            yield name
