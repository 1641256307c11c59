"""Frames of TOP (Gupta et al. 2018, arXiv 1810.07942): `[IN:GET_WEATHER will it rain [SL:LOCATION in boston ] ]`.

A frame is one intent; intents hold words and slots, slots hold words and intents. Parts stand apart by spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_PIECES = re.compile(r"\[(?P<kind>IN|SL):(?P<label>[A-Z_]+)|(?P<end>\])|(?P<word>[^\s\[\]]+)|(?P<other>\S)")


@dataclass(frozen=True, slots=True)
class Node:
    """An intent or a slot."""

    label: str
    """`IN:GET_WEATHER`."""
    content: tuple[Node | str, ...]
    """What it holds, in order; words one by one."""

    def words(self) -> tuple[str, ...]:
        """All words under it."""
        return tuple(w for part in self.content for w in ((part,) if isinstance(part, str) else part.words()))


def parse(text: str) -> Node | None:
    """The tree of a frame; None for a text that is no well-formed one."""
    open_nodes: list[tuple[str, list[Node | str]]] = []
    root: Node | None = None
    for piece in _PIECES.finditer(text):
        if piece["other"] or root is not None:
            return None
        if piece["kind"]:
            wanted = "IN" if not open_nodes or open_nodes[-1][0].startswith("SL") else "SL"
            if piece["kind"] != wanted:
                return None
            open_nodes.append((f"{piece['kind']}:{piece['label']}", []))
        elif not open_nodes:
            return None
        elif piece["word"]:
            open_nodes[-1][1].append(piece["word"])
        else:
            label, content = open_nodes.pop()
            node = Node(label, tuple(content))
            if open_nodes:
                open_nodes[-1][1].append(node)
            else:
                root = node
    return root


def brackets(root: Node) -> Iterator[tuple[str, int, int]]:
    """Every label with the first word it covers and the one behind its last, by their numbers."""

    def walk(node: Node, first: int) -> Iterator[tuple[str, int, int]]:
        place = first
        for part in node.content:
            if isinstance(part, str):
                place += 1
            else:
                yield from walk(part, place)
                place += len(part.words())
        yield node.label, first, place

    yield from walk(root, 0)
