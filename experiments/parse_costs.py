"""What PIP costs beside prefix-tuning: a training step and a written token, all three in turns in one process.

    python experiments/parse_costs.py path/to/e2e-dataset.zip

The small BART and the dev pairs of `parse_instructed.py`, 100 slots, steps of 16 pairs, 32 tokens for each of 16 pairs.
Seven rounds; a ratio is taken within a round. Writes `results/parse_instructed/costs.json`; minutes on two cores that
do nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import antefix
from antefix import atomic
from antefix.attach import attached
from antefix.benchmarks.rounds import Spread, interleave
from antefix.data.example import Example
from antefix.training.loop import StepReport
from antefix.training.recipe import TrainingRecipe

from parse_instructed import MODEL, RESULTS, SLOTS, pairs, short_trees  # isort: skip
from units import commit, made_with  # isort: skip

METHODS = ("prefix_tuning", "pip_direct", "pip_indirect")
ROUNDS, PAIRS, STEPS, NEW_TOKENS = 7, 16, 5, 32
ALL_TOKENS = antefix.Decoding(min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    base = antefix.load_base(str(MODEL))
    examples = short_trees(pairs(Path(sys.argv[1]).resolve(), "devset"), base.tokenizer)[: PAIRS * STEPS]
    kept = {method: trained(base, examples, method, []) for method in METHODS}
    seconds = {
        "step": interleave({m: partial(step_rate, base, examples, m) for m in METHODS}, ROUNDS),
        "token": interleave({m: partial(token_rate, base, examples[:PAIRS], kept[m]) for m in METHODS}, ROUNDS),
    }
    found = {
        what: {method: asdict(Spread.of(times_the_seconds(rates, method))) for method in METHODS[1:]}
        for what, rates in seconds.items()
    }
    result = {"times_prefix_tunings_seconds": found, "a_second": seconds, "commit": commit(), "made_with": made_with()}
    atomic.write_bytes(RESULTS / "costs.json", f"{json.dumps(result, indent=1)}\n".encode())
    print(json.dumps(found, indent=1))


def trained(base: antefix.Base, examples: Sequence[Example], method: str, reports: list[StepReport]) -> antefix.Prefix:
    training = TrainingRecipe(max_steps=STEPS, pairs_per_step=PAIRS, tokens_per_batch=4096, evaluations=0)
    return antefix.train(
        base, examples, dev=(), method=method, training=training, watch=reports.append, num_virtual_tokens=SLOTS
    )


def step_rate(base: antefix.Base, examples: Sequence[Example], method: str, number: int) -> float:
    """Pairs a second of a few steps."""
    reports: list[StepReport] = []
    trained(base, examples, method, reports)
    return reports[-1].pairs_per_second


def token_rate(base: antefix.Base, examples: Sequence[Example], prefix: antefix.Prefix, number: int) -> float:
    """Written tokens a second, greedy; the second texts are read within the time."""
    with attached(base.model, prefix):
        started = time.perf_counter()
        antefix.generate(base, examples, decoding=ALL_TOKENS)
        return PAIRS * NEW_TOKENS / (time.perf_counter() - started)


def times_the_seconds(rates: dict[str, list[float]], method: str) -> list[float]:
    return [of_prefix / own for of_prefix, own in zip(rates[METHODS[0]], rates[method], strict=True)]


if __name__ == "__main__":
    main()
