"""What all commands share in speaking to a person or a machine: the `--json` option, printing, a console."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def console(quiet: bool = False) -> Console:
    """For progress and messages: stderr, so that stdout holds the result alone. quiet: nothing is shown."""
    return Console(stderr=True, quiet=quiet)


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
