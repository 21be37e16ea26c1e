"""What the command line shows while a stream is learnt or models are merged."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class LearnDisplay:
    """Shows what a stream is doing: a bar for the task's steps, a line for each finished row."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = self.console.is_terminal
        self.bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), console=console, transient=True,
        )  # fmt: skip
        self.current = self.bar.add_task("starting", total=None, note="")
        self.method, self.stages = "", 0

    def __enter__(self) -> LearnDisplay:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.bar.stop()

    def tell(self, event: str, **details: Any) -> None:
        """Take one event of `folklora.learn`."""
        from accelerate import PartialState

        if PartialState().is_main_process:
            getattr(self, f"_on_{event}")(**details)

    def _on_method(self, method: str, stages: int, done: int) -> None:
        self.method, self.stages = method, stages
        after = f", going on after {done}" if done else ""
        self.console.print(f"[bold]{method}[/bold]: {stages} task{'s' * (stages > 1)}{after}")

    def _on_calibrate(self, method: str, examples: int) -> None:
        self.bar.reset(self.current, description=f"{method}: calibrating", total=None, note=f"{examples} examples")

    def _on_train(self, method: str, task: str, index: int, examples: int) -> None:
        text = f"{method}: learning {task} ({index + 1} of {self.stages})"
        self.bar.reset(self.current, description=text, total=None, note=f"{examples} examples")

    def _on_step(self, step: int, steps: int, loss: float | None) -> None:
        note = "" if loss is None else f"loss {loss:.3f}"
        self.bar.update(self.current, completed=step, total=steps, note=note)

    def _on_evaluate(self, task: str, index: int) -> None:
        self.bar.update(self.current, description=f"{self.method}: asking {task}", total=None, note="")

    def _on_row(self, method: str, index: int, row: list[float | None]) -> None:
        words = ["    –" if value is None else f"{value:5.1f}" for value in row]
        self.console.print(f"  after task {index + 1}:  " + "  ".join(words), highlight=False)


class MergeDisplay:
    """Shows how far a merge is: tensors, bytes and the time that is left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("merging"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(), console=console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.current = self.bar.add_task("", total=None, note="")
        self.tensors, self.said = 0, ""

    def __enter__(self) -> MergeDisplay:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def tell(self, event: str, tensors: int, bytes: int, files: int = 0, left_out: tuple[str, ...] = ()) -> None:
        """Take one event of `merge_models`."""
        if left_out:
            self.console.print(f"left out, since not every model has them: {', '.join(left_out)}", soft_wrap=True)
        if event == "plan":
            self.tensors = tensors
            self.said = f"{tensors} tensors, {decimal(bytes)}, {files} file{'s' * (files > 1)}"
            self.bar.update(self.current, total=bytes)
        else:
            self.bar.update(self.current, completed=bytes, note=f"{tensors} of {self.tensors} tensors")
