"""The command line: a command parses, makes one library call and prints. One file a command.

Nothing heavy is imported before a command runs: `antefix --help` needs neither torch nor transformers, so
command files import these inside their functions. Results go to stdout (`--json` for machines), progress and
messages to stderr. A user's mistake is one line and exit code 2.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from antefix.cli.bank import bank_app
from antefix.cli.base import base_app
from antefix.cli.bench import bench_app
from antefix.cli.cartridge import cartridge
from antefix.cli.compare import compare
from antefix.cli.demo import demo
from antefix.cli.doctor import doctor
from antefix.cli.eval import evaluate
from antefix.cli.generate import generate
from antefix.cli.init import init
from antefix.cli.links import links
from antefix.cli.merge import merge
from antefix.cli.methods import methods
from antefix.cli.search import search
from antefix.cli.serve import serve
from antefix.cli.stopping import INTERRUPTED
from antefix.cli.train import train
from antefix.cli.train_many import train_many
from antefix.errors import AntefixError, OtherProcessError

_TALKATIVE = ("torchao", "torch.utils._pytree")
"""What warns on every import where torchao is installed: of kernels for other devices, of its own enums."""

app = typer.Typer(
    name="antefix",
    help="Train, measure and keep prefixes: small learned tensors that steer a frozen model, many in one batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("antefix"))
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


app.command("demo")(demo)
app.command("init")(init)
app.command("methods")(methods)
app.command("cartridge")(cartridge)
app.command("doctor")(doctor)
app.command("train")(train)
app.command("train-many")(train_many)
app.command("search")(search)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("eval")(evaluate)
app.command("serve")(serve)
app.command("links")(links)
app.command("merge")(merge)
app.add_typer(base_app, name="base")
app.add_typer(bank_app, name="bank")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The entry point of the `antefix` command: a user's mistake is one line and exit code 2."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False) or 0
    except TyperException as error:  # how the command was written: an unknown option, a missing argument
        usage = error.format_message()
        if usage:  # else it was the help, and it is printed
            print(f"antefix: {usage.rstrip('.')}; --help says more", file=sys.stderr)
        code = 2
    except OtherProcessError:  # the process that failed says why
        code = 2
    except AntefixError as error:
        print(f"antefix: {error}", file=sys.stderr)
        code = 2
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; who asks for help does not wait for torch
            raise
        print(
            "antefix: the device is out of memory: lower training.tokens_per_batch (`train`) or --batch-size "
            "(`generate`), or take a narrower --dtype",
            file=sys.stderr,
        )
        code = 2
    if code == INTERRUPTED:
        print("antefix: interrupted", file=sys.stderr)
    sys.exit(code)
