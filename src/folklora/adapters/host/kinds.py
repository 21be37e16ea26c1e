"""The kinds of base layer that can carry an update: how each lays out its weight and applies factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from folklora.adapters.host.feed_forward import layout_of, matrix
from folklora.factored import Factors, SharedInput, factored_linear, factored_update

SAMPLES = 32
# values that went through bfloat16 once differ by at most half a unit in the last of its 8 bits; those that went
# through float16 may besides have lost half of its smallest number
SAME, _SMALLEST = 2.0**-7, 2.0**-24
_QUANTISED_COSINE = 0.9
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Kind:
    """A kind of layer; the update's matrix is always [out, in], however the layer stores its weight."""

    name: str
    has_matrix: bool = True

    def shape(self, base: nn.Module) -> tuple[int, int]:
        """(out, in) of the weight as a matrix."""
        return base.out_features, base.in_features

    def matrix(self, base: nn.Module) -> Tensor:
        """The weight as a matrix [out, in], dequantised."""
        if not is_quantised(base):
            # by each pass of an update that is dense; dynamo cannot follow PEFT's own way
            return self.from_layout(base.weight.detach())
        _unpack(base)
        weight = base.weight
        matrix = dequantize_module_weight(base).detach()
        if base.weight is not weight:
            # PEFT puts a copy in the place of bitsandbytes' weights of 8 bits, which lacks their scales
            base.weight = weight
        return self.from_layout(matrix)

    def from_layout(self, weight: Tensor) -> Tensor:
        """A tensor in the layer's own layout (its weight, or the gradient of it) as a matrix [out, in]."""
        return weight

    def layout(self, base: nn.Module, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the layer's own layout."""
        return matrix

    def per_output(self, base: nn.Module, vector: Tensor) -> Tensor:
        """A vector [out], such as a bias, in the shape that broadcasts with the layer's output."""
        return vector

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        factors: Factors | None,
        dropout: float = 0.0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """base(x) plus the update of x, or of x after dropout.

        Args:
            base: The layer.
            x: Its input.
            factors: The update; None adds none.
            dropout: Of the update's input.
            weight: In the layer's own layout, in the place of its own weight.
        """
        y = base(x) if weight is None else swapped_call(base, {"weight": weight}, x)
        return y if factors is None else y + self.update(base, F.dropout(x, dropout) if dropout else x, factors)

    def update(self, base: nn.Module, x: Tensor, factors: Factors) -> Tensor:
        """The update of x alone."""
        return factored_update(x, factors)


class _Linear(Kind):
    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        factors: Factors | None,
        dropout: float = 0.0,
        weight: Tensor | None = None,
        shared: SharedInput | None = None,
    ) -> Tensor:
        if is_plain(base):
            own = base._parameters
            weight = own["weight"] if weight is None else weight
            if factors is None:
                return F.linear(x, weight, own["bias"])
            return factored_linear(x, weight, own["bias"], factors, dropout, shared)
        if weight is not None and is_quantised(base):
            # its own forward multiplies with what it stores
            y = F.linear(x, weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))
            return y if factors is None else y + self.update(base, F.dropout(x, dropout) if dropout else x, factors)
        return super().forward(base, x, factors, dropout, weight)


def _unpack(base: nn.Module) -> None:
    # after a pass without gradients on some CPUs, bitsandbytes keeps a weight in a form that it cannot dequantise;
    # being asked for its state makes it go back
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        base.state_dict()


class _TransposedLinear(Kind):
    def shape(self, base: nn.Module) -> tuple[int, int]:
        return base.weight.shape[1], base.weight.shape[0]

    def from_layout(self, weight: Tensor) -> Tensor:
        return weight.T

    def layout(self, base: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()


class _Embedding(Kind):
    def shape(self, base: nn.Module) -> tuple[int, int]:
        return base.embedding_dim, base.num_embeddings

    def from_layout(self, weight: Tensor) -> Tensor:
        return weight.T

    def layout(self, base: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def update(self, base: nn.Module, x: Tensor, factors: Factors) -> Tensor:
        dtype = base.weight.dtype
        h = F.embedding(x, factors.A.T.to(dtype), padding_idx=base.padding_idx)
        s = factors.s.to(dtype) if isinstance(factors.s, Tensor) else factors.s
        # some embeddings multiply what they look up (Gemma's √width)
        return F.linear(h * s, factors.B.to(dtype)) * getattr(base, "embed_scale", 1.0)


class _Convolution(Kind):
    def shape(self, base: nn.Module) -> tuple[int, int]:
        return base.weight.shape[0], base.weight[0].numel()

    def from_layout(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def layout(self, base: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.view_as(base.weight)

    def per_output(self, base: nn.Module, vector: Tensor) -> Tensor:
        return vector.view(-1, *([1] * (base.weight.dim() - 2)))

    def update(self, base: nn.Module, x: Tensor, factors: Factors) -> Tensor:
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[base.weight.dim()]
        groups = base.groups
        # every group of channels is read by all of A, and each row of B takes what its own group gave
        kernel = factors.A.to(x.dtype).view(factors.rank, *base.weight.shape[1:])
        kernel = kernel.repeat(groups, *([1] * (kernel.dim() - 1)))
        padded = x
        padding = base.padding
        if base.padding_mode != "zeros":
            padded, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        h = convolve(padded, kernel, None, base.stride, padding, base.dilation, groups)
        s = factors.vector().to(h.dtype)
        s = s.repeat(*([1] * (s.dim() - 1)), groups)
        # a gate [batch, 1, r] or a vector [r] counts channels, which stand second here
        s = s.reshape(*(s.shape[:1] if s.dim() > 1 else ()), -1, *([1] * (h.dim() - 2)))
        B = factors.B.to(h.dtype).view(*factors.B.shape, *([1] * (h.dim() - 2)))
        return convolve(h * s, B, groups=groups)


class _SeveralWeights(Kind):
    def shape(self, base: nn.Module) -> tuple[int, int]:
        raise TypeError(f"a {type(base).__name__} has several weights, each with a shape of its own")


class _FeedForward(Kind):
    def shape(self, base: nn.Module) -> tuple[int, int, int]:
        """(matrices, f, d): three matrices where there is a gate, or two."""
        layout = layout_of(base)
        return len(layout.names), *matrix(getattr(base, layout.up)).shape

    def matrix(self, base: nn.Module) -> Tensor:
        """[matrices, f, d]: W_g if there is a gate, W_u and W_dᵀ."""
        *up, down = (matrix(getattr(base, name)).detach() for name in layout_of(base).names)
        return torch.stack([*up, down.T])


LINEAR = _Linear("linear")
TRANSPOSED = _TransposedLinear("linear")
EMBEDDING = _Embedding("embedding")
CONVOLUTION = _Convolution("convolution")
EXPERTS = _SeveralWeights("experts", has_matrix=False)
ATTENTION = _SeveralWeights("attention", has_matrix=False)
FEED_FORWARD = _FeedForward("feed-forward", has_matrix=False)


def is_plain(base: nn.Module) -> bool:
    """Whether a layer is nothing but x Wᵀ + b, so that the kernel may compute it in the layer's place.

    A subclass or a tensor of another kind (quantised), a hook or a forward put in its place (offloading) would be
    bypassed.
    """
    if type(base) is not nn.Linear or "forward" in vars(base) or any(getattr(base, key) for key in _HOOKS):
        return False
    # replicas of nn.DataParallel keep it elsewhere, and take the general way
    weight = base._parameters.get("weight")
    return type(weight) is nn.Parameter or (weight is not None and not is_traceable_wrapper_subclass(weight))


def kind_of(base: nn.Module, name: str) -> Kind:
    """The kind of a layer.

    Args:
        base: The layer.
        name: Its name, for the message.

    Raises:
        TypeError: Folklora cannot adapt such a layer; the message says why and what to do.
    """
    if isinstance(base, nn.Embedding):
        return EMBEDDING
    if isinstance(base, Conv1D):
        return TRANSPOSED
    if isinstance(base, _CONVOLUTIONS):
        return CONVOLUTION
    if isinstance(base, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"layer '{name}' belongs to torch's MultiheadAttention, which reads its weight without calling it, so that "
            f"an update would have no effect; name the attention '{name.rpartition('.')[0]}' as a whole"
        )
    if isinstance(base, nn.Linear) or (hasattr(base, "in_features") and hasattr(base, "out_features")):
        if not isinstance(getattr(base, "weight", None), Tensor):
            raise TypeError(f"layer '{name}' ({type(base).__name__}) keeps no weight that Folklora could read")
        if not isinstance(base, nn.Linear) and not is_quantised(base) and base.weight.shape != LINEAR.shape(base):
            raise TypeError(
                f"layer '{name}' ({type(base).__name__}) keeps a weight {list(base.weight.shape)}, and Folklora adapts "
                f"linear layers with one [out, in], here {list(LINEAR.shape(base))}"
            )
        return LINEAR
    if layout_of(base) is not None:
        return FEED_FORWARD
    weights = weight_names(base)
    kind = ATTENTION if is_attention(base) else EXPERTS
    if any(is_quantised_weight(weight_at(base, key)) for key in weights):
        raise TypeError(f"the {kind.name} '{name}' has quantised weights; Folklora adapts floating point only there")
    if weights:
        return kind
    raise TypeError(
        f"layer '{name}' is a {type(base).__name__}; "
        "Folklora adapts linear, embedding and convolution layers, feed-forward layers, torch's attention and experts"
    )


def is_attention(base: nn.Module) -> bool:
    """Whether a module is torch's own attention, which multiplies by its weights without calling a layer."""
    return isinstance(base, nn.MultiheadAttention) and type(base).forward is nn.MultiheadAttention.forward


def in_attention(base: nn.Module) -> bool:
    """Whether a layer is a part of torch's attention, which reads its weight without calling it."""
    return isinstance(base, NonDynamicallyQuantizableLinear)


def weight_names(base: nn.Module) -> list[str]:
    """Names of the weights of a module that has several: an attention's projections, or one a stack of experts.

    Empty where it is no such module.
    """
    if is_attention(base):
        return [key for key in _PROJECTIONS if weight_at(base, key) is not None]
    shapes = {key: value.shape for key, value in base.named_parameters(recurse=False) if value.dim() == 3}
    counts = {shape[0] for shape in shapes.values()}
    return list(shapes) if len(counts) == 1 and min(counts) > 1 else []


def weight_at(base: nn.Module, key: str) -> Tensor | None:
    """The weight of a module that a name of `weight_names` stands for."""
    owner, _, leaf = key.rpartition(".")
    return getattr(base.get_submodule(owner), leaf)


def put_weight(base: nn.Module, key: str, weight: nn.Parameter) -> None:
    """Put another in its place."""
    owner, _, leaf = key.rpartition(".")
    setattr(base.get_submodule(owner), leaf, weight)


def swapped_call(module: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """module(*args, **kwargs) with other tensors in the place of its parameters of those names."""
    owners = {key: module.get_submodule(key.rpartition(".")[0]) for key in tensors}
    # while FSDP1 has parameters whole, plain tensors lie over them as attributes, which a swap would not get past
    over = [(owner, key.rpartition(".")[2]) for key, owner in owners.items() if key.rpartition(".")[2] in vars(owner)]
    laid = [(owner, leaf, vars(owner).pop(leaf)) for owner, leaf in over]
    try:
        return functional_call(module, tensors, args, kwargs)
    finally:
        for owner, leaf, value in laid:
            vars(owner)[leaf] = value


def is_transposed(base: nn.Module) -> bool:
    """Whether the matrices are [in, out], as transformers marks its experts, or as a batched product needs them."""
    return not is_attention(base) and getattr(base, "is_transposed", True)


def weight_matrices(base: nn.Module, key: str) -> Tensor:
    """One of the weights as matrices [matrices, out, in]: one an expert, or a single one."""
    weight = weight_at(base, key).detach()
    weight = weight if weight.dim() == 3 else weight.unsqueeze(0)
    return weight.mT if is_transposed(base) else weight


def is_quantised(base: nn.Module) -> bool:
    """Whether the layer stores its weight in fewer bits than floating point."""
    return is_quantised_weight(getattr(base, "weight", None))


def is_quantised_weight(weight: Tensor | None) -> bool:
    """Whether a weight is stored in fewer bits than floating point."""
    if weight is None or not torch.is_floating_point(weight) or weight.element_size() < 2:
        return True
    # torchao's tensors pass for floating point; what is sharded over processes is made of wrappers too
    return is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor")


def evenly_spaced(weight: Tensor) -> Tensor:
    """SAMPLES evenly spaced elements of a weight, float32."""
    flat = weight.reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step][:SAMPLES].float().clone()


def same_sample(own: Tensor, sample: Tensor, quantised: bool = False) -> bool:
    """Whether two samples are of one base weight, up to one rounding (of a quantised one: point the same way)."""
    own, sample = own.cpu(), sample.detach().float().cpu()
    if own.shape != sample.shape:
        return False
    if quantised:
        return bool(F.cosine_similarity(own, sample, dim=0) > _QUANTISED_COSINE)
    return torch.allclose(own, sample, rtol=SAME, atol=_SMALLEST)
