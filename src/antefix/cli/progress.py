"""Live lines for long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

if TYPE_CHECKING:
    from antefix.training.loop import StepReport

_PLAIN_LINE_SECONDS = 30.0
_SILENT_SECONDS = 2.0


class LiveLine:
    """A bar with a message after it. Without a terminal: the message, every half minute and at the end."""

    def __init__(self, out: Console, total: int, unit: str) -> None:
        self._out, self._total, self._unit = out, total, unit
        self._bar: Progress | None = None
        if out.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=out,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, message: str, *, total: int | None = None, always: bool = False) -> None:
        """done: of the total, which may change. always: print the message even without a terminal."""
        self._total = self._total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, description=message)
        now = time.monotonic()
        if always or (self._bar is None and (now - self._last >= _PLAIN_LINE_SECONDS or done == self._total)):
            self._out.print(f"{self._unit} {done}/{self._total}  {message}", highlight=False, soft_wrap=True)
            self._last = now


class Reading:
    """Watches something that takes a while only where there is much of it: shown from the third second on."""

    def __init__(self, unit: str) -> None:
        self._unit, self._began = unit, time.monotonic()
        self._line: LiveLine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.__exit__(kind, error, trace)

    def __call__(self, done: int, total: int) -> None:
        """So many of so many are done."""
        seconds = time.monotonic() - self._began
        if seconds < _SILENT_SECONDS or not done:
            return
        if self._line is None:
            self._line = LiveLine(Console(stderr=True), total, self._unit)
            self._line.__enter__()
        self._line.show(done, f"{clock(seconds / done * (total - done))} left", total=total)


class TrainingProgress(LiveLine):
    """Watches a training run."""

    def __init__(self, out: Console) -> None:
        super().__init__(out, 0, "step")
        self._dev = ""
        self._said_padded = False

    def __call__(self, report: StepReport) -> None:
        """One step is done."""
        if report.batch_form == "padded" and not self._said_padded:
            self._out.print("rows are not packed here: every source and target is a row of its own", highlight=False)
            self._said_padded = True
        if report.dev_scores:
            scores = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in report.dev_scores.items())
            self._dev = f"  {scores}"
        star = "  (best so far)" if report.is_best else ""
        self.show(
            report.step,
            f"loss {report.loss:.3f}{self._dev}{star}  {report.pairs_per_second:.1f} pairs/s  "
            f"{clock(report.seconds_left)} left",
            total=report.num_steps,
            always=report.dev_scores is not None,
        )


def clock(seconds: float) -> str:
    """`1:05`, `2:03:04`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
