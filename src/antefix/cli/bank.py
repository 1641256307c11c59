"""`antefix bank`: what is in a bank, and what may be done to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antefix.cli.output import Json, console, print_json
from antefix.errors import BankError, one_line

if TYPE_CHECKING:
    from antefix.bank import Entry

bank_app = typer.Typer(help="Kept prefixes: list, show, rename, remove, verify, import.", no_args_is_help=True)

BankFolder = Annotated[Path, typer.Option("--bank", help="The bank's folder.")]
Name = Annotated[str, typer.Argument(help="The prefix's name in the bank.")]


@bank_app.command("list")
def list_(bank: BankFolder = Path("bank"), as_json: Json = False) -> None:
    """Every prefix of the bank, one a line; a broken one with its reason.

    Example: `antefix bank list`
    """
    from antefix.bank import Bank

    entries = Bank(bank).entries()
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in entries])
        return
    _print_table(
        ["name", "method", "slots", "positions", "base", "scores", "size", "tags"], [_row(entry) for entry in entries]
    )


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
        raise BankError(f"'{name}' was not removed: nobody said yes (or give --yes)")
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

    checked = list(Bank(bank).verify(names or None, load_base(base) if base else None))
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
        str, typer.Option(help="in_place (tokens count from 0; rotary bases) or shifted (as PEFT counts).")
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

    if positions not in ("in_place", "shifted"):
        raise BankError(f"--positions '{one_line(positions, 60)}': give in_place or shifted")
    found = Bank(bank)
    found.refuse_taken(name)  # before the base is loaded
    prefix = import_peft(folder, load_base(base), positions=positions)  # type: ignore[arg-type]
    path = found.add(name, prefix)
    console().print(prefix.card.notes, markup=False, highlight=False)
    _say(
        {"imported": name, "folder": str(path), "positions": prefix.card.positions},
        f"{name} is in {path}, positions {prefix.card.positions}", as_json,
    )  # fmt: skip


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
        return [entry.name, "broken", "", "", "", entry.problem, "", ""]
    return [
        entry.name, entry.method or "", _shown(entry.num_virtual_tokens), entry.positions or "", entry.base or "",
        _shown(entry.scores), decimal(entry.num_bytes or 0),
        " ".join(entry.tags),
    ]  # fmt: skip


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Cells are text that a prefix brought with it: shown as it is, never as markup or as commands to a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell, 1000)) for cell in row))
    Console().print(table)


def _shown(value: Any) -> str:
    """A card's value for a person: nested ones as `key value, key value`."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_shown(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
