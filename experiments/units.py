"""Long experiments in small units: each finished unit is a JSON file, and the next start goes on from those.

The estimate of the whole is printed first. Interrupt it when you like: a unit that was not finished is done again, from
its last checkpoint where it trains in a `work_folder`. A unit's `seconds` are those since it was last started.
Start the same command twice (`OMP_NUM_THREADS=1` for each) and both share the units.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from antefix import atomic
from antefix.benchmarks.machine import description

ROOT = Path(__file__).resolve().parents[1]
_PATIENCE = 5.0
"""Seconds between looks at what others are at work on."""


@dataclass(frozen=True)
class Unit:
    """One piece of an experiment."""

    work: Callable[[], dict[str, Any]]
    expected_seconds: float


def announce(folder: Path, units: Mapping[str, Unit]) -> None:
    """Say how long all of it takes one core, and what of it is left."""
    missing = _missing(folder, units)
    in_all, left = (sum(units[n].expected_seconds for n in names) / 3600 for names in (units, missing))
    print(f"{len(units)} units, about {in_all:.1f} h of one core; {len(missing)} left, {left:.1f} h", flush=True)


def finish(folder: Path, units: Mapping[str, Unit]) -> dict[str, dict[str, Any]]:
    """Do the units that have no file in `folder` yet; what all of them found, by name.

    A unit that another process is at work on is left to it, and waited for at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while missing := _missing(folder, units):
        if not sum(_done_here(folder, name, units[name]) for name in missing):
            time.sleep(_PATIENCE)
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in units}


@contextmanager
def work_folder(experiment: str, name: str) -> Iterator[Path]:
    """For the checkpoints of one unit; gone when its work is done, kept when it is interrupted."""
    folder = ROOT / "experiments" / "work" / experiment / name
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def best_rate(
    found: Mapping[str, dict[str, Any]], search: str, dev_loss: Callable[[dict[str, Any]], float | None] | None = None
) -> float:
    """The learning rate with the lowest dev loss among the units whose names are this one's with a number behind.

    dev_loss: where a unit has it, None for one that is no number; without: under its name.
    """
    units = [unit for name, unit in found.items() if name.rpartition("_")[0] == search]
    losses = [(u["dev_loss"] if dev_loss is None else dev_loss(u), float(u["learning_rate"])) for u in units]
    return min((loss, rate) for loss, rate in losses if loss is not None)[1]


def _done_here(folder: Path, name: str, unit: Unit) -> bool:
    """Do a unit, unless it is done or another process is at it."""
    path, lock = folder / f"{name}.json", FileLock(folder / f"{name}.lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        return False
    with held:
        is_missing = not path.exists()
        if is_missing:
            started = time.perf_counter()
            found = unit.work()
            seconds = time.perf_counter() - started
            record = {**found, "seconds": round(seconds, 1), "commit": commit(), "made_with": made_with()}
            atomic.write_bytes(path, f"{json.dumps(record, indent=1)}\n".encode())
            print(f"{name}: {seconds:.0f} s, {len(list(folder.glob('*.json')))} done", flush=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        return is_missing


def _missing(folder: Path, units: Mapping[str, Unit]) -> list[str]:
    return [name for name in units if not (folder / f"{name}.json").exists()]


def made_with() -> dict[str, Any]:
    """The processor, the accelerator where there is one, and the versions that change figures."""
    found = description("cuda" if torch.cuda.is_available() else "cpu")
    machine = {name: found[name] for name in ("accelerator", "processor", "features") if name in found}
    return machine | found["versions"]


def commit() -> str:
    """Of Antefix; `+` where files that are tracked were changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "-uno", "src", "experiments") else ""
    )
