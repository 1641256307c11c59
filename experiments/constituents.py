"""Constituent trees of English sentences by link-grammar's parser, and how far two trees are from each other.

Needs Debian's `link-grammar` and `link-grammar-dictionaries-en` (`apt-get install`), and `pip install zss`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PARSER = "link-parser"
SECONDS_A_SENTENCE = 2
_TOKENS = re.compile(r"\(|\)|[^\s()]+")


@dataclass(frozen=True)
class Tree:
    """A constituent and those in it; words are left out."""

    label: str
    children: tuple[Tree, ...] = ()

    def __str__(self) -> str:
        return f"({' '.join([self.label, *map(str, self.children)])})"

    def cut(self, depth: int) -> Tree:
        """Without what is further down than so many levels below this one."""
        return Tree(self.label, tuple(c.cut(depth - 1) for c in self.children) if depth else ())


def parsed(sentences: Sequence[str]) -> list[Tree | None]:
    """The likeliest tree of each; None where the parser finds none in which every word has a place."""
    if shutil.which(PARSER) is None:
        raise SystemExit(f"{PARSER} is missing: apt-get install link-grammar link-grammar-dictionaries-en")
    # A sentence is told from what the parser says of it by being echoed; in front of it `!` would be a command.
    plain = [" ".join(s.replace("(", " ").replace(")", " ").split()).lstrip("!") or "." for s in sentences]
    options = ["-constituents=3", "-graphics=0", "-verbosity=0", "-echo=1", f"-timeout={SECONDS_A_SENTENCE}"]
    ran = subprocess.run(
        [PARSER, "en", *options], input="\n".join([*plain, ""]), capture_output=True, text=True, check=True
    )
    lines = iter(ran.stdout.splitlines())
    found: list[Tree | None] = []
    said = next(lines, None)
    for sentence in plain:
        while said is not None and said != sentence:
            said = next(lines, None)
        if said is None:
            raise SystemExit(f"{PARSER} did not repeat '{sentence}': its answers can be told from each other no more")
        said = next(lines, None)
        found.append(tree_of(said) if said is not None and said.startswith("(S") else None)
    return found


def tree_of(line: str) -> Tree | None:
    """From the parser's line; None where it left out a word (in braces)."""
    if re.search(r"\s\{.+?\}(\s|\))", line):
        return None
    return next(iter(_trees(iter(_TOKENS.findall(line)))), None)


def _trees(tokens: Iterator[str]) -> tuple[Tree, ...]:
    """Up to the closing bracket: what stands behind an opening one is a label, all else words."""
    found = []
    for token in tokens:
        if token == ")":
            break
        if token == "(":
            found.append(Tree(next(tokens), _trees(tokens)))
    return tuple(found)


def edit_distance(one: Tree, other: Tree) -> float:
    """Zhang and Shasha's tree edit distance; inserting, deleting and renaming cost 1."""
    from zss import simple_distance

    return float(simple_distance(one, other, lambda t: list(t.children), lambda t: t.label))
