"""ProgPrompt: a soft prompt for each task, before those of all earlier tasks, which are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from folklora.continual.per_task import PerTask
from folklora.prompts import SoftPrompt, fold
from folklora.stream.tasks import Task


@dataclass
class ProgPrompt(PerTask):
    r"""Progressive Prompts: task t trains a prompt P_t [L_p, d] that stands before the older ones.

    The frozen model reads [P_t ; P_{t-1} ; ... ; P_1 ; embed(x)]: t L_p + n positions for n tokens. P_t starts at the
    embeddings of random tokens, and it alone is trained. Task i is answered with P_i, ..., P_1, whatever was learnt
    since: forgetting is 0 by construction, and a task can use what the older prompts hold. L_p d trained parameters a
    task. With the adapter's option `mlp`, P_t + MLP_t(P_t) stands in the place of P_t while the task is learnt and is
    written into P_t after it, so nothing more is stored; its width is `bottleneck`, 800 in the reference code. That
    code's MLP1 fails where it is to normalise; here it is the other form, with tanh between two linear layers.

    Prompts stand before a row's first token, behind padding on the left, as in the paper. With the adapter's option
    `place` of "answer" they stand within the question, before its last token: a causal model's prompt then reads the
    text, where one at the front can only be read. They come on top of `max_length` (the reference code cuts the end of
    the text to make room), so the model must take max_length + T L_p positions. The reference keeps the prompt of the
    best validation score; here the last one stays. It trains T5, whose embeddings are large, with learning_rate=0.3 and
    weight_decay=1e-5. This library's default rate is far too low for any prompt.

    With one task at the front this is PEFT's prompt tuning, to rounding: that prompts learn slowly is not a matter of
    this code. On the demo's model (3.2 M parameters) and its task `opinion` (3 answers, guessing gives 33 %), prompts
    at the front were at 42 % after 500 steps of 8 examples (L_p 20, rate 0.03), and no better after 1000 at 0.1.
    Before the question's last token the demo's settings (L_p 10, 630 steps at 0.03) gave 93 %. In `shelf` (6 answers),
    which is easier, it was 61 % after 300 steps against 100 % after 200. One seed each.

    Source: Razdaibiedina, Mao, Hou, Khabsa, Lewis, Almahairi, "Progressive Prompts: Continual Learning for Language
    Models", ICLR 2023, arXiv 2301.12314.

    When to choose:
        The task is known when it is asked, and it may cost a few thousand numbers at most. It is told the task, so
        compare it with `per-task` and not with methods that are not. Prompts learn slowly, and need a high learning
        rate and many steps; for small causal models take `place` "answer", about 0.03 and some 600 steps a task. Each
        task makes every later input longer.

    Equation:
        x_t = [P_t; P_{t-1}; \ldots; P_1; \mathrm{embed}(x)]
        \min_{P_t} \; -\sum_{(x, y)} \log p_\theta(y \mid x_t)

    Example:
        from folklora import learn
        from folklora.demo import model_folder
        from folklora.demo.tasks import demo_tasks

        tasks = demo_tasks(train=12, test=6)[:2]
        options = {"prompt_length": 4, "place": "answer", "learning_rate": 0.03, "max_length": 96}
        run = learn(model_folder(), tasks, method="progprompt", out="runs/progprompt", options=options)
        print(run.results["methods"]["progprompt"]["average_accuracy"])

    Args:
        adapter: Each task's prompt, a `folklora.prompts.SoftPrompt`. Its options: prompt_length, L_p (10; the paper
            goes up to 50); place, "front" (the paper's) or "answer"; mlp, "none", "mlp1" or "mlp2"; bottleneck, the
            MLP's width (800).
    """

    adapter: SoftPrompt = field(default_factory=SoftPrompt)

    method: ClassVar[str] = "progprompt"
    paper: ClassVar[str] = "Razdaibiedina et al. 2023, arXiv 2301.12314"
    trains: ClassVar[str] = "a new soft prompt a task; the task is known"

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, SoftPrompt):
            raise ValueError(f"progprompt needs a SoftPrompt, not {type(self.adapter).__name__}")

    def activate(self, model: PeftModel, index: int) -> None:
        """The task's prompt and those of all earlier tasks, the newest first."""
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter([f"task_{i}" for i in range(index + 1)])

    def finish(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], index: int
    ) -> dict[str, Tensor]:
        """Write the MLP, where there is one, into the prompt."""
        fold(model, f"task_{index}")
        return {}
