"""COPA, CB and RTE from 32 examples each, by ranking: T-Few's recipe beside the base as it is.

    python experiments/few_glue.py path/to/fewglue_32dev

SmolLM2-135M in float32, one seed, one way to ask for each task, T-Few's 1,000 steps of eight examples. The test sets
are the validation sets of SuperGLUE (100, 56 and 277 examples), whose own test labels are hidden; the 32 dev examples
are not used, since T-Few tunes nothing. Writes `results/few_glue/`; minutes on an accelerator, an hour and a half
on two cores (two processes with one thread each).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import antefix
from antefix.attach import attached
from antefix.choices import choose_each
from antefix.data.example import Example
from antefix.data.linearise import TextFormat
from antefix.metrics import score
from antefix.tasks.ranking import RankingTask

import t_few  # isort: skip
from smollm import READ, smollm  # isort: skip
from units import ROOT, Unit, announce, finish, work_folder  # isort: skip

RESULTS = ROOT / "results" / "few_glue"
FORMAT = TextFormat(separator="")
"""Choices begin with the space that parts them from the source."""


def copa(row: dict[str, Any]) -> Example:
    """The premise goes on with its cause or its effect."""
    word = {"cause": "because", "effect": "so"}[row["question"]]
    texts = (row["choice1"], row["choice2"])
    choices = tuple(f" {t}" if t.startswith("I ") else f" {t[0].lower()}{t[1:]}" for t in texts)
    return Example(
        source=f"{row['premise'].strip().rstrip('.')} {word}", targets=(choices[row["label"]],), choices=choices
    )


def entailment(words: dict[str, str], row: dict[str, Any]) -> Example:
    """words: of every label."""
    asked = f"{', '.join(list(words.values())[:-1])} or {list(words.values())[-1]}?"
    return Example(
        source=f"{row['premise'].strip()}\nQuestion: {row['hypothesis'].strip().rstrip('.')}. {asked}\nAnswer:",
        targets=(f" {words[row['label']]}",),
        choices=tuple(f" {word}" for word in words.values()),
    )


@dataclass(frozen=True)
class Task:
    """How a row becomes an example, and how long it is trained."""

    example: Callable[[dict[str, Any]], Example]
    tested: int
    tokens: int
    """Of an example with its choices."""


TASKS = {
    "COPA": Task(copa, 100, 28),
    "CB": Task(
        partial(entailment, {"entailment": "True", "contradiction": "False", "neutral": "Neither"}),
        56, 120,
    ),
    "RTE": Task(partial(entailment, {"entailment": "True", "not_entailment": "False"}), 277, 92),
}  # fmt: skip


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    units = {}
    for name, task in TASKS.items():
        tested = task.tested * task.tokens / READ
        seconds = t_few.STEPS * t_few.EXAMPLES_A_STEP * task.tokens / t_few.TRAINED + tested
        units[f"t_few_{name}"] = Unit(partial(t_few_on, folder, name), seconds)
        units[f"untrained_{name}"] = Unit(partial(untrained_on, folder, name), tested)
    announce(RESULTS / "units", units)
    found = finish(RESULTS / "units", units)
    summary = {
        name: {
            "majority": round(majority(folder, name), 4),
            "untrained": round(found[f"untrained_{name}"]["accuracy"], 4),
            "t_few": round(found[f"t_few_{name}"]["accuracy"], 4),
            "stored_values": found[f"t_few_{name}"]["stored_values"],
        }
        for name in TASKS
    }
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def rows_of(folder: Path, name: str, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def data(folder: Path, name: str, part: str) -> list[Example]:
    return [TASKS[name].example(row) for row in rows_of(folder, name, part)]


def majority(folder: Path, name: str) -> float:
    """The share of the label that most test rows have."""
    labels = [row["label"] for row in rows_of(folder, name, "val")]
    return max(Counter(labels).values()) / len(labels)


def t_few_on(folder: Path, name: str) -> dict[str, Any]:
    base = smollm()
    with work_folder("few_glue", name) as work:
        prefix = t_few.trained(base, data(folder, name, "train"), FORMAT, seed=0, run_folder=work)
    test = data(folder, name, "val")
    with attached(base.model, prefix):
        taken = antefix.label(base, test)
    return {"task": name, "stored_values": prefix.num_values, **accuracy(test, taken)}


def untrained_on(folder: Path, name: str) -> dict[str, Any]:
    """What the base alone takes."""
    test = data(folder, name, "val")
    taken = dict(choose_each(smollm(), test, RankingTask(), FORMAT))
    return {"task": name, **accuracy(test, [taken[n] for n in range(len(test))])}


def accuracy(test: list[Example], taken: list[str]) -> dict[str, float]:
    return score([e.targets for e in test], taken, ["accuracy"])


if __name__ == "__main__":
    main()
