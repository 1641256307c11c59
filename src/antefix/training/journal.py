"""What a run leaves for people to look at: `log.jsonl`, a line a step, and `curve.png`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from antefix import atomic
from antefix.errors import TrainingError
from antefix.training.loop import StepReport

LOG_FILE = "log.jsonl"
PLOT_FILE = "curve.png"


class Journal:
    """Writes the log of one run. Steps that an interruption undid are dropped when they are done again."""

    def __init__(self, run_folder: Path) -> None:
        self._log = run_folder / LOG_FILE
        self._plot = run_folder / PLOT_FILE
        self._rows: list[dict[str, Any]] | None = None

    def note(self, report: StepReport) -> None:
        """Append a step. Raises TrainingError when the log cannot be written."""
        row = {
            "step": report.step,
            "loss": round(report.loss, 6),
            "learning_rate": report.learning_rate,
            "pairs_per_second": round(report.pairs_per_second, 2),
            **(report.dev_scores or {}),
        }
        try:
            if self._rows is None:
                self._rows = [r for r in read_log(self._log) if r["step"] < report.step]
                self._log.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_bytes(self._log, "".join(json.dumps(r) + "\n" for r in self._rows).encode())
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise TrainingError(f"{self._log}: cannot be written ({error.strerror or error})") from error
        self._rows.append(row)

    def plot(self, title: str) -> None:
        """Draw loss and dev scores over the steps. Raises TrainingError when the plot cannot be written."""
        rows = read_log(self._log)
        if not rows:
            return
        try:
            _draw(rows, title, self._plot)
        except OSError as error:
            raise TrainingError(f"{self._plot}: cannot be written ({error.strerror or error})") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that an interruption cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [r["step"] for r in rows]
    losses = [r["loss"] for r in rows]
    axes.plot(steps, losses, color="0.75", linewidth=1, label="training loss of a step")
    axes.plot(steps, _smooth(losses), color="tab:blue", label="smoothed")
    dev = [(r["step"], r["dev_loss"]) for r in rows if "dev_loss" in r]
    if dev:
        best = min(dev, key=lambda point: point[1])
        axes.plot(*zip(*dev, strict=True), "o-", color="tab:orange", label="dev loss")
        axes.annotate(f"{best[1]:.3f}", best, textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(xlabel="optimiser step", ylabel="loss", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run."""
    keep = math.exp(-1 / max(len(values) / 20, 1))
    mean, smoothed = values[0], []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        smoothed.append(mean)
    return smoothed
