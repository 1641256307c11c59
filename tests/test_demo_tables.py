"""The demo's own data: hand-written, varied, faithful to its tables, nothing twice."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain

import pytest

from antefix.data import Example, Table
from antefix.demo import tables

SPLITS = ("train", "dev", "test")
DIGITS = re.compile(r"\d+(?:[.,]\d+)*")


@pytest.fixture(scope="module")
def every() -> dict[str, list[Example]]:
    return {split: tables(split) for split in SPLITS}


def domain_of(example: Example) -> str:
    return example.labels["domain"]


def name_stripped(example: Example, text: str) -> str:
    """The text with the table's values replaced by their field's name."""
    assert isinstance(example.source, Table)
    for field, value in sorted(example.source.fields, key=lambda f: -len(f[1])):
        text = re.sub(re.escape(value), f"<{field}>", text, flags=re.IGNORECASE)
    return text.lower()


def test_there_are_enough_tables_in_three_unlike_domains(every: dict[str, list[Example]]) -> None:
    counts = Counter(domain_of(e) for e in chain(*every.values()))
    assert len(counts) == 3
    assert min(counts.values()) >= 100
    assert sum(counts.values()) >= 300
    for split in SPLITS:
        assert len({domain_of(e) for e in every[split]}) == 3


def test_no_table_and_no_text_is_there_twice(every: dict[str, list[Example]]) -> None:
    examples = list(chain(*every.values()))
    assert len({e.source for e in examples}) == len(examples)
    texts = [t for e in examples for t in e.targets]
    assert len(set(texts)) == len(texts)
    assert all(1 <= len(e.targets) <= 3 for e in examples)


def test_texts_are_not_made_from_templates(every: dict[str, list[Example]]) -> None:
    for domain in ("routes", "matches", "plants"):
        stripped = [name_stripped(e, t) for e in chain(*every.values()) if domain_of(e) == domain for t in e.targets]
        assert len(stripped) > 150
        assert len(set(stripped)) == len(stripped), "repeated name-stripped text"
        opening, count = Counter(" ".join(t.split()[:3]) for t in stripped).most_common(1)[0]
        assert count <= 0.03 * len(stripped), f"{count} texts of {domain} open with '{opening}'"


def test_every_figure_of_a_table_is_in_its_texts_and_no_other(every: dict[str, list[Example]]) -> None:
    for example in chain(*every.values()):
        assert isinstance(example.source, Table)
        wanted = {d for _, value in example.source.fields for d in DIGITS.findall(value)}
        for text in example.targets:
            assert set(DIGITS.findall(text)) == wanted, (example.source, text)


def test_texts_are_clean(every: dict[str, list[Example]]) -> None:
    for example in chain(*every.values()):
        for text in example.targets:
            assert text == " ".join(text.split())
            assert text[-1] in ".!?"
            assert 6 <= len(text.split()) <= 50
