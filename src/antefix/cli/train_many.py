"""`antefix train-many`: a prefix for each value of a column, many trained together, on one machine or on several."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antefix.cli.output import Json, console, print_json
from antefix.cli.stopping import stop_after_step
from antefix.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from antefix.base import Base
    from antefix.training.many import ManyReport
    from antefix.training.many_ray import Cluster
    from antefix.training.many_report import UsersReport
    from antefix.training.many_run import ManyPlan
    from antefix.training.recipe import Recipe
    from antefix.training.users import User, Users

_STOPPING = (
    b"stopping when all at work have saved what they have; the same command goes on (Ctrl-C again: stop at once)\n"
)


def train_many(
    data: Annotated[str, typer.Argument(help="The data: a file, `archive.zip::member.csv`, or `hf:owner/name`.")],
    recipe: Annotated[
        Path, typer.Argument(help="A recipe; its `data.train` is replaced, its `name` begins all names.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="COLUMN", help="A column, or an attribute of the tables; several: say it again."),
    ] = None,
    min_pairs: Annotated[int, typer.Option(min=1, help="Who has fewer pairs gets no prefix.")] = 8,
    keep_empty: Annotated[
        bool,
        typer.Option("--keep-empty", help="With several columns, an empty cell is a value; else its row is left out."),
    ] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Train one prefix on all rows first, and start all others from it.")
    ] = False,
    at_work: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            min=1,
            help="So many tokens' worth of steps are at work at once; four batches' by default.",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Train in so many processes, through Ray.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster that runs already (`auto`: this machine's); with --workers.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace prefixes of these names that are another recipe's.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data, say who would be trained, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a prefix for each value of a column (a customer, a domain, a style), many of them together.

    Several users' rows share a forward pass; each prefix becomes what it becomes alone. A user whose data did not
    change is not trained again: given again, the command trains who is new, who changed, and who was not done when it
    was interrupted. The run's folder gets a report and a plot. The exit code is 1 where some user failed.

    Examples:

    `antefix train-many orders.csv menus.toml --by customer training.epochs=8`

    `antefix train-many e2e-dataset.zip::trainset.csv e2e.toml --by name --by priceRange --min-pairs 16 --workers 2`
    """
    from antefix import processes
    from antefix.training.many_ray import Cluster
    from antefix.training.many_report import report_of, write_report
    from antefix.training.many_run import plan_many, started_from
    from antefix.training.recipe import load_recipe
    from antefix.training.users import users_of

    if not by:
        raise CommandError("say by which column or attribute: --by customer")
    if address is not None and workers is None:
        raise CommandError("--address is a Ray cluster's: say how many of its processes to use with --workers")
    processes.check_alone("train-many", "it shares its users over Ray (--workers), not over a launcher")
    loaded = load_recipe(recipe, [f"data.train={json.dumps(data)}", *(overrides or [])])
    everybody = users_of(loaded, by, min_pairs, keep_empty=keep_empty)
    out = console()
    _say_who(out, everybody, min_pairs)
    if dry_run:
        if as_json:
            print_json(_facts(everybody))
        return
    base: Base | None = None
    with stop_after_step(_STOPPING) as stop_requested:
        if shared:
            base = _shared(out, loaded, everybody, stop_requested)
            loaded = started_from(loaded, loaded.prefix_folder)
        plan = plan_many(loaded, everybody, overwrite=overwrite)
        if plan.unchanged:
            out.print(f"done already: {len(plan.unchanged):,} of {len(everybody.users):,}", highlight=False)
        failed: dict[str, str] = {}
        cluster = None if workers is None else Cluster(num_workers=workers, address=address, tokens_at_work=at_work)
        try:
            if plan.waiting:
                _train(out, plan, base, cluster, at_work, failed, stop_requested, overwrite)
        finally:  # what was kept so far is told in any case
            report = report_of(plan, failed)
            write_report(report, loaded.run_folder, loaded.name)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report, loaded)
    if failed:
        raise typer.Exit(1)


def _train(
    out: Console, plan: ManyPlan, base: Base | None, cluster: Cluster | None, at_work: int | None,
    failed: dict[str, str], stop_requested: Callable[[], bool], overwrite: bool,
) -> None:  # fmt: skip
    """Train who waits, here or on a cluster, with a live line. failed: gets name -> why."""
    from antefix.cli.progress import LiveLine
    from antefix.training.many import train_many as train_together
    from antefix.training.many_ray import train_over_ray
    from antefix.training.many_run import work_of
    from antefix.training.prepared import recipe_base

    def fail(user: User, reason: str) -> None:
        failed[user.name] = reason
        out.print(f"{user.name} failed: {reason}", highlight=False, soft_wrap=True)

    with LiveLine(out, len(plan.waiting), "user") as line:
        if cluster is not None:

            def watch_all(num_done: int, reports: Sequence[ManyReport]) -> None:
                done = num_done + sum(report.num_done for report in reports)
                line.show(done, _message(reports, len(plan.waiting) - num_done))

            train_over_ray(plan, cluster, fail, overwrite=overwrite, watch=watch_all, stop_requested=stop_requested)
        else:
            base = base or recipe_base(plan.recipe)
            work = work_of(plan, plan.waiting, base, fail, tokens_at_work=at_work)
            train_together(
                base,
                work,
                watch=lambda report: line.show(report.num_done, _message([report], report.num_users)),
                stop_requested=stop_requested,
            )
        line.show(len(plan.waiting), "all done")


def _message(reports: Sequence[ManyReport], num_left: int) -> str:
    """Of the groups at work. num_left: users who are not in a finished group."""
    from antefix.cli.progress import clock

    if not reports:
        return "starting"
    users = sum(report.num_users for report in reports)
    seconds = sum(report.seconds_left for report in reports) / len(reports) * max(1.0, num_left / users)
    loss = sum(report.loss for report in reports) / len(reports)
    at_work = sum(report.num_at_work for report in reports)
    rate = sum(report.steps_per_second for report in reports)
    return f"{at_work} at work  loss {loss:.3f}  {rate:.1f} steps/s  {clock(seconds)} left"


def _shared(out: Console, recipe: Recipe, everybody: Users, stop_requested: Callable[[], bool]) -> Base | None:
    """See that the bank has the prefix that all start from; the base, if it was needed."""
    from antefix.cli.progress import TrainingProgress
    from antefix.training.many_run import shared_is_kept, started_from, train_shared
    from antefix.training.prepared import recipe_base

    started_from(recipe, recipe.prefix_folder)  # refused before the work, not after it
    if shared_is_kept(recipe):
        out.print(
            f"all start from {recipe.prefix_folder}, which is there (remove it to train it anew)", highlight=False
        )
        return None
    out.print(f"training {recipe.prefix_folder} on all rows, for all to start from", highlight=False)
    base = recipe_base(recipe)
    with TrainingProgress(out) as progress:
        train_shared(recipe, everybody, base, progress, stop_requested)
    return base


def _say_who(out: Console, everybody: Users, min_pairs: int) -> None:
    pairs = sorted(user.num_pairs for user in everybody.users)
    out.print(
        f"{len(pairs):,} users, {sum(pairs):,} pairs to train on ({pairs[0]:,} to {pairs[-1]:,} each)", highlight=False
    )
    for column, rows in everybody.without_value.items():
        out.print(f"left out: {rows:,} rows have nothing in '{column}'", highlight=False)
    if everybody.skipped:
        pairs_left = sum(one.num_pairs for one in everybody.skipped)
        out.print(
            f"skipped: {len(everybody.skipped):,} users with fewer than {min_pairs} pairs, {pairs_left:,} in all "
            "(--min-pairs)",
            highlight=False,
        )


def _facts(everybody: Users) -> dict[str, Any]:
    return {
        "users": [{"name": user.name, "by": dict(user.by), "pairs": user.num_pairs} for user in everybody.users],
        "skipped": [{"by": dict(one.by), "pairs": one.num_pairs} for one in everybody.skipped],
        "rows_without_value": dict(everybody.without_value),
    }


def _show(report: UsersReport, recipe: Recipe) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    facts = report.to_dict()
    table = Table(box=SIMPLE, title=f"the worst {len(report.worst)}", title_justify="left")
    for head in ("prefix", "pairs", "dev loss", "base's", "reason"):
        table.add_column(head, justify="left" if head in ("prefix", "reason") else "right", overflow="fold")
    for row in report.worst:
        losses = ("-" if value is None else f"{value:.3f}" for value in (row.dev_loss, row.base_dev_loss))
        table.add_row(row.name, str(row.pairs), *losses, "; ".join(row.reasons) or "least gained, no reason seen")
    Console().print(table)
    typer.echo(
        f"{facts['trained']:,} trained, {facts['unchanged']:,} unchanged, {facts['failed']:,} failed, in {recipe.bank}"
        f"; report and plot in {recipe.run_folder}"
    )
