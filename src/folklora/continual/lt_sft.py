"""LT-SFT over a stream: each task adds a sparse change, of the entries that its full training moves most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.adapters.host.layer import updates_of
from folklora.adapters.lt_sft import LTSFT, reopen, select
from folklora.continual.base import Phase
from folklora.continual.inc_lora import IncLoRA
from folklora.stream.tasks import Task


@dataclass
class LTSFTStream(IncLoRA):
    r"""Lottery-ticket sparse fine-tuning, a task at a time: the tasks' sparse changes are added up.

    Task t starts from W + Σ_{i < t} ΔW_i, as the authors start a task from its language's change, and takes two
    phases, each with a new optimiser (and the same order of examples):
    - full: every entry of the targets is trained; then the K entries that moved most are chosen over all targets
      together, and everything returns to the task's start;
    - sparse: those K entries alone are trained, ΔW_t; all other entries stay as they were, to the bit.
    With `iterations` n, the two come n times: each full phase goes on from what is learnt, and each choice adds K / n
    entries to those chosen before. Earlier tasks' changes are frozen; one entry may be in several, and then adds up.
    At test time all are active, whatever the task. A folder of adapters per task is saved; any of them can be
    activated alone, or with others that were learnt elsewhere, in any order. What the adapter does: `folklora.LTSFT`.

    The authors train languages for 100 epochs and tasks for 2 to 10, with AdamW at 5e-5, and a batch of several
    languages at a time where there are several; here a stream has one kind of task.

    Source: Ansell, Ponti, Korhonen, Vulić, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022,
    arXiv 2110.07560.

    When to choose:
        Each task's change should be small and usable by itself or in sums. It needs the memory of full fine-tuning and
        twice the steps. All changes act on all inputs, so tasks that contradict each other disturb one another, the
        more the more entries they have.

    Equation:
        W_t = W_0 + \sum_{i \le t} \phi_i
        \phi_t = 0 \text{ outside } \mathcal{M}_t = \mathrm{top}_K \, \lvert W^{\text{full}}_t - W_{t-1} \rvert

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"density": 0.05, "target_modules": ["q_proj", "v_proj"]}
        run = learn(model_folder(), tasks, method="lt-sft", out="runs/lt-sft", options=options)
        print(run.results["methods"]["lt-sft"]["average_accuracy"])

    Args:
        adapter: The LT-SFT adapter of each task.
        iterations: n, how many times both phases come.
        full_epochs: Epochs of a full phase; None takes those of the training.
        sparse_epochs: Epochs of a sparse phase; None takes those of the training.
    """

    adapter: LTSFT = field(default_factory=LTSFT)
    iterations: int = 1
    full_epochs: float | None = None
    sparse_epochs: float | None = None

    method: ClassVar[str] = "lt-sft"
    paper: ClassVar[str] = "Ansell et al. 2022, arXiv 2110.07560"
    trains: ClassVar[str] = "K entries of the weights a task; all are summed"

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, LTSFT):
            raise ValueError(f"lt-sft needs an LTSFT adapter, not {type(self.adapter).__name__}")
        if self.adapter.modules_to_save:
            raise ValueError("lt-sft adds the tasks' changes up, which modules_to_save cannot be: leave it out")
        if not self.adapter.full or self.adapter.counts:
            raise ValueError("lt-sft sets full and counts as the stream goes by: leave them out")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        for name in ("full_epochs", "sparse_epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")

    @property
    def phases(self) -> Sequence[Phase]:
        """Full and sparse, `iterations` times."""
        return (Phase("full", self.full_epochs), Phase("sparse", self.sparse_epochs)) * self.iterations

    def start(self, model: PreTrainedModel, adapter_name: str = "task_0") -> PeftModel:
        """Put the first task's adapter on the base model.

        Raises:
            ValueError: More entries are to be chosen than there are, or fewer than there are iterations.
        """
        adapted = super().start(model, adapter_name)
        wanted = self._wanted(adapted, adapter_name)
        if wanted < self.iterations:
            raise ValueError(f"K={wanted} entries cannot be chosen in {self.iterations} iterations")
        return adapted

    def enter(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int, phase: int
    ) -> None:
        """Open all entries again, or choose this iteration's share of the K."""
        name = f"task_{index}"
        iteration, sparse = divmod(phase, 2)
        if sparse:
            wanted = self._wanted(model, name)
            select(model, wanted * (iteration + 1) // self.iterations - wanted * iteration // self.iterations, name)
        elif iteration:
            reopen(model, name)

    def _wanted(self, model: PeftModel, name: str) -> int:
        """K over all targets."""
        return self.adapter.wanted(sum(layer.in_features * layer.out_features for layer, _ in updates_of(model, name)))
