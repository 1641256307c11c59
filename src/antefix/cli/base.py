"""`antefix base`: the embedded bases."""

from __future__ import annotations

from typing import Annotated

import typer

from antefix.cli.output import Json, console, print_json

base_app = typer.Typer(help="The embedded bases: SmolLM2-135M-Instruct, and an encoder.", no_args_is_help=True)


@base_app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="`smollm2-135m`, or the encoder `minilm-l6`.")] = "smollm2-135m",
    as_json: Json = False,
) -> None:
    """Download an embedded base (about 100 MB) and convert it once.

    Example: `antefix base fetch`
    """
    from antefix import embedded

    out = console()
    folder = embedded.fetch(lambda line: out.print(line, highlight=False), name)
    if as_json:
        print_json({"base": name, "folder": str(folder)})
    else:
        typer.echo(f"{name} is ready in {folder}")
