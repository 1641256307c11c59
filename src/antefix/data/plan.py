"""Which pairs make up an optimiser step, and which of them share a forward pass.

A function of the seed and the step's number alone, so that a run can go on anywhere. Knows lengths, no tensors.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from antefix.data.encode import Encoded
from antefix.errors import DataError


@dataclass(frozen=True, slots=True)
class Unit:
    """Some targets of one source, the piece that is shuffled and packed into one row."""

    example: int
    targets: tuple[int, ...]


def steps(encoded: Encoded, *, pairs_per_step: int, targets_per_row: int, seed: int) -> Iterator[list[Unit]]:
    """The units of every optimiser step, for ever: each holds exactly `pairs_per_step` pairs.

    An epoch visits every pair once, in an order drawn from the seed and the epoch. Sources are mixed: at most
    `targets_per_row` targets of one source stay together, in rows that are as few and as even as can be (nine by four
    are three by three: no more tokens than four, four and one, and no source weighs more than it must). A step may
    reach over the end of an epoch. Skipping steps costs next to nothing. Raises DataError where no example has a
    target.
    """
    if encoded.num_pairs == 0:
        raise DataError("no example has a target")
    step: list[Unit] = []
    room = pairs_per_step
    epoch = 0
    while True:
        for unit in _shuffled_units(encoded, targets_per_row, seed, epoch):
            targets = unit.targets
            while targets:
                fitting = len(targets) if encoded.are_choices else room
                step.append(Unit(unit.example, targets[:fitting]))
                room -= encoded.pairs_in(len(targets[:fitting]))
                targets = targets[fitting:]
                if room == 0:
                    yield step
                    step, room = [], pairs_per_step
        epoch += 1


def _shuffled_units(encoded: Encoded, targets_per_row: int, seed: int, epoch: int) -> list[Unit]:
    order = random.Random(f"{seed}-{epoch}")
    units = []
    for index in encoded.of_epoch(epoch):
        targets = list(range(len(encoded.examples[index].targets)))
        order.shuffle(targets)
        num_rows = -(-len(targets) // (len(targets) or 1 if encoded.are_choices else targets_per_row))
        edges = [len(targets) * n // num_rows for n in range(num_rows + 1)] if targets else []
        units += [Unit(index, tuple(targets[first:last])) for first, last in pairwise(edges)]
    order.shuffle(units)
    return units


def all_units(encoded: Encoded, targets_per_row: int | None = None) -> list[Unit]:
    """Every pair once, in the order of the data: for a loss over a dev set. None: all targets of a source together."""
    return [
        Unit(index, tuple(range(start, min(start + size, len(example.targets)))))
        for index, example in enumerate(encoded.examples)
        for size in [targets_per_row or max(1, len(example.targets))]
        for start in range(0, len(example.targets), size)
    ]


def microbatches(
    encoded: Encoded, units: Sequence[Unit], token_budget: int, *, packed: bool, multiple_of: int = 1
) -> list[list[Unit]]:
    """Units in batches of at most `token_budget` tokens, padding included.

    A row that is longer than the budget gives some of its targets to a row of their own; a single pair that is
    longer is a batch by itself, as are choices and labelled texts. packed: rows are laid end to end, and batches are as
    few as they can be and hold about the same number of tokens. Else they are padded, and those of like lengths stand
    together; texts that are written are a row for every target then. multiple_of: so many processes get as many batches
    each, where there are pairs enough.
    """
    rows = [part for unit in units for part in _fitting(encoded, unit, token_budget, packed)]
    divisible = not encoded.are_choices
    while divisible and len(rows) < multiple_of and (long := [row for row in rows if len(row.targets) > 1]):
        longest = rows.index(max(long, key=lambda row: row_tokens(encoded, row)))
        rows[longest : longest + 1] = _halves(rows[longest])
    if packed and not encoded.for_encoder:
        return _evenly(encoded, rows, token_budget, multiple_of)
    batches: list[list[Unit]] = []
    for unit in sorted(rows, key=lambda row: row_tokens(encoded, row)):
        if batches and _batch_tokens(encoded, [*batches[-1], unit], packed) <= token_budget:
            batches[-1].append(unit)
        else:
            batches.append([unit])
    while len(batches) % multiple_of and (wide := [batch for batch in batches if len(batch) > 1]):
        fullest = batches.index(max(wide, key=lambda batch: _batch_tokens(encoded, batch, packed)))
        half = len(batches[fullest]) // 2
        batches[fullest : fullest + 1] = [batches[fullest][:half], batches[fullest][half:]]
    return batches


def _evenly(encoded: Encoded, rows: Sequence[Unit], token_budget: int, multiple_of: int) -> list[list[Unit]]:
    """The longest row first, always into the batch that is emptiest."""
    longest_first = sorted(rows, key=lambda row: row_tokens(encoded, row), reverse=True)
    total = sum(row_tokens(encoded, row) for row in rows)
    count = min(-(-total // token_budget), len(rows))
    while True:
        count = min(-(-count // multiple_of) * multiple_of, len(rows))
        batches: list[list[Unit]] = [[] for _ in range(count)]
        fed = [(0, n) for n in range(count)]  # a heap: tokens, batch
        for row in longest_first:
            tokens, emptiest = fed[0]
            batches[emptiest].append(row)
            heapq.heapreplace(fed, (tokens + row_tokens(encoded, row), emptiest))
        if count == len(rows) or all(tokens <= token_budget or len(batches[n]) == 1 for tokens, n in fed):
            return batches
        count += max(1, count // 16)


def _fitting(encoded: Encoded, unit: Unit, token_budget: int, packed: bool) -> list[Unit]:
    if len(unit.targets) == 1 or encoded.are_choices:
        return [unit]
    if not packed and not encoded.for_encoder:
        return _rows(encoded, unit, packed)
    if _batch_tokens(encoded, [unit], packed) <= token_budget:
        return [unit]
    return [part for half in _halves(unit) for part in _fitting(encoded, half, token_budget, packed)]


def _halves(unit: Unit) -> tuple[Unit, Unit]:
    half = len(unit.targets) // 2
    return Unit(unit.example, unit.targets[:half]), Unit(unit.example, unit.targets[half:])


def _batch_tokens(encoded: Encoded, units: Sequence[Unit], packed: bool) -> int:
    """Tokens that a batch of these units feeds, padding included."""
    examples = encoded.examples
    if not encoded.for_encoder:
        rows = [row for u in units for row in _rows(encoded, u, packed)]
        return len(rows) * max(row_tokens(encoded, row) for row in rows)
    targets = [len(examples[u.example].targets[t]) for u in units for t in u.targets]
    return len(units) * max(len(examples[u.example].source) for u in units) + len(targets) * max(targets)


def _rows(encoded: Encoded, unit: Unit, packed: bool) -> list[Unit]:
    """The rows that a unit is fed as, each with the source."""
    if packed or encoded.examples[unit.example].places:
        return [unit]
    return [Unit(unit.example, (target,)) for target in unit.targets]


def row_tokens(encoded: Encoded, unit: Unit) -> int:
    """Tokens of a packed row, or of a text that is labelled. A target's last one is not fed, and no label is."""
    example = encoded.examples[unit.example]
    if example.places:
        return len(example.source)
    return len(example.source) + sum(len(example.targets[t]) - 1 for t in unit.targets)
