"""A prefix for everybody in E2E (by name and price range or none, 220 of at least 16 pairs): killed, gone on, scored.

    python experiments/many_users.py path/to/e2e-dataset.zip

First in one process, killed with `kill -9` when a third of the prefixes is there and started again; then with two
workers of Ray, one of which is killed at the same moment. SmolLM2-135M in float32, six steps of four pairs each. Checks
that nobody who was kept is trained again, that all are there in the end, and that both runs keep the same tensors to
rounding. Writes `results/many_users.json` and the report's plot beside it.

Given again it goes on: banks and runs are in `experiments/work/many_users/`. `--min-pairs 60` tries it with a few.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from antefix import atomic
from antefix.bank import Bank
from antefix.training.recipe import Recipe
from antefix.training.users import users_of

from units import ROOT, commit, made_with  # isort: skip

FOLDER, RESULT = ROOT / "experiments" / "work" / "many_users", ROOT / "results" / "many_users.json"
BY = ("name", "priceRange")
STEPS, PAIRS_PER_STEP, DEV_PAIRS, EVALUATIONS = 6, 4, 8, 2
SECONDS_A_USER = 9.0
"""On two cores, for the estimate."""
RECIPE = f"""
name = "e2e"
base = "smollm2-135m"
dtype = "float32"
[config]
num_virtual_tokens = 5
[data]
train = "given"
dev_pairs = {DEV_PAIRS}
[training]
max_steps = {STEPS}
pairs_per_step = {PAIRS_PER_STEP}
evaluations = {EVALUATIONS}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--min-pairs", type=int, default=16)
    options = parser.parse_args()
    data = f"{Path(options.data).resolve()}::trainset.csv"
    recipe = Recipe.model_validate({"name": "e2e", "data": {"train": data, "dev_pairs": DEV_PAIRS}})
    num_users = len(users_of(recipe, BY, options.min_pairs, keep_empty=True).users)
    left = sum(num_users - num_kept(FOLDER / name) for name in ("one", "ray"))
    minutes = left * SECONDS_A_USER / 60
    print(f"{num_users} users, twice: {left} prefixes are left, about {minutes:.0f} min", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "e2e.toml").write_text(RECIPE, encoding="utf-8")
    command = ["train-many", data, "e2e.toml", "--min-pairs", str(options.min_pairs), "--keep-empty", "--json"]
    command += [word for column in BY for word in ("--by", column)]
    runs = {
        "one": killed_and_gone_on("one", command, num_users),
        "ray": one_worker_killed("ray", [*command, "--workers", "2"], num_users),
    }
    report = json.loads((FOLDER / "one" / "run" / "report.json").read_text(encoding="utf-8"))
    better = sum(row["dev_loss"] < row["base_dev_loss"] for row in report["rows"] if row["dev_loss"] is not None)
    result = {
        "users": num_users, "runs": runs,
        "median_dev_loss": report["median_dev_loss"], "median_base_dev_loss": report["median_base_dev_loss"],
        "better_than_the_base": better, "worst": report["worst"],
        "largest_relative_difference": largest_difference(FOLDER / "one" / "bank", FOLDER / "ray" / "bank"),
        "commit": commit(), "made_with": made_with(),
    }  # fmt: skip
    shutil.copy(FOLDER / "one" / "run" / "scores.png", RESULT.with_suffix(".png"))
    atomic.write_bytes(RESULT, f"{json.dumps(result, indent=1)}\n".encode())
    print(json.dumps(result, indent=1))


def killed_and_gone_on(name: str, command: list[str], num_users: int) -> dict[str, Any]:
    """In one process, which is killed once."""
    return _run(name, command, num_users, lambda process: process.kill(), goes_on=False)


def one_worker_killed(name: str, command: list[str], num_users: int) -> dict[str, Any]:
    """With workers, one of which is killed once; the command goes on by itself."""

    def kill(process: subprocess.Popen[str]) -> None:
        below = psutil.Process(process.pid).children(recursive=True)
        workers = [one.pid for one in below if any("ray::Worker" in word for word in one.cmdline())]
        os.kill(workers[0], signal.SIGKILL)

    return _run(name, command, num_users, kill, goes_on=True)


def _run(
    name: str, command: list[str], num_users: int, kill: Callable[[subprocess.Popen[str]], None], *, goes_on: bool
) -> dict[str, Any]:
    """What was killed when, and what came of it. A killing that was done is not done again."""
    folder, record = FOLDER / name, FOLDER / f"{name}.json"
    words = [*command, f"bank={folder / 'bank'}", f"run={folder / 'run'}"]
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    else:
        started = time.monotonic()
        process = _start(words)
        while num_kept(folder) < num_users // 3 and process.poll() is None:
            time.sleep(0.2)
        if process.poll() is not None:
            sys.exit(f"the command ended with {process.returncode} before it could be killed: remove {folder}")
        kill(process)
        kept = stamps(folder)
        found = {"kept_at_the_kill": len(kept)}
        if goes_on:
            _finished(process)
        else:
            process.communicate()
        found["seconds_before"] = round(time.monotonic() - started, 1)
        found["kept_ones_trained_again"] = sum(stamps(folder).get(n) != moment for n, moment in kept.items())
        atomic.write_bytes(record, json.dumps(found).encode())
    before = stamps(folder)
    report = _finished(_start(words))
    found["kept_ones_trained_again"] += sum(stamps(folder).get(n) != moment for n, moment in before.items())
    return found | {"prefixes": num_kept(folder), "failed": report["failed"]}


def _start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "antefix", *words], cwd=FOLDER, text=True, stdout=subprocess.PIPE)


def _finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed, _ = process.communicate()
    if process.returncode:
        sys.exit(f"the command ended with {process.returncode}")
    report: dict[str, Any] = json.loads(printed)
    return report


def stamps(folder: Path) -> dict[str, int]:
    """Prefix -> when it was kept."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "bank").glob("*/card.json")}


def num_kept(folder: Path) -> int:
    return len(stamps(folder))


def largest_difference(one: Path, other: Path) -> float:
    """Of any tensor in two banks, relative to its size."""
    first, second = Bank(one), Bank(other)
    return max(
        float((tensor - second[name].tensors[key]).norm() / tensor.norm())
        for name in first
        for key, tensor in first[name].tensors.items()
    )


if __name__ == "__main__":
    main()
