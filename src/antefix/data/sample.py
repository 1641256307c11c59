"""Draws parts of a data set: whole sources with all their targets, by seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from antefix.data.example import Example
from antefix.errors import DataError


def sample_pairs(examples: Sequence[Example], pairs: int, seed: int) -> list[Example]:
    """Whole sources in a drawn order until `pairs` source/target pairs are reached; the last one is cut to fit.

    Raises DataError if there are fewer pairs.
    """
    order = list(examples)
    random.Random(f"sample-{seed}").shuffle(order)
    drawn: list[Example] = []
    room = pairs
    for example in order:
        if room == 0:
            break
        if example.targets:
            drawn.append(replace(example, targets=example.targets[:room]))
            room -= len(drawn[-1].targets)
    if room:
        raise DataError(f"{pairs} pairs were asked for, the data has {pairs - room}")
    return drawn


def split_examples(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """`(train, dev)`, by source, so that no source is in both.

    Raises DataError if there are fewer than two sources.
    """
    if len(examples) < 2:
        raise DataError("a dev set needs at least two different sources: give more examples, or a dev file")
    order = list(range(len(examples)))
    random.Random(f"split-{seed}").shuffle(order)
    dev = set(order[: max(1, min(round(len(examples) * fraction), len(examples) - 1))])
    return [e for n, e in enumerate(examples) if n not in dev], [examples[n] for n in sorted(dev)]
