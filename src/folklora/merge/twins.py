"""What Twin-Merging splits, served: each row of a batch by the shared model and its own mixture of what lies beyond."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.host.combine import config_of, fill
from folklora.adapters.host.export import export_lora
from folklora.adapters.host.layer import layers_of
from folklora.adapters.host.mixture import mix_by_row
from folklora.adapters.lora import LoRA
from folklora.encoders import BaseEncoder, encode_prompts
from folklora.factored import Factors
from folklora.merge.engine.tasks import task_names
from folklora.merge.factors import twin_merging
from folklora.merge.routers import Kind, Router, fit_router
from folklora.merge.twin_parts import adapter_factors, beyond_checkpoint
from folklora.stream.files import read_json, replace_folder, write_json

SHARED, _EXCLUSIVE, _INDEX, _VALUES = "shared", "exclusive", "twins.json", "twins.safetensors"
_ROUTER, _BASE = "router.", "base."


class Twins:
    """A shared model θ* with what each task adds to it, v_t, as low-rank adapters that a router weighs row by row.

        y = W* x + b + Σ_t g_t B_t (A_t x),  g = router(z) [rows, T],  z [rows, d] the mean of θ*'s last hidden states

    Make it with `of_adapters` or `of_checkpoint`, then `learn_router`; `model` is called, and generates, as ever: one
    pass reads z without the v_t, and g holds until the next text. Nothing of it is trained but the router. With a
    single task there is nothing to route: g = 1.

    Linear weights alone have a v_t here; all else (norms, biases, embeddings, a head tied to them, stacked experts) is
    θ*'s for every row.

        twins = Twins.of_adapters(base, {"law": "runs/law", "medicine": "runs/medicine"}, rank=8)
        twins.learn_router(tokenizer, {"law": law_prompts, "medicine": medicine_prompts})
        twins.model.generate(**tokenizer(prompts, return_tensors="pt", padding=True))
        twins.save("twins")

    Args:
        base: θ*, or θ_0 where `shared` is given; adapters are put on it, its own weights are not written to.
        exclusive: For each task v_t by the layer's name; tasks' names become those of adapters.
        shared: What θ* adds to θ_0, by the layer's name.

    Raises:
        ValueError: A task's name cannot be an adapter's, or there is nothing beyond θ*.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        exclusive: Mapping[str, Mapping[str, Factors]],
        shared: Mapping[str, Factors] | None = None,
    ) -> None:
        wrong = [task for task in exclusive if task == SHARED or not re.fullmatch(r"[\w-]+", task)]
        if wrong:
            raise ValueError(f"tasks are named by letters, digits, - and _, and not '{SHARED}': {', '.join(wrong)}")
        self.tasks, self.shared = list(exclusive), () if shared is None else (SHARED,)
        self.model = _carrying(base, {**({} if shared is None else {SHARED: shared}), **exclusive})
        self.model.requires_grad_(False).eval()
        self.encoder = BaseEncoder(base, self.shared)
        self.router: Router | None = None
        self._given: Tensor | None = None
        mix_by_row(base, self._route)

    @classmethod
    def of_adapters(
        cls,
        base: PreTrainedModel,
        adapters: Mapping[str, str | Path],
        *,
        rank: int = 8,
        shared: str = "task-arithmetic",
        lambda_: float | None = None,
    ) -> Twins:
        """From adapters over one base, as factors: no [out, in] is built.

        D_t = s B_t A_t is merged and its difference compressed, not A and B each by itself as the authors do.

        Args:
            base: θ_0.
            adapters: For each task a folder of a LoRA, PEFT's or of a Folklora method that is a low-rank update.
            rank: The most that is kept of each v_t, exact from the sum of the adapters' ranks on.
            shared: How D* is merged: "task-arithmetic", "average", "tsv-m", "iso-c" or "wudi-closed-form".
            lambda_: Its scale; None takes 0.3 for task arithmetic, and the method's own default otherwise.

        Raises:
            ValueError: An adapter is no low-rank update of linear layers, or an option is out of its range.
        """
        if not adapters:
            raise ValueError("there is no adapter to merge")
        read = {task: adapter_factors(base, folder) for task, folder in adapters.items()}
        merged: dict[str, Factors] = {}
        exclusive: dict[str, dict[str, Factors]] = {task: {} for task in read}
        for layer in dict.fromkeys(layer for own in read.values() for layer in own):
            like = next(own[layer] for own in read.values() if layer in own)
            none = Factors(like.A[:0], 1.0, like.B[:, :0])
            parts = [own.get(layer, none) for own in read.values()]
            merged[layer], rests = twin_merging(parts, shared=shared, lambda_=lambda_, rank=rank)
            for own, rest in zip(exclusive.values(), rests, strict=True):
                own[layer] = rest
        return cls(base, exclusive, merged)

    @classmethod
    def of_checkpoint(cls, model: PreTrainedModel, folder: str | Path, names: Sequence[str] = ()) -> Twins:
        """From what `merge_models` wrote with the method `twin-merging`.

        Args:
            model: θ*: the model of that folder, loaded by `from_pretrained`.
            folder: The folder.
            names: The tasks' names; the last part of their models' paths by default.

        Raises:
            FileNotFoundError: The folder is none of that kind.
            ValueError: The model is another one, or there are not as many names as tasks.
        """
        models = task_names(folder)
        names = list(names) or [Path(model).name for model in models]
        if len(set(names)) != len(models):
            raise ValueError(f"the {len(models)} tasks need as many different names, not {', '.join(names)}")
        return cls(model, dict(zip(names, beyond_checkpoint(model, folder, len(models)), strict=True)))

    def learn_router(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[str, Sequence[str]],
        kind: Kind = "mlp",
        *,
        dropout: float = 0.5,
        max_length: int = 512,
        **training: Any,
    ) -> float | None:
        """Learn which prompts are of which task. No answers are read; take validation prompts, not those of a test.

        Args:
            tokenizer: The model's.
            prompts: Texts of each task.
            kind: See `Router`.
            dropout: Of the MLP.
            max_length: Tokens of a prompt; longer ones are cut on the left.
            **training: See `fit_router`.

        Returns:
            The accuracy on the prompts that were held out; None where there are none.

        Raises:
            ValueError: A task has no prompts, or too few.
        """
        if set(prompts) != set(self.tasks):
            raise ValueError(f"prompts of each task are needed: {', '.join(self.tasks)}, not of {', '.join(prompts)}")
        texts = [text for task in self.tasks for text in prompts[task]]
        labels = torch.tensor([i for i, task in enumerate(self.tasks) for _ in prompts[task]])
        features = encode_prompts(self.model, tokenizer, self.encoder, texts, max_length)
        # its start is drawn by the seed of its training
        with torch.random.fork_rng(devices=[]):
            router = Router(kind, self.encoder.width, len(self.tasks), dropout)
        accuracy = fit_router(router, features, labels, **training)
        self.router = router
        return accuracy

    def weights(self, inputs: Mapping[str, Any]) -> Tensor:
        """g [rows, T] of what the model is called with."""
        if self._given is not None:
            return self._given
        if len(self.tasks) == 1:
            return torch.ones(1, 1)
        if self.router is None:
            raise ValueError("there is no router yet: call learn_router, or say the weights yourself within weighed()")
        return self.router.weights(self.encoder(dict(inputs)))

    @contextmanager
    def weighed(self, weights: Tensor) -> Iterator[None]:
        """Within this block g is given: [rows, T], or [1, T] for all rows alike; the router is not asked."""
        if weights.dim() != 2 or weights.shape[1] != len(self.tasks):
            raise ValueError(f"weights are [rows, {len(self.tasks)}], not {list(weights.shape)}")
        before, self._given = self._given, weights
        try:
            yield
        finally:
            self._given = before

    def save(self, out: str | Path) -> Path:
        """Write shared/ and exclusive/TASK/, LoRAs that PEFT reads, and the router.

        Raises:
            FileExistsError: `out` is there already.
        """
        out = Path(out)
        if out.exists():
            raise FileExistsError(f"{out} is there already; choose a new folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            for name in (*self.shared, *self.tasks):
                if name in self.model.peft_config:
                    export_lora(self.model, folder / _place(name), name)
            values = {_BASE + layer.name: layer.sample_base().cpu() for layer in layers_of(self.model)}
            described = None
            if self.router is not None:
                values |= {_ROUTER + key: value.cpu() for key, value in self.router.state_dict().items()}
                described = {"kind": self.router.kind, "width": self.router.width}
            save_file(values, folder / _VALUES)
            write_json(folder / _INDEX, {"tasks": self.tasks, "shared": bool(self.shared), "router": described})
            replace_folder(folder, out)
        return out

    @classmethod
    def load(cls, base: PreTrainedModel, folder: str | Path) -> Twins:
        """Read what `save` wrote.

        Args:
            base: The model that it was made with: θ_0 for adapters, θ* for a checkpoint.
            folder: The folder.

        Raises:
            FileNotFoundError: The folder holds none.
            ValueError: It was made with another base.
        """
        folder = Path(folder)
        if not (folder / _INDEX).is_file():
            raise FileNotFoundError(f"{folder} holds no {_INDEX}: it was not written by Twins.save")
        index, values = read_json(folder / _INDEX), load_file(folder / _VALUES)
        names = [*([SHARED] if index["shared"] else []), *index["tasks"]]
        places = {name: folder / _place(name) for name in names}
        read = {name: adapter_factors(base, place) if place.is_dir() else {} for name, place in places.items()}
        twins = cls(base, {task: read[task] for task in index["tasks"]}, read.get(SHARED))
        for layer in layers_of(twins.model):
            if not layer.fits_base(values[_BASE + layer.name]):
                raise ValueError(f"{folder} was made with another base model's weights ('{layer.name}')")
        if index["router"] is not None:
            twins.router = Router(**index["router"], tasks=len(twins.tasks))
            state = {key.removeprefix(_ROUTER): v for key, v in values.items() if key.startswith(_ROUTER)}
            twins.router.load_state_dict(state)
            twins.router.eval().requires_grad_(False)
        return twins

    def _route(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        weights = self.weights(inputs)
        whole = {name: torch.ones(1) for name in self.shared}
        return whole | {task: weights[:, i] for i, task in enumerate(self.tasks)}


def _place(name: str) -> Path:
    return Path(name) if name == SHARED else Path(_EXCLUSIVE) / name


def _carrying(base: PreTrainedModel, adapters: Mapping[str, Mapping[str, Factors]]) -> PeftModel:
    """The base with LoRAs of these factors, by adapter and layer; an adapter without any is left out."""
    model: PeftModel | None = None
    for name, factors in adapters.items():
        sums = {}
        for layer, own in factors.items():
            if own.rank:
                A, B = own.to_lora()
                sums[layer] = (A.float(), B.float(), None)
        if not sums:
            continue
        config = config_of(sums, LoRA())
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        fill(model, name, sums)
    if model is None:
        raise ValueError("no linear layer differs between the tasks: there is nothing to route")
    return model
