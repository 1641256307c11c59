"""`antefix bank`: what is in a bank, and what may be done to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from antefix.cli.compose import BankFolder, Name, average, concatenate, interpolate, subtract, truncate
from antefix.cli.output import Json, PositionsOfSlots, console, print_json
from antefix.cli.progress import Reading
from antefix.errors import CommandError, one_line

if TYPE_CHECKING:
    from antefix.bank import Entry

bank_app = typer.Typer(
    help="Kept prefixes: list and search, show, rename, remove, verify, pack and unpack, combine, import.",
    no_args_is_help=True,
)


@bank_app.command("list")
def list_(
    text: Annotated[str, typer.Option(help="Words that name, tags or notes hold, all of them.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="A tag; several times: all of them.")] = None,
    method: Annotated[str | None, typer.Option(help="The method's name.")] = None,
    base: Annotated[str | None, typer.Option(help="The base's name, or its fingerprint.")] = None,
    parent: Annotated[str | None, typer.Option(help="A prefix that they were made from.")] = None,
    latest: Annotated[
        bool, typer.Option("--latest", help="Of `menus`, `menus.v1`, `menus.v2` the last alone.")
    ] = False,
    sort: Annotated[
        Literal["name", "changed", "size", "slots", "method"], typer.Option(help="By what the list is sorted.")
    ] = "name",
    descending: Annotated[bool, typer.Option("--descending", help="The largest, or the newest, first.")] = False,
    offset: Annotated[int, typer.Option(min=0, help="How many to pass over.")] = 0,
    limit: Annotated[int | None, typer.Option(min=0, help="How many at most; none: all.")] = None,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """The prefixes of the bank, one a line; a broken one with its reason.

    Example: `antefix bank list --tag food --text "short menus" --sort changed --descending --limit 20`
    """
    from antefix.bank import MOST_TEXT, Bank, Query

    if len(text) > MOST_TEXT:
        raise CommandError(f"--text has {len(text):,} characters, allowed are {MOST_TEXT:,}")
    query = Query(
        text=text, tags=tuple(tag or ()), method=method, base=base, parent=parent, latest=latest,
        sort=sort, descending=descending, offset=offset, limit=limit,
    )  # fmt: skip
    found = Bank(bank)
    with Reading("cards read") as reading:
        found.refresh(reading)
    page = found.page(query)
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in page.entries])
        return
    _print_table(
        ["name", "method", "slots", "positions", "base", "scores", "size", "tags"],
        [_row(entry) for entry in page.entries],
    )
    if len(page.entries) < page.total:
        console().print(f"{len(page.entries):,} of {page.total:,} prefixes", highlight=False)


@bank_app.command("latest")
def latest(name: Name, bank: BankFolder = Path("bank"), as_json: Json = False) -> None:
    """The latest version of a name: of `menus`, `menus.v3` and `menus.v12` the last.

    Example: `antefix generate --prefix bank/$(antefix bank latest menus) "dish: Plum tart"`
    """
    from antefix.bank import Bank

    found = Bank(bank).latest(name)
    _say({"name": name, "latest": found}, found, as_json)


@bank_app.command("lineage")
def lineage(name: Name, bank: BankFolder = Path("bank"), as_json: Json = False) -> None:
    """Which prefixes it was made from, and which were made from it, as two trees.

    Example: `antefix bank lineage menus`
    """
    from antefix.bank import Bank
    from antefix.bank.lineage import lineage as lineage_of

    found = lineage_of(Bank(bank), name)
    if as_json:
        print_json({"name": name, **{way: [r._asdict() for r in tree] for way, tree in found._asdict().items()}})
        return
    for title, tree in (("made from", found.parents), ("made from it", found.children)):
        typer.echo(f"{title}:" if tree else f"{title}: none")
        for relative in tree:
            note = "" if relative.is_there else "  (not in the bank)"
            note += "  (see above)" if relative.is_repeated else ""
            typer.echo(f"{'  ' * relative.depth}{one_line(relative.name, 100)}{note}")


@bank_app.command("clean")
def clean(
    minutes: Annotated[float, typer.Option(min=0, help="Only what nobody changed for so long.")] = 60.0,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """Delete what interrupted writes left behind. Prefixes are never touched.

    Example: `antefix bank clean`
    """
    from antefix.bank import Bank

    gone = Bank(bank).clean(60.0 * minutes)
    _say({"deleted": gone}, f"{len(gone)} left-over files and folders are deleted", as_json)


@bank_app.command("pack")
def pack(
    archive: Annotated[Path, typer.Argument(help="The file to write (.tar).")],
    names: Annotated[list[str] | None, typer.Argument(help="Which prefixes; none: all.")] = None,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """Export prefixes into one file, checked.

    Example: `antefix bank pack menus.tar menus menus.v2`
    """
    from antefix.bank import Bank
    from antefix.bank.archive import pack as packed

    with Reading("prefixes packed") as reading:
        done = packed(Bank(bank), archive, names or None, reading)
    _say({"archive": str(archive), "packed": done}, f"{len(done):,} prefixes are in {archive}", as_json)


@bank_app.command("unpack")
def unpack(
    archive: Annotated[Path, typer.Argument(help="A file that `antefix bank pack` wrote.")],
    skip_taken: Annotated[bool, typer.Option("--skip-taken", help="Leave out names that are taken.")] = False,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """Import the prefixes of an archive into the bank: all of them, checked, or none.

    Example: `antefix bank unpack menus.tar --bank other-bank`
    """
    from antefix.bank import Bank
    from antefix.bank.archive import unpack as unpacked

    with Reading("prefixes checked") as reading:
        came, taken = unpacked(archive, Bank(bank), skip_taken=skip_taken, watch=reading)
    skipped = f", {len(taken):,} names were taken" if taken else ""
    _say({"unpacked": came, "taken": taken}, f"{len(came):,} prefixes are in {bank}{skipped}", as_json)


@bank_app.command("show")
def show(name: Name, bank: BankFolder = Path("bank"), as_json: Json = False) -> None:
    """What a prefix says about itself: its card, and (with `--json`) the shapes of its tensors.

    Example: `antefix bank show menus`
    """
    from rich.filesize import decimal

    from antefix.bank import Bank

    prefix = Bank(bank)[name]
    card = prefix.card.model_dump(mode="json")
    if as_json:
        shapes = {tensor: list(t.shape) for tensor, t in prefix.tensors.items()}
        counts = {"num_values": prefix.num_values, "num_bytes": prefix.num_bytes}
        print_json({"name": name, **counts, "card": card, "tensors": shapes})
        return
    rows = [[key, _shown(value)] for key, value in card.items() if value not in (None, {}, [], "")]
    rows += [["tensors", f"{len(prefix.tensors)}: {prefix.num_values:,} values, {decimal(prefix.num_bytes)}"]]
    _print_table(["", name], rows)


@bank_app.command("rename")
def rename(name: Name, new: Annotated[str, typer.Argument(help="Its new name.")], bank: BankFolder = Path("bank"),
           as_json: Json = False) -> None:  # fmt: skip
    """Give a prefix another name; a taken one is refused.

    Example: `antefix bank rename menus menus-2024`
    """
    from antefix.bank import Bank

    Bank(bank).rename(name, new)
    _say({"renamed": name, "to": new}, f"{name} is now {new}", as_json)


@bank_app.command("remove")
def remove(
    name: Name,
    bank: BankFolder = Path("bank"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a prefix. Asks first, unless told `--yes`.

    Example: `antefix bank remove menus --yes`
    """
    from antefix.bank import Bank

    found = Bank(bank)
    if name not in found:
        found.remove(name)  # says what there is
    if not yes and not _agreed(f"Delete the prefix '{name}' of the bank '{bank}' for good?"):
        raise CommandError(f"'{name}' was not removed: nobody said yes (or give --yes)")
    found.remove(name)
    _say({"removed": name}, f"{name} is removed", as_json)


@bank_app.command("verify")
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Which prefixes; none: all.")] = None,
    bank: BankFolder = Path("bank"),
    base: Annotated[str | None, typer.Option(help="Check also that they belong to this base and fit it.")] = None,
    as_json: Json = False,
) -> None:
    """Read every byte of the prefixes and say which are broken; exit code 1 if one is.

    Example: `antefix bank verify --base smollm2-135m`
    """
    from antefix.bank import Bank
    from antefix.base import load_base

    found = Bank(bank)
    chosen = names or list(found)
    checked: list[tuple[str, str | None]] = []
    with Reading("prefixes verified") as reading:
        for checking in found.verify(names or None, load_base(base) if base else None):
            reading(len(checked), len(chosen))
            checked.append(checking)
    broken = [(name, problem) for name, problem in checked if problem]
    if as_json:
        print_json([{"name": name, "problem": problem} for name, problem in checked])
    else:
        for name, problem in broken:
            typer.echo(f"{one_line(name)}: {problem}")
        typer.echo(f"{len(checked) - len(broken)} of {len(checked)} prefixes are good")
    raise typer.Exit(1 if broken else 0)


@bank_app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A PEFT prefix-tuning checkpoint.")],
    name: Annotated[str, typer.Argument(help="The prefix's name in the bank.")],
    base: Annotated[str, typer.Option(help="The base it was trained on: a name, hub id, folder or GGUF file.")],
    positions: Annotated[
        PositionsOfSlots,
        typer.Option(help="in_place: tokens count from 0 (rotary bases). shifted: after the slots, as PEFT counts."),
    ] = "in_place",
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """Take a prefix that was trained with PEFT into the bank; its logits stay PEFT's.

    Example: `antefix bank import my-peft-folder menus --base smollm2-135m`
    """
    from antefix.bank import Bank
    from antefix.base import load_base
    from antefix.interop.peft import import_peft

    found = Bank(bank)
    found.refuse_taken(name)  # before the base is loaded
    prefix = import_peft(folder, load_base(base), positions=positions)
    path = found.add(name, prefix)
    console().print(prefix.card.notes, markup=False, highlight=False)
    _say(
        {"imported": name, "folder": str(path), "positions": prefix.card.positions},
        f"{name} is in {path}, positions {prefix.card.positions}", as_json,
    )  # fmt: skip


bank_app.command("concatenate")(concatenate)
bank_app.command("truncate")(truncate)
bank_app.command("average")(average)
bank_app.command("interpolate")(interpolate)
bank_app.command("subtract")(subtract)


def _agreed(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        return False


def _say(content: dict[str, Any], line: str, as_json: bool) -> None:
    if as_json:
        print_json(content)
    else:
        typer.echo(line)


def _row(entry: Entry) -> list[str]:
    from rich.filesize import decimal

    if entry.problem:
        return [entry.name, "broken", "", "", "", "", "", entry.problem]
    return [
        entry.name, entry.method or "", _shown(entry.num_virtual_tokens), entry.positions or "", entry.base or "",
        _shown(_figures(entry.scores)), decimal(entry.num_bytes or 0),
        " ".join(entry.tags),
    ]  # fmt: skip


def _figures(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers alone: what they were measured on stands in `antefix bank show`."""
    nested = {key: _figures(value) for key, value in scores.items() if isinstance(value, dict) and key != "versions"}
    own = {key: value for key, value in scores.items() if isinstance(value, float)}
    return own | {key: value for key, value in nested.items() if value}


_WHOLE = {"name", "method", "slots", "positions", "size"}
"""Columns that a narrow terminal leaves whole."""
_NO_TERMINAL = 10_000
"""Characters a line may have where nothing is narrow: a row is a line, for grep."""


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Cells are text that a prefix brought with it: shown as it is, never as markup or as commands to a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in _WHOLE)
    for row in rows:
        table.add_row(*(Text(one_line(cell, 1000)) for cell in row))
    Console(width=None if sys.stdout.isatty() else _NO_TERMINAL).print(table)


def _shown(value: Any) -> str:
    """A card's value for a person: nested ones as `key value, key value`."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_shown(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
