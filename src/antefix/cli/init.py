"""`antefix init`: a first recipe for a data file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antefix.cli.output import Json, print_json
from antefix.embedded import NAME
from antefix.errors import CommandError

if TYPE_CHECKING:
    from antefix.data.look import Lengths, Look
    from antefix.training.first_recipe import TokenLengths


def init(
    file: Annotated[str, typer.Argument(help="A data file, `archive.zip::member.csv`, or `hf:owner/name`.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the recipe goes; without: named after the data.")
    ] = None,
    base: Annotated[str, typer.Option(help="The base the recipe names.")] = NAME,
    format: Annotated[str | None, typer.Option(help="The reader; without: found by looking.")] = None,
    source_column: Annotated[str | None, typer.Option(help="The column that is the source.")] = None,
    target_column: Annotated[str | None, typer.Option(help="The column that is to be written.")] = None,
    table_columns: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="The columns that form the source, as a table.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Look at a data file and write a first recipe for it.

    Prints what was found: format, sources and targets, columns, lengths, and where the dev set is.

    Example: `antefix init menus.csv`
    """
    from antefix.atomic import write_bytes
    from antefix.data.look import look
    from antefix.training.first_recipe import first_recipe, prefix_name, token_lengths

    out = out or Path(f"{prefix_name(file)}.toml")
    if out.exists() and not force:
        raise CommandError(f"{out} is there already: give another --out, or --force to replace it")
    columns = None if table_columns is None else [name.strip() for name in table_columns.split(",")]
    given = {"source_column": source_column, "target_column": target_column, "table_columns": columns}
    found = look(file, format=format, **{k: v for k, v in given.items() if v is not None})
    tokens = token_lengths(found, base)
    try:
        write_bytes(out, first_recipe(found, base, tokens).encode())
    except OSError as error:
        raise CommandError(f"{out}: cannot be written ({error.strerror})") from error
    command = f"antefix train {shlex.quote(str(out))}"
    if as_json:
        print_json(_facts(found, tokens) | {"recipe": str(out), "next": command})
        return
    for line in _report(found, tokens):
        typer.echo(line)
    typer.echo(f"wrote {out}; look it over, then run: {command}")


def _facts(found: Look, tokens: TokenLengths | None) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "train": found.train,
        "dev": found.dev,
        "format": found.format,
        "sources": len(found.examples),
        "pairs": found.num_pairs,
        "source_columns": list(found.source_columns),
        "target_column": found.target_column,
        "fields": list(found.fields),
        "classes": list(found.classes),
        "text": found.text_format.model_dump(exclude_defaults=True),
        "source_chars": asdict(found.source_lengths()),
        "target_chars": asdict(found.target_lengths()),
        "tokens": None if tokens is None else asdict(tokens),
    }


def _report(found: Look, tokens: TokenLengths | None) -> list[str]:
    columns = ", ".join(found.source_columns)
    lines = [
        f"{found.train}: format '{found.format}', {len(found.examples):,} sources with {found.num_pairs:,} targets",
        f"source: {columns}; {_length(found.source_lengths(), 'characters')}"
        + ("" if tokens is None else f" ({_length(tokens.source, 'tokens')})"),
        f"target: {found.target_column}; {_length(found.target_lengths(), 'characters')}"
        + ("" if tokens is None else f" ({_length(tokens.target, 'tokens')})"),
        f"dev: {found.dev or 'a tenth of the sources, drawn with the seed'}",
    ]
    if found.fields and found.fields != found.source_columns:
        lines.insert(2, f"fields: {', '.join(found.fields)}")
    if found.classes:
        lines.append(f"the targets are {len(found.classes)} classes: {', '.join(found.classes)}")
    written = "the base's chat template" if found.text_format.chat else f"linearised as '{found.text_format.linearise}'"
    return [*lines, f"text: {written}"]


def _length(lengths: Lengths, unit: str) -> str:
    return f"{lengths.median:,} {unit}, at most {lengths.longest:,}"
