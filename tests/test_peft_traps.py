"""The table beside PEFT is what its script sees: every trap has its row, and ours says again what it says there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

from peft_traps import RESULTS, TRAPS, is_supported  # noqa: E402
from verdicts import Case, examined, table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
RUNS = json.loads(RESULTS.with_suffix(".json").read_text(encoding="utf-8"))
ROWS = {
    (row["trap"], row["model"]): row for version, run in RUNS.items() if is_supported(version) for row in run["rows"]
}
NOT_RIGHT = {
    # Slots stay in sight, and have neither positions nor a bias: there a text as a prefix is not the text in context.
    "sliding window, a text's keys and values as slots, forward pass",
    "sliding window, a text's keys and values as slots, generation",
    "encoder-decoder, a decoder text's keys and values as slots",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_as_the_table_says(trap: Callable[[], Iterator[Case]]) -> None:
    """PEFT's side only under versions that the table knows: others may differ."""
    with torch.no_grad():
        for case in trap():
            row, kept = examined(case), ROWS[case.trap, case.model]
            assert verdict(row["antefix"]) == verdict(kept["antefix"])
            made_with = RUNS.get(transformers.__version__, {}).get("made_with", {})
            if row["peft"] is not None and made_with.get("peft") == peft.__version__:
                assert verdict(row["peft"]) == verdict(kept["peft"]), case.trap
            assert (row["antefix"]["verdict"] == "right") == (case.trap not in NOT_RIGHT), case.trap
            assert (row["right"], row["note"]) == (kept["right"], kept["note"])


def test_the_table_is_made_of_what_was_seen() -> None:
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == table(RUNS)
    assert {trap for trap, _ in ROWS} >= NOT_RIGHT


def verdict(found: dict[str, Any]) -> tuple[Any, ...]:
    """Without the digits that vary from machine to machine."""
    values = {name: (v["right"], v.get("right_ones")) for name, v in found.get("values", {}).items()}
    return found["verdict"], values, found.get("error"), found.get("is")
