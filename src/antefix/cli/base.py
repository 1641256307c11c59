"""`antefix base`: the embedded base model."""

from __future__ import annotations

import typer

from antefix.cli.output import Json, console, print_json

base_app = typer.Typer(help="The embedded base model, SmolLM2-135M-Instruct.", no_args_is_help=True)


@base_app.command("fetch")
def fetch(as_json: Json = False) -> None:
    """Download the embedded base model (about 100 MB) and convert it once.

    Example: `antefix base fetch`
    """
    from antefix import embedded

    out = console()
    folder = embedded.fetch(lambda line: out.print(line, highlight=False))
    if as_json:
        print_json({"base": embedded.NAME, "folder": str(folder)})
    else:
        typer.echo(f"{embedded.NAME} is ready in {folder}")
