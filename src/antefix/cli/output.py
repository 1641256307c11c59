"""What commands share in speaking to a person or a machine: options, printing, a console."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
BaseOfPrefix = Annotated[str | None, typer.Option("--base", help="The base; without: the one the prefix names.")]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16", "int8", "native", "auto"],
    typer.Option("--dtype", help="Precision of the base. native: the fastest here; auto: as its weights are kept."),
]
ReaderOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--reader", metavar="KEY=VALUE", help="How the file is read, as a recipe's `data.reader`: `target_column=text`."
    ),
]
PositionsOfSlots = Literal["in_place", "shifted"]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda`, `mps`; `auto`: an accelerator if there is one.")]


def console(quiet: bool = False) -> Console:
    """For progress and messages: stderr, so that stdout holds the result alone. quiet: nothing is shown."""
    return Console(stderr=True, quiet=quiet)


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
