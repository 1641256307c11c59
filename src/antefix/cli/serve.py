"""`antefix serve`: an OpenAI-compatible server and its page, over a base and a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from antefix.cli.output import Device, Json, Precision, console, print_json
from antefix.errors import ServerError

_MIB = 1 << 20


def serve(
    base: Annotated[str, typer.Option(help="A name, a hub id, a folder or a .gguf file.")] = "smollm2-135m",
    bank: Annotated[Path, typer.Option(help="The folder of prefixes; it is watched.")] = Path("bank"),
    name: Annotated[
        str | None, typer.Option(help="The base's id for clients; without: its name, of a folder the last part.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; `0.0.0.0` is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="A TOML file with hashes of API keys; without: anybody may ask.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are told to come again.")] = 256,
    max_rows: Annotated[int, typer.Option(min=1, help="Texts that are written at the same time.")] = 16,
    resident_mib: Annotated[int, typer.Option(min=1, help="Memory for prefixes, in MiB.")] = 1024,
    cache_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Memory for keys and values of the texts at work, in MiB; others wait. Without: half of what is free.",
        ),
    ] = None,
    max_body_mib: Annotated[int, typer.Option(min=1, help="The longest request, in MiB.")] = 4,
    max_tokens: Annotated[
        int,
        typer.Option(min=1, help="The most tokens of a chat or table, unless request or prefix say."),
    ] = 1024,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for open requests when the server is stopped.")] = 20.0,
    dtype: Precision = "native",
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; without: as torch chooses.")] = None,
    log_texts: Annotated[
        bool, typer.Option("--log-texts", help="Write prompts and texts into the log as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve a base and the prefixes of a bank, to every client that speaks OpenAI's interface, with a page at `/`.

    The log goes to stderr, a line of JSON a request (but for health and metrics). Ctrl-C stops it; open requests end
    first.

    Examples:

    `antefix serve --base smollm2-135m --bank bank`

    `antefix serve --bank bank --host 0.0.0.0 --port 8080 --api-keys keys.toml --max-queue 64`
    """
    _require_extra()
    from antefix.server.engine import EngineSettings
    from antefix.server.logs import to_stderr
    from antefix.server.run import Place, serve
    from antefix.server.serving import Rules

    place = Place(host=host, port=port, base_id=name or _id_of(base), keys_file=api_keys)
    engine = EngineSettings(
        base=base, bank=bank, dtype=dtype, device=device, max_rows=max_rows, max_waiting=max_queue,
        resident_bytes=resident_mib * _MIB, num_threads=threads,
        cache_bytes=None if cache_mib is None else cache_mib * _MIB,
    )  # fmt: skip
    rules = Rules(
        max_body_bytes=max_body_mib * _MIB, default_max_tokens=max_tokens, grace_s=grace, log_texts=log_texts,
    )  # fmt: skip
    console().print(f"reading {place.base_id} ...", highlight=False)

    def ready(address: str, num_prefixes: int) -> None:
        if as_json:
            print_json({"address": address, "model": place.base_id, "prefixes": num_prefixes})
        else:
            typer.echo(f"{place.base_id} and {num_prefixes:,} prefixes at {address}")

    to_stderr()
    serve(place, engine, rules, ready)


def _id_of(base: str) -> str:
    path = Path(base)
    if base.endswith(".gguf"):
        return path.stem
    return path.resolve().name if path.is_dir() else base


def _require_extra() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ServerError(
            f"the server needs its extra ('{error.name}' is not installed): pip install 'antefix[serve]'"
        ) from error
    del fastapi, prometheus_client, uvicorn
