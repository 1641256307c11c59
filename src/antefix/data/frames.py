"""Frames of TOP (Gupta et al. 2018, arXiv 1810.07942): `[IN:GET_WEATHER will it rain [SL:LOCATION in boston ] ]`.

A frame is one intent; intents hold words and slots, slots hold words and intents. Parts stand apart by spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_PIECES = re.compile(r"\[(?P<kind>IN|SL):(?P<label>[A-Z_]+)|(?P<end>\])|(?P<word>[^\s\[\]]+)|(?P<other>\S)")


_CUT = re.compile(r"\[(?:I|IN|IN:[A-Z_]*|S|SL|SL:[A-Z_]*)?\Z")
"""An opening bracket at the end of a text, whose label may go on."""


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


@dataclass(slots=True)
class _Reading:
    """What was read so far: open nodes with what they hold, and the frame, once it is closed."""

    open_nodes: list[tuple[str, list[Node | str]]]
    root: Node | None = None

    @property
    def next_kind(self) -> str:
        """Of the nodes that can be opened here."""
        return "IN" if not self.open_nodes or self.open_nodes[-1][0].startswith("SL") else "SL"


def parse(text: str) -> Node | None:
    """The tree of a frame; None for a text that is no well-formed one."""
    reading = _read(text)
    return None if reading is None else reading.root


def ending(text: str, labels: Sequence[str] = ()) -> str | None:
    """The shortest text that makes this beginning of a frame a whole one: the rest of its label, all brackets closed.

    Empty for a whole frame, None for what begins none. labels: those that there are (`IN:GET_WEATHER`); empty: any
    will do, and one that has no letter yet becomes `A`.
    """
    cut = _CUT.search(text)
    reading = _read(text if cut is None else text[: cut.start()], labels)
    if reading is None or (reading.root is not None and cut is not None):
        return None
    if reading.root is not None:
        return ""
    rest, depth = "", len(reading.open_nodes)
    if cut is not None or depth == 0:
        begun, opening = "" if cut is None else cut[0], f"[{reading.next_kind}:"
        has_a_letter = begun.startswith(opening) and begun != opening
        every = [f"[{label}" for label in labels] or [begun if has_a_letter else f"{opening}A"]
        fitting = [one for one in every if one.startswith(opening) and one.startswith(begun)]
        if not fitting:
            return None
        rest, depth = min(fitting, key=len)[len(begun) :], depth + 1
    return rest + " ]" * depth


def _read(text: str, labels: Sequence[str] = ()) -> _Reading | None:
    """None where no frame begins so."""
    reading = _Reading([])
    for piece in _PIECES.finditer(text):
        if piece["other"] or reading.root is not None:
            return None
        if piece["kind"]:
            label = f"{piece['kind']}:{piece['label']}"
            if piece["kind"] != reading.next_kind or (labels and label not in labels):
                return None
            reading.open_nodes.append((label, []))
        elif not reading.open_nodes:
            return None
        elif piece["word"]:
            reading.open_nodes[-1][1].append(piece["word"])
        else:
            label, content = reading.open_nodes.pop()
            node = Node(label, tuple(content))
            if reading.open_nodes:
                reading.open_nodes[-1][1].append(node)
            else:
                reading.root = node
    return reading


def brackets(root: Node) -> Iterator[tuple[str, int, int]]:
    """Every label with the first word it covers and the one after its last, by their numbers."""

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
