"""A trap, what two sides made of it beside what is right, and the table of it all. Knows no single trap."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from referee import Values  # isort: skip

TOLERANCE = 1e-3
"""Logits of these models are about 10 in size; float32 rounds them in the sixth digit."""
UNITS = {"ids": "rows", "reached": "slot tensors"}
"""What is counted, one by one, where it is not the largest difference that is looked at."""

_HEAD = f"""# Beside PEFT, trap by trap

`python experiments/peft_traps.py`: tiny random models, the same slots on both sides. Numbers are the largest difference
to what is right; within {TOLERANCE:g} is right. Refused: a library says so; crash: an error that none of them meant.
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trap on one model."""

    trap: str
    model: str
    right: str
    """What is right, in words."""
    wanted: Values
    bare: Values
    """The same without slots: shows that they matter, and whose answer another one is."""
    peft: Callable[[], Values] | None
    """None: PEFT has nothing of the kind."""
    antefix: Callable[[], Values]
    others: Mapping[str, Values] = field(default_factory=dict)
    """Further answers to recognise, by what they are."""
    note: str = ""


def examined(case: Case, with_ours: bool = True) -> dict[str, Any]:
    """A row of the table."""
    effect = {name: comparison(case.wanted[name], bare) for name, bare in case.bare.items()}
    assert not any(e["right"] for e in effect.values()), f"{case.trap}: the slots say nothing, nor would the row"
    changed = {name: {k: v for k, v in e.items() if k != "right"} for name, e in effect.items()}
    row: dict[str, Any] = {
        "trap": case.trap,
        "model": case.model,
        "right": case.right,
        "note": case.note,
        "bare": changed,
    }
    row["peft"] = None if case.peft is None else seen(case.peft, case)
    return {**row, "antefix": seen(case.antefix, case)} if with_ours else row


def seen(run: Callable[[], Values], case: Case) -> dict[str, Any]:
    """What a side gave, beside what is right."""
    try:
        found = run()
    except Exception as error:
        first_line = (str(error).strip() or "no word").splitlines()[0]
        return {"verdict": kind_of(error), "error": f"{type(error).__name__}: {first_line}"}
    values = {name: comparison(found[name], wanted) for name, wanted in case.wanted.items()}
    is_right = all(v["right"] for v in values.values())
    known = {"as without slots": case.bare, **case.others}
    whose = [words for words, answer in known.items() if answer and is_equal(found, answer)]
    return {"verdict": "right" if is_right else "wrong", "values": values, "is": whose}


def comparison(found: Tensor, wanted: Tensor) -> dict[str, Any]:
    if wanted.is_floating_point():
        difference = float((found - wanted).abs().max())
        return {"right": difference <= TOLERANCE, "largest_difference": difference}
    equal = [bool(torch.equal(one, other)) for one, other in zip(found, wanted, strict=True)]
    return {"right": all(equal), "right_ones": sum(equal), "of": len(equal)}


def is_equal(found: Values, answer: Values) -> bool:
    return all(comparison(found[name], value)["right"] for name, value in answer.items())


def kind_of(error: Exception) -> Literal["refused", "crash"]:
    """Refused: one of the libraries said so. A crash is an error that none of them raised in its own words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = {"peft", "transformers", "antefix"} & set(Path(last.filename).parts)
    return "refused" if said and (last.line or "").lstrip().startswith("raise ") else "crash"


def table(runs: Mapping[str, Any]) -> str:
    """Markdown: a row a trap, a column of PEFT's for every transformers that was run, the newest first."""
    versions = sorted(runs, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
    ours = next(v for v in versions if all("antefix" in row for row in runs[v]["rows"]))
    columns = [f"PEFT {runs[v]['made_with']['peft']}, transformers {v}" for v in versions]
    head = ["trap", "model", "what is right", *columns, f"Antefix, transformers {ours}"]
    lines, notes = [_line(head), "|" + " --- |" * len(head)], []
    known = {v: {(r["trap"], r["model"]): r for r in runs[v]["rows"]} for v in versions}
    for row in runs[ours]["rows"]:
        key = (row["trap"], row["model"])
        pefts = [cell(known[v][key]["peft"]) if key in known[v] else "not run" for v in versions]
        lines.append(_line([row["trap"], row["model"], row["right"], *pefts, cell(row["antefix"])]))
        notes += [f"- {row['trap']}, {row['model']}: {row['note']}."] if row["note"] else []
    return "\n".join([_HEAD, *lines, "", *notes]) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "has no such thing"
    if "error" in found:
        return f"{found['verdict']}: `{found['error'].replace('`', '')}`"
    parts = [in_words(name, value) for name, value in found["values"].items()]
    return "; ".join([*parts, *(found["is"] if found["verdict"] == "wrong" else [])])


def in_words(name: str, value: dict[str, Any]) -> str:
    if "of" in value:
        return "right" if value["right"] else f"wrong: {value['right_ones']} of {value['of']} {UNITS[name]} are right"
    figure = f"{value['largest_difference']:.1g}"
    return f"{name} right (within {figure})" if value["right"] else f"{name} wrong by {figure}"
