"""`antefix demo`: the whole chain on the embedded base, in minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antefix.cli.output import Json, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from antefix.base import Base
    from antefix.data import Example
    from antefix.demo import Measured
    from antefix.prefix import Prefix

_SHOWN = 5


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's bank, log, curve and texts go.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Train a prefix on a small data set of our own, and show what it changes.

    Fetches the embedded base (about 100 MB) where it is not there yet. Interrupted, training goes on where it stopped,
    and what was finished is not done again.

    Example: `antefix demo`
    """
    from antefix import embedded
    from antefix.base import load_base
    from antefix.demo import tables

    out = console()
    embedded.fetch(lambda line: out.print(line, highlight=False))
    base = load_base(embedded.NAME)
    test = tables("test")
    before = _measured(out, folder / "before.json", "bare base", base, None, test)
    prefix = _trained(out, folder, base)
    after = _measured(out, folder / "after.json", "with the prefix", base, prefix, test)
    result = _summary(base, prefix, before, after, len(test), folder)
    if as_json:
        print_json(result | {"texts": _side_by_side(test, before, after)})
        return
    _show(result, _side_by_side(test, before, after))


def _measured(out: Console, kept: Path, name: str, base: Base, prefix: Prefix | None, test: list[Example]) -> Measured:
    """Measure once; a demo that was interrupted finds what it measured before."""
    from antefix import atomic
    from antefix.cli.progress import LiveLine, clock
    from antefix.demo import Measured, key_of_texts, measure
    from antefix.pace import Pace

    key = key_of_texts(base, prefix)
    if kept.is_file():
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content.get("task") == key:
            return Measured(content["texts"], content["scores"])
    out.print(f"writing {len(test)} test texts, {name}")
    with LiveLine(out, len(test), "text") as line:

        def watch(pace: Pace) -> None:
            line.show(pace.done, f"{name}  {clock(pace.seconds_left)} left")

        measured = measure(base, prefix, test, watch)
    atomic.write_bytes(
        kept, json.dumps({"task": key, "texts": measured.texts, "scores": measured.scores}, indent=1).encode()
    )
    return measured


def _trained(out: Console, folder: Path, base: Base) -> Prefix:
    from antefix.cli.progress import TrainingProgress
    from antefix.cli.stopping import stop_after_step
    from antefix.demo import Training
    from antefix.prefix import Prefix

    place = folder / "bank" / "demo"
    if place.is_dir():
        out.print(f"the prefix is there: {place}")
        return Prefix.load(place)
    training = Training(base, folder / "run")
    out.print(f"training a prefix on {training.num_pairs} pairs, {training.num_steps} steps")
    with stop_after_step() as stop_requested, TrainingProgress(out) as progress:
        prefix = training(progress, stop_requested)
    prefix.save(place)
    return prefix


def _summary(
    base: Base, prefix: Prefix, before: Measured, after: Measured, num_tests: int, folder: Path
) -> dict[str, Any]:
    base_bytes = sum(p.numel() * p.element_size() for p in base.model.parameters())
    return {
        "test_tables": num_tests,
        "before": before.scores,
        "after": after.scores,
        "prefix": str(folder / "bank" / "demo"),
        "prefix_bytes": prefix.num_bytes,
        "base_bytes": base_bytes,
        "share": prefix.num_bytes / base_bytes,
        "training_seconds": prefix.card.training["seconds"],
    }


def _side_by_side(test: list[Example], before: Measured, after: Measured) -> list[dict[str, str]]:
    """Five tables, spread over the domains."""
    from antefix.data.linearise import TextFormat

    chosen = [round(n * (len(test) - 1) / (_SHOWN - 1)) for n in range(_SHOWN)]
    written = TextFormat(linearise="table")
    return [
        {"table": written.source_text(test[n].source), "before": before.texts[n], "after": after.texts[n]}
        for n in chosen
    ]


def _show(result: dict[str, Any], texts: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = Console()
    for row in texts:
        out.print(f"\n[bold]{escape(row['table'])}[/bold]")
        out.print(f"  before  {escape(' '.join(row['before'].split()))}", highlight=False)
        out.print(f"  after   {escape(' '.join(row['after'].split()))}", highlight=False)
    names = {"bleu": "BLEU", "rouge_l_13a": "ROUGE-L*"}
    table = Table(title=f"{result['test_tables']} test tables", title_justify="left")
    for column in ("", *names.values()):
        table.add_column(column, justify="left" if not column else "right")
    for when, label in (("before", "bare base, chat template and instruction"), ("after", "with the prefix")):
        table.add_row(label, *(f"{100 * result[when][name]:.1f}" for name in names))
    out.print()
    out.print(table)
    out.print("* on the words that BLEU sees, which needs no Java; `antefix eval` has the official one.\n")
    out.print(
        f"The prefix is {result['prefix_bytes'] / 1024:,.0f} KiB, {100 * result['share']:.3f} % of the base's "
        f"{result['base_bytes'] / 2**20:,.0f} MiB, and was trained in "
        f"{result['training_seconds'] / 60:.1f} minutes.\n",
        highlight=False,
    )
    out.print("What next", style="bold")
    out.print(
        f"  antefix generate 'route: Heron Loop | length: 7 km | start: Aldby station' -p {result['prefix']}\n"
        "  antefix init YOUR_FILE.csv      writes a first recipe for your own data\n"
        "  antefix train YOUR_RECIPE.toml  trains it",
        highlight=False,
    )
