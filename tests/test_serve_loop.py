"""Continuous batching: a job's text is what it is alone, whoever its neighbours are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from conftest import DECODER_ONLY, METHOD_CONFIGS, NOT_ON, tiny_base
from serving import (
    add_prefix,
    alone,
    assert_same_text,
    end_of,
    greedy,
    loop_over,
    some_prompt,
    tokens_of,
)

from antefix.bank import Bank
from antefix.base import Base
from antefix.methods import method_class
from antefix.server.messages import Event, Finished, Job

SERVED = [
    m for m in METHOD_CONFIGS
    if not set(DECODER_ONLY) & set(NOT_ON.get(m, ())) and method_class(m).acts_on_rows
]  # fmt: skip
"""Methods that rows of a decoder can carry."""


def bank_of_every_method(folder: Path, base: Base) -> Bank:
    bank = Bank(folder)
    for method in SERVED:
        add_prefix(bank, method, base, method)
    add_prefix(bank, "short", base, num_virtual_tokens=2, seed=2)
    if base.name not in ("tiny-gemma2",):
        add_prefix(bank, "shifted", base, positions="shifted", seed=3)
    return bank


@pytest.mark.parametrize("architecture", DECODER_ONLY)
def test_a_hundred_mixed_jobs_write_what_each_writes_alone(architecture: str, tmp_path: Path) -> None:
    base = tiny_base(architecture)
    bank = bank_of_every_method(tmp_path / "bank", base)
    names = [(), *((name,) for name in bank)]
    dice = random.Random(4)
    count = 100 if architecture == "llama" else 40
    jobs = [
        Job(f"job {n}", some_prompt(dice.randint(1, 30), seed=n), names[n % len(names)], greedy(dice.randint(1, 20)))
        for n in range(count)
    ]
    loop = loop_over(base, bank, max_rows=9)
    coming, events = list(jobs), list[Event]()
    while coming or not loop.is_idle:
        for _ in range(dice.randint(0, 4)):
            if coming:
                loop.add(coming.pop())
        events += loop.step()
    for job in jobs:
        assert isinstance(end_of(events, job.id), Finished), end_of(events, job.id)
        assert_same_text(tokens_of(events, job.id), *alone(base, bank, job))
