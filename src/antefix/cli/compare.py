"""`antefix compare`: several recipes, several seeds, one test set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from antefix.cli.output import Json, console, print_json
from antefix.errors import CommandError

if TYPE_CHECKING:
    from rich.table import Table

    from antefix.training.compare import ComparisonPlan, Row
    from antefix.training.loop import StepReport


def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes: a method each.")],
    test: Annotated[str, typer.Option(help="The data file whose sources are answered and scored.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of all runs, the table and the plot; resumes.")],
    seeds: Annotated[str, typer.Option(metavar="A,B,C", help="Seeds: a run of every recipe each.")] = "0,1,2",
    metrics: Annotated[
        str | None, typer.Option(metavar="A,B", help="Scores, the first one decides; without: the task's own.")
    ] = None,
    unequal: Annotated[bool, typer.Option("--unequal", help="Recipes may differ in data and budget.")] = False,
    as_json: Json = False,
) -> None:
    """Train every recipe under every seed, answer the test set, and say which does best, and for how many values.

    How long it takes is said first. Interrupted, the same command goes on. A paired bootstrap over the test set
    compares every recipe with the best, seed by seed.

    Example: `antefix compare prefix.toml lora.toml --test test.csv --out comparison`
    """
    from antefix.cli.progress import LiveLine, clock
    from antefix.cli.stopping import stop_after_step
    from antefix.processes import check_alone
    from antefix.training.compare import base_loader, expected_seconds, finish, plan_of, table, write_table
    from antefix.training.recipe import load_recipe

    check_alone("a comparison")
    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise CommandError(f"--seeds {seeds}: whole numbers, separated by commas") from error
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    plan = plan_of([load_recipe(path) for path in recipes], chosen, test, names, out, unequal=unequal)
    screen, base_of = console(), base_loader()
    left = [one for one in plan.runs if not one.is_done]
    if left:
        with screen.status("measuring how long it takes"):
            seconds = expected_seconds(plan, base_of)
        screen.print(f"{len(plan.runs)} runs, {len(left)} are left: about {clock(seconds)}", highlight=False)
    with stop_after_step() as stop_requested, LiveLine(screen, len(plan.runs), "run") as line:
        for one in sorted(left, key=lambda r: (r.recipe.base, r.recipe.dtype)):
            number = plan.runs.index(one) + 1
            what = f"{one.recipe.name}, seed {one.seed}"
            line.show(number - 1, what, always=True)

            def show(report: StepReport, number: int = number, what: str = what) -> None:
                line.show(number - 1, f"{what}: step {report.step}/{report.num_steps}")

            finish(one, plan, base_of(one.recipe), show, stop_requested)
    rows = table(plan)
    write_table(rows, plan)
    if as_json:
        print_json({"metrics": plan.metrics, "rows": [row.to_dict() for row in rows]})
        return
    screen.print(_table(rows, plan))
    typer.echo(f"the table and a plot are in {out}")


def _table(rows: list[Row], plan: ComparisonPlan) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(box=SIMPLE)
    for head in (
        "recipe",
        *(m.replace("_", " ") for m in plan.metrics),
        "trained",
        "kept",
        "seconds",
        "minus the best",
    ):
        made.add_column(head, justify="left" if head == "recipe" else "right")
    for row in rows:
        found = row.against_best.values()
        differences = ", ".join(f"{c.difference:+.3f}{'*' if c.p_value < 0.05 else ''}" for c in found)
        scores = (f"{row.mean(m):.4f} ± {row.spread(m):.4f}" for m in plan.metrics)
        made.add_row(
            row.name, *scores, f"{row.trained:,}", f"{row.kept:,}", f"{row.seconds:,.0f}", differences or "best"
        )
    made.caption = "mean ± standard deviation over seeds; differences seed by seed, * where p < 0.05 (paired bootstrap)"
    return made
