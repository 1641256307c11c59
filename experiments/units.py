"""Long experiments in small units: each finished unit is a JSON file, and the next start goes on from those.

The estimate of the whole is printed first. Interrupt it when you like: a unit that was not finished is done again.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antefix.benchmarks.machine import description

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Unit:
    """One piece of an experiment."""

    work: Callable[[], dict[str, Any]]
    expected_seconds: float


def announce(folder: Path, units: Mapping[str, Unit]) -> None:
    """Say how long all of it takes, and what of it is left."""
    missing = _missing(folder, units)
    in_all, left = (sum(units[n].expected_seconds for n in names) / 3600 for names in (units, missing))
    print(f"{len(units)} units, about {in_all:.1f} h; {len(missing)} are left, about {left:.1f} h", flush=True)


def finish(folder: Path, units: Mapping[str, Unit]) -> dict[str, dict[str, Any]]:
    """Do the units that have no file in `folder` yet; what all of them found, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = _missing(folder, units)
    for number, name in enumerate(missing, start=1):
        started = time.perf_counter()
        found = units[name].work()
        seconds = time.perf_counter() - started
        record = {**found, "seconds": round(seconds, 1), "commit": commit(), "made_with": made_with()}
        path = folder / f"{name}.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        print(f"{number}/{len(missing)} {name}: {seconds:.0f} s", flush=True)
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in units}


def _missing(folder: Path, units: Mapping[str, Unit]) -> list[str]:
    return [name for name in units if not (folder / f"{name}.json").exists()]


def made_with() -> dict[str, Any]:
    """The processor and the versions that change figures."""
    found = description()
    return {"processor": found["processor"], "features": found["features"], **found["versions"]}


def commit() -> str:
    """Of Antefix; `+` where files that are tracked were changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "src") else "")
