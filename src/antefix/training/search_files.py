"""What a search leaves for people to look at: `results.json`, `search.png`, and `best.toml`, a recipe to train."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antefix import atomic
from antefix.errors import TrainingError
from antefix.training.recipe import Recipe, with_values
from antefix.training.space import Range
from antefix.training.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS_FILE, PLOT_FILE, BEST_FILE = "results.json", "search.png", "best.toml"
_PANELS_A_ROW = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A finished search."""

    metric: str
    """`dev_loss`, less is better, or a score (`dev_bleu`), more is."""
    space: Mapping[str, Range]
    seed: int
    trials: Sequence[Trial]
    """The best first."""
    best: Trial | None
    """None: every trial failed."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.metric,
            "space": {key: values.model_dump(exclude_unset=True) for key, values in self.space.items()},
            "seed": self.seed,
            "best": None if self.best is None else self.best.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "versions": {name: version(name) for name in ("antefix", "optuna", "torch", "transformers")},
        }


def write_found(found: Found, recipe: Recipe, folder: Path) -> None:
    """Write the files; without a best trial the results alone. Raises TrainingError where one cannot be written."""
    path = folder / RESULTS_FILE
    try:
        atomic.write_bytes(path, (json.dumps(found.to_dict(), ensure_ascii=False, indent=2) + "\n").encode())
        for path in (folder / PLOT_FILE, folder / BEST_FILE):
            if found.best is None:
                path.unlink(missing_ok=True)
        if found.best is not None:
            path = folder / BEST_FILE
            atomic.write_bytes(path, best_recipe(found, found.best, recipe).encode())
            path = folder / PLOT_FILE
            _draw(found, recipe.name, path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror or error})") from error


def best_recipe(found: Found, best: Trial, recipe: Recipe) -> str:
    """The recipe with the best trial's values, without its search, as TOML."""
    content = with_values(recipe, best.values).model_dump(exclude_unset=True, exclude_none=True, exclude={"search"})
    what = found.metric.replace("_", " ")
    lines = [
        f"# The best of {len(found.trials)} trials of `antefix search`: {what} {best.score:.4f} at step "
        f"{best.kept_step}.",
        *(f"# {key} = {_toml(value)}" for key, value in best.values.items()),
        *_section(content),
    ]
    return "\n".join(lines) + "\n"


def _section(content: Mapping[str, Any], name: str = "") -> Iterator[str]:
    """The lines of a TOML table, those of its own keys before those of the tables in it."""
    for key, value in content.items():
        if not isinstance(value, dict):
            yield f"{_key(key)} = {_toml(value)}"
    for key, value in content.items():
        if isinstance(value, dict):
            full = f"{name}.{_key(key)}" if name else _key(key)
            yield from ("", f"[{full}]", *_section(value, full))


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str | bool):  # a JSON text is a TOML one, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)  # numbers, dates


def _draw(found: Found, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(len(found.space), _PANELS_A_ROW)
    rows = -(-len(found.space) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 5), 3.2 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (key, values) in zip(panels.flat, found.space.items(), strict=False):
        _draw_panel(axes, found, key, values)
    for axes in panels.flat[len(found.space) :]:
        axes.set_visible(False)
    for row in panels:
        row[0].set_ylabel(found.metric.replace("_", " "))
    panels.flat[0].legend(frameon=False, fontsize="small")
    failed = sum(trial.state == "failed" for trial in found.trials)
    figure.suptitle(f"{title}: {len(found.trials)} trials" + (f", {failed} of them failed" if failed else ""))
    figure.savefig(path, dpi=140)


def _draw_panel(axes: Axes, found: Found, key: str, values: Range) -> None:
    from matplotlib.ticker import MaxNLocator

    def place(trial: Trial) -> Any:
        value = trial.values[key]
        return value if values.choices is None else values.choices.index(value)

    for state, face in (("done", "tab:blue"), ("pruned", "none")):
        points = [(place(t), t.score) for t in found.trials if t.state == state]
        if points:
            axes.scatter(*zip(*points, strict=True), facecolors=face, edgecolors="tab:blue", label=state)
    if found.best is not None and found.best.score is not None:
        axes.scatter(place(found.best), found.best.score, marker="*", s=160, color="tab:orange", zorder=3, label="best")
    if values.choices is not None:
        axes.set_xticks(range(len(values.choices)), [str(choice) for choice in values.choices])
        axes.margins(x=0.15)
    elif values.log:
        axes.set_xscale("log")
    elif isinstance(values.low, int) and isinstance(values.high, int):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(key)
    axes.spines[["top", "right"]].set_visible(False)
