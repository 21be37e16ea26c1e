"""SLM: knowledge as small updates behind keys in the space of texts; each prompt is answered by the nearest ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.host.layer import layers_of
from folklora.adapters.host.mixture import mix_by_row
from folklora.continual.base import OBSERVED, AdapterPerTask
from folklora.encoders import BaseEncoder, Encoder, SentenceEncoder, encode_prompts
from folklora.stream.tasks import Task

_BASE = "base"
_EPSILON = 1e-9
_CLIP, _DECAY = 0.1, 0.01


@dataclass
class SLM(AdapterPerTask):
    r"""Scalable Language Model: what a prompt is about chooses, and weighs, the updates that answer it.

    A frozen encoder E turns a prompt into a query q [d], the mean over its tokens, cut into G groups q_g. Every task
    has n keys k_p [d], and behind each key its own adapter, an update D_p of every adapted weight (a LoRA: D = s B A).
        S(q, k_p) = mean over g of cos(q_g, k_{p,g})
        I = the K keys with the largest S
        w_p = max(S_p, 0) / (Σ_{i ∈ I} max(S_i, 0) + 1e-9),  p ∈ I
        y = W x + b + Σ_{p ∈ I} w_p D_p x
    1. Keys: E is frozen, the rows of a task's keys start orthonormal in each group. For each prompt and group the K
       most similar keys are drawn to the query, L = -mean of their cosines; at random a quarter of the keys are left
       out. No labels are read. AdamW, weight decay 0.01, gradients clipped to 0.1, a tenth of the rate in the last
       third. The keys of all tasks are one pool, and those of old tasks are frozen.
    2. Values: the task's n adapters are trained with the retrieval in place, all older ones are frozen.
    Inference retrieves among all tasks learnt, once for each prompt: generation keeps the answer. If no key points the
    query's way, all w are 0 and the base answers. n r (in + out) trained parameters a weight and task with LoRA.

    Each row of a batch has its own w; the authors' code takes one for the batch, the mean of S over its rows
    (`per_sample=False`), so that an answer depends on its neighbours. It keeps old tasks' values by copying them back
    at the next step, which lets the optimiser's momentum through once; here they are parameters of their own. Its
    encoder is a sentence model (nli-mpnet, d = 768), which `encoder` may name; the default is the base model itself,
    with no adapter, over its last hidden states. It trains keys 2 to 3 epochs at 1e-3; here the queries are computed
    once, so steps are cheap, and their number does not shrink with the task. It adapts one matrix a block (o_proj),
    unscaled; here the adapter says which and how. Groups need not divide d: their widths differ by one at most. K is 4
    in its code for BERT and 2 in that for LLaMA; with K = n all prompts of a task train all of its values, which few
    examples need. Generation without a cache retrieves anew at every token, for the prompt and the answer so far.
    `folklora explain` shows what a prompt retrieves.

    Source: Peng, Tian, Liu, Yang, Jia, "Scalable Language Model with Generalized Continual Learning", ICLR 2024,
    arXiv 2404.07470.

    When to choose:
        Nobody says which task a prompt belongs to, no old examples may be kept, and the tasks' texts differ. Tasks that
        differ in their answers alone have the same keys and cannot be told apart, and a prompt that is like none of the
        tasks is answered by the nearest one's values, in full. Each prompt is read twice, and the result is no single
        weight: it neither merges nor exports. Where the task is known, `per-task` is better.

    Equation:
        S(q, k_p) = \frac{1}{G} \sum_{g=1}^{G} \cos(q_g, k_{p,g}), \quad I = \operatorname{top}_K(S)
        w_p = \frac{S(q, k_p)}{\sum_{i \in I} S(q, k_i)}, \quad y = W x + b + \sum_{p \in I} w_p\, D_p x

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "key_steps": 50}
        run = learn(model_folder(), tasks, method="slm", out="runs/slm", options=options)
        print(run.results["methods"]["slm"]["attention"]["retrieved"])

    Args:
        adapter: The adapter behind each key; LoRA by default.
        keys_per_task: n.
        top_k: K.
        groups: G.
        per_sample: Retrieve for each row of a batch; otherwise once for all of it.
        training_pool: The keys that training retrieves from: of the "task" alone, or of "all" tasks so far, with their
            frozen updates. The authors' code for LLaMA does the first, that for BERT the second.
        temperature: τ; where it is given, S is the mean over g of softmax over p of cos/τ, as an option of the code.
        encoder: "base", or the folder or hub name of an encoder whose last hidden states are averaged.
        key_dropout: Probability that a key is left out for a prompt and group while keys are learnt.
        key_learning_rate: Of the keys.
        key_steps: Steps that the keys of a task are trained for.
        key_batch_size: Prompts a step.
    """

    keys_per_task: int = 4
    top_k: int = 4
    groups: int = 6
    per_sample: bool = True
    training_pool: Literal["task", "all"] = "task"
    temperature: float | None = None
    encoder: str = _BASE
    key_dropout: float = 0.25
    key_learning_rate: float = 1e-2
    key_steps: int = 400
    key_batch_size: int = 16

    method: ClassVar[str] = "slm"
    paper: ClassVar[str] = "Peng et al. 2024, arXiv 2404.07470"
    trains: ClassVar[str] = "a few keys a task and an adapter behind each; prompts retrieve"

    def __post_init__(self) -> None:
        for name in ("keys_per_task", "top_k", "groups", "key_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.key_steps < 0 or self.key_learning_rate <= 0:
            raise ValueError(
                f"slm needs key_steps >= 0 and key_learning_rate > 0, not {self.key_steps} and {self.key_learning_rate}"
            )
        if not 0 <= self.key_dropout < 1:
            raise ValueError(f"key_dropout must be at least 0 and below 1, not {self.key_dropout}")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, or none, not {self.temperature}")
        if self.training_pool not in ("task", "all"):
            raise ValueError(f"training_pool must be task or all, not {self.training_pool!r}")
        self._keys = torch.empty(0, 0)
        self._ranges: list[tuple[int, int]] = []
        self._open: list[int] = []
        self._trained: list[str] = []
        self._encoder: Encoder | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def names(self, index: int) -> list[str]:
        """The adapters behind the keys of task number `index`."""
        return [f"task_{index}_key_{key}" for key in range(self.keys_per_task)]

    def start(self, model: PreTrainedModel, adapter_name: str | None = None) -> PeftModel:
        """Put the first adapter on the base model, and let prompts retrieve from now on.

        Raises:
            ValueError: The adapter is none that can be mixed, or the encoder is too narrow for so many groups or keys.
        """
        adapted = super().start(model, adapter_name)
        if next(layers_of(adapted), None) is None:
            kind = type(self.adapter).__name__
            raise ValueError(f"slm mixes adapters row by row, which {kind} cannot; choose one of `folklora methods`")
        self._keys, self._ranges, self._encoder = torch.empty(0, 0), [], None
        self.route(adapted, 0, 0)
        self._listen(adapted)
        return adapted

    def activate(self, model: PeftModel, index: int) -> None:
        """All adapters so far; what a prompt retrieves says which of them take part."""
        model.base_model.set_adapter([name for task in range(index + 1) for name in self.names(task)])

    def prepare(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int) -> None:
        """Phase 1: learn the task's keys. Then add its adapters, which are trained."""
        super().prepare(model, tokenizer, tasks, index)
        self._tokenizer, begin = tokenizer, len(self._keys)
        task = tasks[index]
        # no more than are looked at
        count = min(len(task.train), max(1, self.key_steps * self.key_batch_size))
        prompts = [example.prompt for example in random.Random(f"keys:{task.name}").sample(task.train, count)]
        queries = encode_prompts(model, tokenizer, self._encoder, prompts, self.max_length)
        keys = self.new_keys(queries.shape[1])
        self.learn_keys(keys, queries)
        self._keys = torch.cat([self._keys, keys.detach()]) if begin else keys.detach()
        self._ranges.append((begin, len(self._keys)))
        self._open = [index] if self.training_pool == "task" else list(range(index + 1))
        self._trained = self.names(index)

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """The keys [P, d] and the range of each task in them."""
        return {"keys": self._keys, "ranges": torch.tensor(self._ranges)}

    def resume(self, model: PeftModel, index: int, carried: dict[str, Tensor]) -> None:
        """Take up the keys, and let prompts retrieve among them."""
        super().resume(model, index, carried)
        self._keys = carried["keys"]
        self._ranges = [tuple(pair) for pair in carried["ranges"].tolist()]
        self._listen(model)
        self.route(model, 0, index + 1)

    def route(self, model: PeftModel, task: int, trained: int) -> None:
        """Retrieve among the keys of all tasks that were learnt."""
        self._open, self._trained = list(range(trained)), []

    def new_keys(self, width: int) -> nn.Parameter:
        """Keys [n, width] at their start: orthonormal rows in each group."""
        widths = [part.numel() for part in torch.empty(width).tensor_split(self.groups)]
        parts = [nn.init.orthogonal_(torch.empty(self.keys_per_task, size)) for size in widths]
        return nn.Parameter(torch.cat(parts, dim=1))

    def learn_keys(self, keys: nn.Parameter, queries: Tensor) -> list[float]:
        """Draw keys to the queries [prompts, d] of their task.

        Returns:
            The loss of each step, the negative mean cosine of the keys chosen, from -1 to 1.
        """
        queries, losses = self.grouped(queries), []
        optimizer = torch.optim.AdamW([keys], lr=self.key_learning_rate, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, round(self.key_steps * 2 / 3)))
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(self.key_steps):
            if not len(order):
                order = torch.randperm(len(queries))
            batch, order = order[: self.key_batch_size], order[self.key_batch_size :]
            loss = self.key_loss(keys, queries[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([keys], _CLIP)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    def key_loss(self, keys: Tensor, queries: Tensor) -> Tensor:
        """-mean cosine of queries [rows, G, d_k] and the K nearest keys of those not left out, in each group."""
        cosines = self.cosines(queries, keys)
        left_out = torch.rand_like(cosines) < self.key_dropout
        best = cosines.masked_fill(left_out, -torch.inf).topk(min(self.top_k, len(keys)), dim=-1).values
        chosen = best > -torch.inf
        return -best.masked_fill(~chosen, 0.0).sum() / chosen.sum().clamp_min(1)

    def grouped(self, vectors: Tensor) -> Tensor:
        """[..., d] in groups of length 1, [..., G, d_k]; narrower groups end with zeros, which no cosine sees."""
        parts = vectors.tensor_split(self.groups, dim=-1)
        padded = [F.pad(part, (0, parts[0].shape[-1] - part.shape[-1])) for part in parts]
        return F.normalize(torch.stack(padded, dim=-2), dim=-1)

    def cosines(self, queries: Tensor, keys: Tensor) -> Tensor:
        """cos(q_g, k_{p,g}) of grouped queries [rows, G, d_k] and keys [P, d], [rows, G, P]."""
        return torch.einsum("bgd,pgd->bgp", queries, self.grouped(keys))

    def weights(self, queries: Tensor) -> Tensor:
        """w of the keys that may be retrieved at present, 0 for all others.

        Args:
            queries: [rows, d].

        Returns:
            [rows, P], or [1, P] where the batch retrieves as one.
        """
        keys = self._keys.to(queries.device)
        allowed = torch.zeros(len(keys), dtype=torch.bool)
        for task in self._open:
            allowed[slice(*self._ranges[task])] = True
        count = min(self.top_k, int(allowed.sum()))
        allowed = allowed.to(keys.device)
        cosines = self.cosines(self.grouped(queries), keys).masked_fill(~allowed, -torch.inf)
        if self.temperature is not None:
            cosines = (cosines / self.temperature).softmax(-1).masked_fill(~allowed, -torch.inf)
        similarity = cosines.mean(1)
        if not self.per_sample:
            similarity = similarity.mean(0, keepdim=True)
        best, chosen = similarity.topk(count, dim=-1)
        best = best.clamp_min(0)
        shares = best / (best.sum(-1, keepdim=True) + _EPSILON)
        return torch.zeros_like(similarity).scatter(-1, chosen, shares)

    def explain(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tasks: Sequence[str]
    ) -> dict[str, Any] | None:
        """Each task's part of what a prompt retrieves, the same in all layers; "none" is the base model's."""
        self._tokenizer = tokenizer
        queries = encode_prompts(model, tokenizer, self._encoder, prompts, self.max_length)
        # each by itself, also where a batch would retrieve as one
        weights = torch.cat([self.weights(query) for query in queries.split(1)])
        by_task = torch.stack([weights[:, slice(*self._ranges[task])].sum(1) for task in range(len(tasks))], dim=1)
        parts = torch.cat([1 - by_task.sum(1, keepdim=True).clamp_max(1), by_task], dim=1)
        rows = [[[round(value, 6) for value in row]] for row in parts.tolist()]
        return {"layers": ["all layers"], "slots": ["none", *tasks], "weights": rows}

    def observe(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
    ) -> dict[str, Any] | None:
        """The mean part of each task in the answers to up to 48 test prompts of each, and how often it is the largest.

        "retrieved" gives, for each task, the percentage of its prompts of which its own keys have the largest part.
        """
        names, mean, retrieved = [task.name for task in tasks], [], []
        for index, task in enumerate(tasks):
            found = self.explain(model, tokenizer, [example.prompt for example in task.test[:OBSERVED]], names)
            parts = torch.tensor(found["weights"], dtype=torch.float64)[:, 0]
            mean.append([[round(value, 6) for value in parts.mean(0).tolist()]])
            right = (parts.argmax(1) == index + 1).double().mean()
            retrieved.append(round(100 * float(right), 3))
        return {
            "layers": ["all layers"], "slots": ["none", *names], "tasks": names, "mean": mean, "retrieved": retrieved
        }  # fmt: skip

    def _listen(self, model: PeftModel) -> None:
        base = model.get_base_model()
        if self.encoder == _BASE:
            self._encoder = BaseEncoder(base)
        elif base.device.type != "meta":
            self._encoder = SentenceEncoder(self.encoder, base.device)
        # before a run is begun, its methods are tried on a model without values
        self._check_width(SentenceEncoder.width_at(self.encoder) if self._encoder is None else self._encoder.width)
        mix_by_row(base, self._retrieve)

    def _check_width(self, width: int) -> None:
        narrowest, most = width // self.groups, width // self.keys_per_task
        if narrowest < self.keys_per_task:
            raise ValueError(
                f"groups={self.groups} cuts the encoder's {width} numbers into groups of {narrowest}, too narrow for "
                f"keys_per_task={self.keys_per_task} orthogonal keys; choose groups={most} or fewer"
            )

    def _retrieve(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The weight of each adapter in each row of a call of the model; unused ones are left out."""
        if not self._open:
            return {}
        weights = self.weights(self._encoder(inputs, self._tokenizer))
        names = [name for task in range(len(self._ranges)) for name in self.names(task)]
        used = (weights > 0).any(0).tolist()
        # every trained parameter needs a gradient where several processes train
        return {name: weights[:, p] for p, name in enumerate(names) if used[p] or name in self._trained}
