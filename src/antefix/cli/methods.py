"""`antefix methods`: what can be trained, where it comes from, and how much of it there is on a base."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from antefix.cli.output import Json, console, print_json


def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Only these; without: all.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Also count what is trained and kept on this base, at a method's defaults.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods: name, paper, what they are made of, what they need, and how large they are on a base.

    Example: `antefix methods prefix_tuning lora --base smollm2-135m`
    """
    from antefix.accounting import flop_a_token
    from antefix.base import load_base
    from antefix.methods import UNION, method_class
    from antefix.methods.listing import counted, listed

    wanted = [part for name in names or () for part in name.split(UNION)]
    for name in wanted:
        method_class(name)  # raises for one that is not there
    rows = [row for row in listed() if not wanted or row["name"] in wanted]
    if base is not None:
        with console().status(f"loading {base}"):
            loaded = load_base(base)
        rows = [row | counted(loaded, row["name"]) for row in rows]
        cost = flop_a_token(loaded.model)
    if as_json:
        if base is not None:
            flop = {"flop_to_read_a_token": cost.inference, "flop_to_train_on_a_token": cost.training}
            rows = [row | flop for row in rows]
        print_json(rows)
        return
    for row in rows:
        typer.echo(_in_words(row))
    if base is not None:
        typer.echo(
            f"{base}: {cost.inference / 1e9:.3g} GFLOP to read a token, {cost.training / 1e9:.3g} to train on one"
        )


def _in_words(row: dict[str, Any]) -> str:
    lines = [f"{row['name']}: {row['summary']}", f"    {row['paper']}; made of {', '.join(row['parts'])}"]
    notes = ["is kept as plain keys and values"] if row["folds_to_key_value"] else []
    notes += [f"needs {need}" for need in row["needs"]]
    if notes:
        lines.append(f"    {'; '.join(notes)}")
    if row.get("refusal"):
        lines.append(f"    not on this base: {row['refusal']}")
    elif row.get("asks_for"):
        lines.append(f"    not without a choice: {row['asks_for']}")
    elif "trained" in row:
        size = f"{row['kept_bytes'] / 1024:,.0f} KiB"
        lines.append(f"    trains {row['trained']:,} values, keeps {row['kept']:,} ({size})")
    return "\n".join(lines)
