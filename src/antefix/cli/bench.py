"""`antefix bench`: speed and memory side by side with the peers, on this machine."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from antefix.cli.output import Json, console, print_json

bench_app = typer.Typer(no_args_is_help=True, help="Speed and memory, side by side with the peers.")

Base = Annotated[str, typer.Option(help="The base: `smollm2-135m`, a hub id or a folder.")]
Data = Annotated[str | None, typer.Option(help="A data file with sources and targets; without: the demo's own tables.")]
Precision = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Of float32 and bfloat16; without: float32, and bfloat16 where it is native."),
]
Device = Annotated[str, typer.Option(help="Where all arms work, as torch names it: `cpu`, `cuda`.")]
Curves = Annotated[bool, typer.Option(help="Also growth curves, which take most of the time; none with --quick.")]
Quick = Annotated[bool, typer.Option("--quick", help="The headline ratios, in minutes.")]
Out = Annotated[Path | None, typer.Option(help="Also write a record, a page and a plot into this folder.")]


@bench_app.command("train")
def train(
    base: Base = "smollm2-135m",
    data: Data = None,
    precision: Precision = None,
    pairs_per_step: Annotated[int, typer.Option(min=1, help="Pairs an optimiser step, in every arm.")] = 16,
    sample: Annotated[int | None, typer.Option(min=1, help="Pairs drawn one by one; without: the whole file.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many turns every arm takes.")] = None,
    device: Device = "cpu",
    curves: Curves = True,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Pairs a second in training: ours, PEFT's prefix-tuning (sorted by length, and at random), full fine-tuning.

    Every arm lives in a process of its own and works in turn; ratios are taken within a round. Before anything is
    timed, all arms must have the same loss with the same slots. Without --quick it takes about an hour;
    with --out every finished round is kept, and the same command goes on after an interruption.

    Example: `antefix bench train --data e2e-dataset.zip::trainset.csv --quick`
    """
    from antefix.benchmarks.training import TrainingBench, bench_training

    settings = TrainingBench(
        base=base, data=_data(data), precisions=_precisions(precision, device), pairs_per_step=pairs_per_step,
        sample=sample, rounds=rounds or (3 if quick else 15), steps_per_round=1 if quick else 4, quick=quick,
        device=device, curves=curves,
    )  # fmt: skip
    _run(partial(bench_training, settings, kept=_kept(settings, out)), out, as_json)


@bench_app.command("generate")
def generate(
    base: Base = "smollm2-135m",
    data: Data = None,
    precision: Precision = None,
    batch: Annotated[int, typer.Option(min=1, help="Sources decoded together.")] = 16,
    eight_bits: Annotated[
        bool, typer.Option("--int8", help="Also weights of eight bits, beside the first precision.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many turns every arm takes.")] = None,
    device: Device = "cpu",
    curves: Curves = True,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """New tokens a second: the bare base, ours and PEFT with few and many slots, a batch of unlike prefixes.

    With --quick in float32 alone. Greedy, every row the same number of new tokens. Before anything is timed, ours and
    PEFT must have the same logits with the same slots.

    Example: `antefix bench generate --data e2e-dataset.zip::devset.csv --quick`
    """
    from antefix.benchmarks.decoding import DecodingBench, bench_decoding

    settings = DecodingBench(
        base=base, data=_data(data), batch=batch, rounds=rounds or (3 if quick else 9),
        precisions=_precisions("float32" if quick and precision is None else precision, device),
        device=device, curves=curves and not quick,
        new_tokens=16 if quick else 32, eight_bits=eight_bits,
    )  # fmt: skip
    _run(partial(bench_decoding, settings, kept=_kept(settings, out)), out, as_json)


@bench_app.command("memory")
def memory(
    base: Base = "smollm2-135m",
    data: Data = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Peak memory of an optimiser step: the bare base, ours, PEFT's prefix-tuning, full fine-tuning.

    Example: `antefix bench memory --data e2e-dataset.zip::trainset.csv --quick`
    """
    from antefix.benchmarks.memory import MemoryBench, bench_memory
    from antefix.errors import CommandError

    if len(precisions := _precisions(precision, "cpu")) > 1:
        raise CommandError(f"--precision {precision}: one of float32 and bfloat16 here")
    (dtype,) = precisions
    settings = MemoryBench(
        base=base, data=_data(data), precision=dtype, pairs_per_step=(32,) if quick else (8, 16, 32, 64)
    )
    _run(partial(bench_memory, settings), out, as_json)


@bench_app.command("load")
def load(
    base: Base = "smollm2-135m",
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Seconds until there is something to work with: help, imports, base, prefix, banks of many prefixes.

    Example: `antefix bench load --quick`
    """
    from antefix.benchmarks.loading import LoadingBench, bench_loading

    settings = LoadingBench(base=base, bank_sizes=(10, 1_000), own_prefixes=100) if quick else LoadingBench(base=base)
    _run(partial(bench_loading, settings), out, as_json)


def _run(bench: Any, out: Path | None, as_json: bool) -> None:
    from antefix.benchmarks.report import markdown, write_report
    from antefix.cli.progress import LiveLine

    screen = console()
    with LiveLine(screen, 1, "turn") as line:
        record = bench(watch=lambda done, total, what: line.show(done, what, total=total))
    if out is not None:
        write_report(record, out)
        screen.print(f"record, report and plots are in {out}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(record.to_dict())
    else:
        typer.echo(markdown(record))


def _kept(settings: Any, out: Path | None) -> Any:
    """The rounds that a folder holds of a bench with these settings on this machine."""
    from antefix.benchmarks.machine import description
    from antefix.benchmarks.rounds import Kept

    given = asdict(settings)
    del given["rounds"]  # more of the same rounds can be had later
    return Kept(out, {"settings": given, "machine": description(given.get("device", "cpu"))})


def _data(data: str | None) -> str:
    from antefix.demo import TABLES

    return str(TABLES) if data is None else data


def _precisions(given: str | None, device: str) -> Any:
    from antefix.base import native_precision
    from antefix.errors import CommandError

    if given is None:  # bfloat16 that a processor does not multiply itself is many times slower, for every arm
        return tuple(dict.fromkeys(("float32", native_precision(device))))
    names = tuple(name.strip() for name in given.split(","))
    if not set(names) <= {"float32", "bfloat16"}:
        raise CommandError(f"--precision {given}: of float32 and bfloat16, separated by a comma")
    return names
