"""Which prefix was made from which, by the names in the cards' `parents`.

A name in a card is what a parent was called when its child was made: a parent that was renamed or removed since is
shown as not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from antefix.bank.folder import Bank
from antefix.errors import BankError, PrefixError


class Relative(NamedTuple):
    """One place in a tree of relatives."""

    depth: int
    """How many steps from the prefix that was asked for; 1: a parent, or a child."""
    name: str
    is_there: bool
    """Whether the bank has a prefix of this name."""
    is_repeated: bool
    """Whether it stands further up in the tree already; what follows from it is shown there."""


class Lineage(NamedTuple):
    """Both trees of a prefix, each line after the one that it hangs on."""

    parents: list[Relative]
    children: list[Relative]


def lineage(bank: Bank, name: str) -> Lineage:
    """Where a prefix comes from, and what came from it. Raises BankError for a missing name."""
    bank.card(name)
    children = bank.children()

    def parents_of(relative: str) -> Iterable[str]:
        try:
            return bank.card(relative).parents
        except (BankError, PrefixError):
            return ()  # not there, or broken: the tree ends

    return Lineage(_tree(bank, name, parents_of), _tree(bank, name, lambda n: children.get(n, ())))


def _tree(bank: Bank, name: str, next_of: Callable[[str], Iterable[str]]) -> list[Relative]:
    """In order of depth first; each name is followed once, so that a circle of cards ends."""
    found: list[Relative] = []
    seen = {name}
    waiting = [(1, other) for other in reversed(list(next_of(name)))]
    while waiting:
        depth, here = waiting.pop()
        found.append(Relative(depth, here, here in bank, here in seen))
        if here not in seen:
            seen.add(here)
            waiting += [(depth + 1, other) for other in reversed(list(next_of(here)))]
    return found
