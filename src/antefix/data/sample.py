"""Draws parts of a data set: whole sources with all their targets, by seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from antefix.data.encode import where_of
from antefix.data.example import Example
from antefix.data.frames import brackets, parse
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


def sample_frames(examples: Sequence[Example], samples: int, seed: int) -> list[Example]:
    """SPIS, samples per intent and slot: in a drawn order, an example is kept while any label of its frames has fewer.

    An example is kept if it is among the first `samples` that have one of its labels. So smaller draws are part of
    larger ones, and the list begins with them. Raises DataError for a target that is no frame.
    """
    order = list(examples)
    random.Random(f"frames-{seed}").shuffle(order)
    seen: Counter[str] = Counter()
    found: list[tuple[int, Example]] = []
    for example in order:
        labels = _labels_of(example)
        place = min((seen[label] for label in labels), default=samples)
        seen.update(labels)
        if place < samples:
            found.append((place, example))
    return [example for _, example in sorted(found, key=lambda one: one[0])]


def _labels_of(example: Example) -> set[str]:
    labels: set[str] = set()
    for target in example.targets:
        root = parse(target)
        if root is None:
            raise DataError(f"{where_of(example)}: '{target[:60]}' is no frame, such as [IN:GET_WEATHER is it cold ]")
        labels.update(label for label, _, _ in brackets(root))
    return labels


def split_examples(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """`(train, dev)`, by source, so that no source is in both. fraction: 0 leaves the dev set empty.

    Raises DataError if there are fewer than two sources for two sets.
    """
    if fraction == 0:
        return list(examples), []
    if len(examples) < 2:
        raise DataError("a dev set needs at least two different sources: give more examples, or a dev file")
    order = list(range(len(examples)))
    random.Random(f"split-{seed}").shuffle(order)
    dev = set(order[: max(1, min(round(len(examples) * fraction), len(examples) - 1))])
    return [e for n, e in enumerate(examples) if n not in dev], [examples[n] for n in sorted(dev)]
