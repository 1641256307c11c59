"""How faithful texts are to their tables: values left out, and values said that no field has. Our own score.

A value is said if its words stand in the text next to one another, whatever the case, the punctuation and the
spaces around them ("family-friendly" is "Family friendly"). Another wording of a value ("under 20 pounds" for
"less than £20") counts as missing. Words are found by the spaces and signs between them, which some scripts do
without.

Whether a text adds something can be known only in part. Counted are values that a field has in some *other* table
of the set and no field has in this one, and numbers in figures that are in none of the table's values. Other
additions are not seen; and a word that is some other table's value may be harmless here ("high" in "a high
street"). A word that is part of one of the table's own values where it stands ("Rouge" in "Café Rouge") is no
addition.

So both shares serve to compare systems on one set, beside those of its references; by themselves they prove little.
Values like yes and no never stand in a text word for word: they are left out and counted as not checkable. An
empty text misses every value and adds none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from antefix.data.example import Table
from antefix.errors import MetricError

VERSION = "fields.1"
NOT_CHECKABLE = frozenset({"yes", "no", "true", "false", "none"})
"""Values no text says word for word; so are values without a letter or digit."""
NUMBER = "number"
"""Stands for the field of a number that is in none of the table's values."""

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")
_NO_WORDS = "  "
_GONE = "|"
"""Put in place of a value that was found, so that its words are not found again; never a word itself."""

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldReport:
    """Counts over a set, and the findings of every text."""

    checked: int
    """Values that could be looked for."""
    not_checkable: int
    missing: list[list[Pair]]
    """For every text the (field, value) pairs of its table that it does not say."""
    added: list[list[Pair]]
    """For every text the (field, value) pairs of other tables, and the ("number", figure) pairs, that it says."""

    @property
    def missing_share(self) -> float | None:
        """Missing values, of those that could be looked for; None where there was none."""
        return _share(sum(map(len, self.missing)), self.checked)

    @property
    def added_share(self) -> float | None:
        """Added values, of all values found in the texts; None where none was found."""
        added = sum(map(len, self.added))
        return _share(added, added + self.checked - sum(map(len, self.missing)))


def check_fields(tables: Sequence[Table], texts: Sequence[str]) -> FieldReport:
    """Check every text against its table. Raises MetricError for unequal counts or an empty set."""
    if len(tables) != len(texts):
        raise MetricError(f"{len(texts)} texts for {len(tables)} tables: one text for every table is needed")
    if not tables:
        raise MetricError("nothing to check: there are no tables")
    known = _longest_first({pair for table in tables for pair in _checkable(table)})
    missing, added, checked = [], [], 0
    for table, text in zip(tables, texts, strict=True):
        pairs = _checkable(table)
        said = _words(text)
        checked += len(pairs)
        missing.append([pair for pair in pairs if _words(pair[1]) not in said])
        added.append(_added(table, said, known))
    not_checkable = sum(len(table.fields) for table in tables) - checked
    return FieldReport(checked=checked, not_checkable=not_checkable, missing=missing, added=added)


def _added(table: Table, said: str, known: dict[str, Pair]) -> list[Pair]:
    own = {_words(value) for _, value in table.fields} - {_NO_WORDS}
    for words in sorted(own, key=len, reverse=True):
        said = _without(said, words)
    found: list[Pair] = []
    for words, pair in known.items():
        if words in said:
            found.append(pair)
            said = _without(said, words)
    own_numbers = {word for words in own for word in words.split() if word[0].isdigit()}
    numbers = dict.fromkeys(word for word in said.split() if word[0].isdigit())
    return found + [(NUMBER, number) for number in numbers if number not in own_numbers]


def _checkable(table: Table) -> list[Pair]:
    return [(f, v) for f, v in table.fields if v.strip().casefold() not in NOT_CHECKABLE and _words(v) != _NO_WORDS]


def _longest_first(pairs: Iterable[Pair]) -> dict[str, Pair]:
    """The words of a value -> the pair; so that "fast food" is found before "food", ties in one order whatever the
    set's. A value that several fields know is named by the first field of the alphabet."""
    named: dict[str, Pair] = {}
    for pair in sorted(pairs):
        named.setdefault(_words(pair[1]), pair)
    return dict(sorted(named.items(), key=lambda item: (-len(item[0]), item[1])))


def _words(text: str) -> str:
    """Words and numbers in lower case, each with a space on both sides: " the  mill  20  25 "."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(f" {word} " for word in _WORD.findall(plain)) or _NO_WORDS


def _without(said: str, words: str) -> str:
    return said.replace(words, f" {_GONE} ")


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
