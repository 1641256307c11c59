"""`antefix bank concatenate`, `truncate`, `average`, `interpolate`, `subtract`: new prefixes out of kept ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from antefix.cli.output import Json, PositionsOfSlots, print_json
from antefix.errors import CommandError, one_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from antefix.bank import Bank
    from antefix.base import Base
    from antefix.prefix import Prefix

BankFolder = Annotated[Path, typer.Option("--bank", help="The bank's folder.")]
NewName = Annotated[str, typer.Option("--as", help="The new prefix's name in the bank.")]
Names = Annotated[list[str], typer.Argument(help="Names of prefixes in the bank.")]
Name = Annotated[str, typer.Argument(help="The prefix's name in the bank.")]
BaseName = Annotated[
    str | None, typer.Option("--base", help="The base, where it is needed; without: the one that the card names.")
]


def concatenate(
    names: Names,
    new: NewName,
    positions: Annotated[
        PositionsOfSlots,
        typer.Option(help="in_place: each at its distance to the tokens. shifted: one after the other."),
    ] = "in_place",
    base: BaseName = None,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """Put the slots of several prefixes of one method together: tokens attend to all of them.

    For methods that are kept as plain keys and values (`antefix methods`).

    Example: `antefix bank concatenate menus style --as menus-style`
    """
    from antefix.compose import concatenate as concatenated

    found, parents = _parents(bank, names, new)
    turns = positions == "shifted" or any(p.card.positions == "shifted" for p in parents.values())
    model = _base(parents, base).model if turns else None
    _keep(found, new, concatenated(parents, positions=positions, model=model), as_json)


def truncate(
    name: Name,
    slots: Annotated[int, typer.Option(help="How many slots are kept.")],
    new: NewName,
    keep: Annotated[
        Literal["first", "last", "attention"],
        typer.Option(help="Which: the first, the last, or by attention, those that get the most on --data."),
    ] = "first",
    data: Annotated[
        Path | None, typer.Option(help="With `--keep attention`: texts with targets, as for training.")
    ] = None,
    base: BaseName = None,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """Keep some of a prefix's slots: the first, the last, or at every layer those that get the most attention.

    Example: `antefix bank truncate menus --slots 4 --as menus-4`
    """
    from antefix.compose import truncate as truncated

    if (data is None) != (keep != "attention"):
        raise CommandError("--keep attention and --data go together: attention is measured on texts")
    found, parents = _parents(bank, [name], new)
    prefix = parents[name]
    turns = prefix.card.positions == "shifted"
    loaded = _base(parents, base) if turns or data is not None else None
    attention = None if data is None or loaded is None else _measured(loaded, prefix, data)
    model: PreTrainedModel | None = loaded.model if loaded is not None and turns else None
    made = truncated(parents, slots, keep=keep, attention=attention, model=model)
    _keep(found, new, made, as_json)


def average(
    names: Names,
    new: NewName,
    weight: Annotated[list[float] | None, typer.Option(help="Once for each prefix; none: equal ones.")] = None,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """The mean of relatives: one method, base and shape, made from one parent or started alike.

    Example: `antefix bank average menus menus.v2 --as menus-mean`
    """
    from antefix.compose import average as averaged

    found, parents = _parents(bank, names, new)
    _keep(found, new, averaged(parents, weight or None), as_json)


def interpolate(
    first: Name,
    second: Name,
    new: NewName,
    share: Annotated[float, typer.Option(help="How much of the second; beyond 0 and 1 it goes on.")] = 0.5,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """A prefix between two relatives (see `average`).

    Example: `antefix bank interpolate menus menus.v2 --share 0.25 --as menus-between`
    """
    from antefix.compose import interpolate as interpolated

    found, parents = _parents(bank, [first, second], new)
    _keep(found, new, interpolated(parents, share), as_json)


def subtract(
    first: Name,
    second: Name,
    start: Annotated[str, typer.Option("--from", help="The parent that the second was trained from.")],
    new: NewName,
    weight: Annotated[float, typer.Option(help="How much of it is taken away.")] = 1.0,
    bank: BankFolder = Path("bank"),
    as_json: Json = False,
) -> None:
    """Take out of a prefix what a relative learned since their parent.

    Example: `antefix bank subtract menus rude --from shared --as menus-polite`
    """
    from antefix.compose import subtract as subtracted

    found, parents = _parents(bank, [first, second, start], new)
    _keep(found, new, subtracted(parents, weight), as_json)


def _parents(folder: Path, names: list[str], new: str) -> tuple[Bank, dict[str, Prefix]]:
    from antefix.bank import Bank

    bank = Bank(folder)
    bank.refuse_taken(new)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CommandError(f"'{one_line(twice, 60)}' is named twice")
    return bank, {name: bank[name] for name in names}


def _base(parents: dict[str, Prefix], name: str | None) -> Base:
    return next(iter(parents.values())).card.base.load(name)


def _measured(base: Base, prefix: Prefix, data: Path) -> dict[str, Tensor]:
    from antefix.cli.progress import Reading
    from antefix.data import read
    from antefix.slot_attention import slot_attention

    with Reading("pairs read") as reading:
        return slot_attention(base, prefix, read(data), reading)


def _keep(bank: Bank, name: str, prefix: Prefix, as_json: bool) -> None:
    path = bank.add(name, prefix)
    card = prefix.card
    if as_json:
        content = {"name": name, "folder": str(path), "parents": list(card.parents), **card.training}
        print_json({**content, "positions": card.positions, "num_virtual_tokens": card.num_virtual_tokens})
    else:
        typer.echo(f"{name} is in {path}, made from {', '.join(card.parents)}")
