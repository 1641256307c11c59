"""`antefix eval`: the scores of a file of texts, alone or against another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from antefix.cli.output import Json, ReaderOptions, console, print_json
from antefix.metrics import E2E_METRICS, METRICS, RESAMPLES

if TYPE_CHECKING:
    from rich.table import Table

    from antefix.metrics.report import Report


def evaluate(
    references: Annotated[
        str,
        typer.Option(metavar="FILE", help="A data file with targets, or a text file with a blank line between inputs."),
    ],
    hypotheses: Annotated[
        str, typer.Option(metavar="FILE", help="The texts: one a line, or what `antefix generate` wrote.")
    ],
    split: Annotated[str | None, typer.Option(help="Which split of the references' data file.")] = None,
    reader: ReaderOptions = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help=f"Of {', '.join(METRICS)}; without: {', '.join(E2E_METRICS)}."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="FILE", help="A second file of texts: is the first one better?")
    ] = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="Also count the table values that texts leave out or make up.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(metavar="PREFIX", help="Write the scores onto the card of the prefix that wrote the texts."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Draws of the bootstrap in --compare.")] = RESAMPLES,
    seed: Annotated[int, typer.Option(min=0, help="The seed of these draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Score texts against references, as the E2E challenge's official scorer does.

    METEOR, ROUGE-L and CIDEr need Java. With `--compare`, a paired bootstrap over the inputs tells whether the
    difference is more than chance. `--json` adds versions, and with `--fields` what was found in every text.

    Examples:

    `antefix eval --references menus.csv --hypotheses texts.jsonl --metrics bleu,nist --fields`

    `antefix eval --references references.txt --hypotheses new.txt --compare old.txt`

    `antefix eval --references test.csv --hypotheses texts.jsonl --record bank/menus`
    """
    from antefix.metrics.report import measure
    from antefix.prefix import Prefix
    from antefix.settings import override

    prefix = None if record is None else Prefix.load(record)  # a broken one is told before anything is scored
    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    out = console()
    with out.status("scoring"):
        report = measure(
            references, hypotheses, split=split, reader=override({}, reader or []), metrics=names, compare=compare,
            with_fields=fields, resamples=resamples, seed=seed,
        )  # fmt: skip
    if prefix is not None and record is not None:
        prefix.with_scores("test", report.to_card()).save(record, overwrite=True)
        out.print(f"recorded on the card of {record}", highlight=False, soft_wrap=True)
    if report.left_out:
        out.print(f"left out, as they need Java and there is none: {', '.join(report.left_out)}", highlight=False)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)


def _show(report: Report) -> None:
    from rich.console import Console

    out = Console()
    out.print(f"{report.num_inputs:,} inputs, {report.num_references:,} references", highlight=False)
    if report.comparison:
        for label, system in zip(("first", "second"), report.systems, strict=True):
            out.print(f"{label}: {system.name}", highlight=False, markup=False, soft_wrap=True)
    out.print(_table(report))
    for name, comparison in report.comparison.items():
        if comparison.note:
            out.print(f"{name}: {comparison.note}", highlight=False, soft_wrap=True)


def _table(report: Report) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    heads = ["first", "second", "difference", "95 % interval", "p"] if report.comparison else ["score"]
    table.add_column("")
    for head in heads:
        table.add_column(head, justify="right")
    for name in report.systems[0].scores:
        cells = [f"{system.scores[name]:.4f}" for system in report.systems]
        if name in report.comparison:
            found = report.comparison[name]
            cells += [f"{found.difference:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}", f"{found.p_value:.4f}"]
        table.add_row(name, *cells)
    checked = [system.fields for system in report.systems if system.fields is not None]
    if checked:
        table.add_row("values left out", *(_share(found.missing_share) for found in checked))
        table.add_row("values added", *(_share(found.added_share) for found in checked))
    return table


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
