"""`antefix bench load`: how long it takes until there is something to work with.

Seconds of a fresh process for the help text, the imports and the base; a kept prefix loaded and attached; banks of up
to 100,000 prefixes of a tiny model, and of 1,000 of the base's own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from antefix.attach import attached
from antefix.bank import Bank
from antefix.base import load_base
from antefix.benchmarks.record import Curve, Record
from antefix.benchmarks.rounds import Spread, Watch
from antefix.benchmarks.workload import common_slots, our_prefix
from antefix.methods import method_class
from antefix.prefix import CARD_FILE as CARD
from antefix.prefix import BaseRecord, Card, Prefix
from antefix.tensor_file import TENSORS_FILE

_HELP = "import sys; sys.argv = ['antefix', '--help']; from antefix.cli import main; main()"
_BASE = (
    "import time, sys; import torch, transformers; from antefix.base import load_base; "
    "import antefix.attach; t = time.perf_counter(); load_base(sys.argv[1]); print(time.perf_counter() - t)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingBench:
    """What is loaded, and how often."""

    base: str
    rounds: int = 5
    bank_sizes: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000)
    own_prefixes: int = 1_000
    """How many prefixes of the base itself a bank gets; each is as large as a trained one."""


def bench_loading(bench: LoadingBench, watch: Watch) -> Record:
    """Run it; banks are made in a temporary folder, and go with it."""
    record = Record(bench="load", settings=asdict(bench), unit="")
    figures = record.figures
    watch(0, 3, "fresh processes")
    figures["s, antefix --help"] = _median(lambda: _timed([sys.executable, "-c", _HELP]), bench.rounds)
    imports = [sys.executable, "-c", "import torch, transformers, antefix.attach, antefix.generation"]
    figures["s, imports (torch and transformers among them)"] = _median(lambda: _timed(imports), bench.rounds)
    loads = [sys.executable, "-c", _BASE, bench.base]
    figures["s, base after the imports"] = _median(lambda: float(_output(loads)), bench.rounds)
    with tempfile.TemporaryDirectory() as folder:
        watch(1, 3, "a prefix of the base")
        own = _own_prefix(bench.base)
        own[1].save(Path(folder) / "one")
        figures["ms, a prefix loaded and attached"] = 1e3 * _median(lambda: _load_and_attach(own[0], Path(folder)), 21)
        tiny = _tiny_prefix()
        series: dict[str, list[tuple[float, Spread]]] = {}
        for size in bench.bank_sizes:
            watch(2, 3, f"a bank of {size:,}")
            for name, seconds in _bank_of(tiny, size, Path(folder) / f"tiny_{size}").items():
                series.setdefault(name, []).append((size, Spread.of([seconds])))
        if bench.own_prefixes:
            watch(2, 3, f"a bank of {bench.own_prefixes:,} of the base's own")
            for name, seconds in _bank_of(own[1], bench.own_prefixes, Path(folder) / "own").items():
                figures[f"s, {bench.own_prefixes:,} prefixes of the base: {name}"] = seconds
    record.curves = [Curve(title="banks of tiny prefixes", x="prefixes", y="s", series=series)]
    return record


def _bank_of(prefix: Prefix, count: int, folder: Path) -> dict[str, float]:
    """Seconds to list it for the first time, to list it again, and to load one prefix by name."""
    prefix.save(folder / "p0")
    card, tensors = ((folder / "p0" / name).read_bytes() for name in (CARD, TENSORS_FILE))
    for number in range(1, count):
        # As files, not through `save`: that waits for the disk at every one.
        (folder / f"p{number}").mkdir()
        (folder / f"p{number}" / CARD).write_bytes(card)
        (folder / f"p{number}" / TENSORS_FILE).write_bytes(tensors)
    first, again = (_seconds(lambda: Bank(folder).entries()) for _ in range(2))
    one = _median(lambda: _seconds(lambda: Bank(folder)[f"p{count - 1}"]), 5)
    return {"first list, no index": first, "list again": again, "one prefix loaded": one}


def _own_prefix(name: str) -> tuple[Any, Prefix]:
    base = load_base(name)
    module = our_prefix(base.model, common_slots(base.model, 10))
    return base, _kept(module.kept_tensors(), BaseRecord(name=base.name, fingerprint=base.fingerprint), "shifted")


def _tiny_prefix() -> Prefix:
    """Two layers with a head of width 4: files as small as they come."""
    names = (f"layers.{n}.self.{part}" for n in range(2) for part in ("key", "value"))
    return _kept(
        {name: torch.randn(1, 2, 4) for name in names}, BaseRecord(name="tiny", fingerprint="0" * 16), "in_place"
    )


def _kept(tensors: dict[str, Any], base: BaseRecord, positions: Any) -> Prefix:
    slots = next(iter(tensors.values())).shape[1]
    config = method_class("prefix_tuning").Config.model_validate({"num_virtual_tokens": slots, "positions": positions})
    card = Card(method="prefix_tuning", config=config.model_dump(mode="json"), positions=positions, base=base)
    return Prefix(tensors, card)


def _load_and_attach(base: Any, folder: Path) -> float:
    def work() -> None:
        with attached(base.model, Prefix.load(folder / "one")):
            pass

    return _seconds(work)


def _median(measure: Callable[[], float], rounds: int) -> float:
    measure()
    return statistics.median(measure() for _ in range(rounds))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _timed(command: list[str]) -> float:
    return _seconds(lambda: _output(command))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
