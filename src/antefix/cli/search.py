"""`antefix search`: many short runs of one recipe, for the values that score best."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from antefix.cli.output import Json, console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from antefix.cli.progress import LiveLine
    from antefix.training.search import SearchReport
    from antefix.training.search_files import Found
    from antefix.training.trials import Trial

_STOPPING = b"stopping after this step; the same command does this trial again (Ctrl-C again: stop at once)\n"


def search(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a TOML file; its section `[search]` says what is tried.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many; without: as the recipe says.")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Drop the trials that are kept and start anew.")] = False,
    as_json: Json = False,
) -> None:
    """Train with many values of a recipe's keys, and find those with the best dev score.

    An interrupted search goes on when the same command is given again, and a finished one with more --trials: trials
    that ended are kept, one that was cut off is done again.

    Example: `antefix search menus.toml --trials 20`
    """
    from antefix.cli.progress import LiveLine
    from antefix.cli.stopping import stop_after_step
    from antefix.training.recipe import load_recipe
    from antefix.training.search import search as run_search
    from antefix.training.search import search_folder
    from antefix.training.search_files import BEST_FILE

    loaded = load_recipe(recipe, overrides or [])
    num_trials = trials or loaded.search.trials
    out = console()
    with stop_after_step(_STOPPING) as stop_requested, LiveLine(out, num_trials, "trial") as line:
        found = run_search(
            loaded, trials=num_trials, anew=anew, watch=lambda report: _show(line, report),
            stop_requested=stop_requested,
        )  # fmt: skip
    folder = search_folder(loaded)
    if as_json:
        print_json(found.to_dict() | {"folder": str(folder), "recipe": str(folder / BEST_FILE)})
        return
    from rich.console import Console

    Console().print(_table(found))
    typer.echo(f"the best values are in {folder / BEST_FILE}; all trials and a plot beside it")
    out.print(f"next: antefix train {shlex.quote(str(folder / BEST_FILE))}", highlight=False, soft_wrap=True)


def _show(line: LiveLine, report: SearchReport) -> None:
    from antefix.cli.progress import clock

    best = "" if report.best is None else f"  best so far {report.best.score:.4f} (trial {report.best.number})"
    left = f"  {clock(report.seconds_left)} left"
    if report.ended is not None:
        line.show(report.trial, f"{_outcome(report.ended)}{best}{left}", total=report.num_trials, always=True)
    elif report.step is not None:
        step = f"step {report.step.step}/{report.step.num_steps}, loss {report.step.loss:.3f}"
        line.show(report.trial - 1, f"trial {report.trial}: {step}{best}{left}", total=report.num_trials)


def _outcome(trial: Trial) -> str:
    values = ", ".join(f"{_short(key)} {_cell(value)}" for key, value in trial.values.items())
    return f"{values}: {trial.state if trial.score is None else f'{trial.score:.4f}'}{_note(trial, ', ')}"


def _note(trial: Trial, before: str = "") -> str:
    if trial.same_as is not None:
        return f"{before}as trial {trial.same_as}"
    if trial.state == "pruned":
        return f"{before}pruned"
    return "" if trial.why is None else f"{before}{trial.why}"


def _short(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(found: Found) -> Table:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE)
    for head in ("trial", found.metric.replace("_", " "), *map(_short, found.space), "step", "seconds"):
        table.add_column(head, justify="right")
    table.add_column("")
    for trial in found.trials:
        table.add_row(
            str(trial.number),
            "-" if trial.score is None else f"{trial.score:.4f}",
            *(escape(_cell(trial.values[key])) for key in found.space),
            "-" if trial.kept_step is None else str(trial.kept_step),
            f"{trial.seconds:,.1f}",
            escape(_note(trial) or ("best" if trial == found.best else "")),
        )
    return table
