"""Every error a user can cause.

AntefixError
├── DataError             a data file, a row or a text is not usable (names file and line)
├── RecipeError           a recipe or a command-line override is wrong (names the key)
├── BaseModelError        a base cannot be loaded or cannot carry a prefix (names the model)
├── PrefixError           a prefix does not fit where it is used
│   ├── ConfigError       a method's config lacks what has no default, or what has none on this base
│   ├── PrefixFileError   a kept prefix is broken, hostile or of an unknown format (names file and tensor)
│   └── WrongBaseError    a prefix was trained for another base
├── BankError             a bank cannot do what was asked (missing name, taken name)
├── TrainingError         a run cannot start, resume or go on
│   └── OtherProcessError another of a run's processes failed, and says why
├── GenerationError       texts cannot be generated as asked
├── ServingError          a server's engine cannot do what was asked, or cannot start
├── ServerError           a server cannot be started as asked (its keys, its port, a missing extra)
├── CommandError          what a command was given does not fit together (names the option)
├── MetricError           a score cannot be computed (a missing program, unequal counts)
└── BenchmarkError        something cannot be measured here, or two arms do not compute the same

A message says what was given, what is allowed and what to do, in one line. The command line prints
it and exits with 2; no traceback is shown for these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal


class AntefixError(Exception):
    """The root: catch this to catch everything a user can cause."""


class DataError(AntefixError):
    """A data file, a row or a text is not usable."""


class RecipeError(AntefixError):
    """A recipe or a command-line override is wrong."""


class BaseModelError(AntefixError):
    """A base cannot be loaded, or cannot carry a prefix."""


class PrefixError(AntefixError):
    """A prefix does not fit where it is used."""


class ConfigError(PrefixError):
    """A method's config does not say what has no default, or what has none on this base."""


class PrefixFileError(PrefixError):
    """A kept prefix is broken, hostile or of an unknown format."""


class WrongBaseError(PrefixError):
    """A prefix was trained for another base."""


class BankError(AntefixError):
    """A bank cannot do what was asked."""


class TrainingError(AntefixError):
    """A run cannot start, resume or go on."""


class OtherProcessError(TrainingError):
    """Another of a run's processes failed, and says why: this one ends with it."""


class GenerationError(AntefixError):
    """Texts cannot be generated as asked."""


ServingKind = Literal[
    "not_found", "broken_prefix", "unsupported", "too_long", "overloaded", "unavailable", "internal"
]  # fmt: skip
"""What went wrong in a server.

`not_found`: no prefix of this name. `broken_prefix`: its files cannot be used, or are for another base. `unsupported`:
it cannot be served, or not with what else was asked for. `too_long`: the prompt and what is to be written do
not fit into the context. `overloaded`: no room now, later perhaps. `unavailable`: the worker died, is being started, or
stops. `internal`: our fault.
"""


class ServingError(AntefixError):
    """A server's engine cannot do what was asked, or cannot start."""

    def __init__(self, message: str, kind: ServingKind) -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


class ServerError(AntefixError):
    """A server cannot be started as asked."""


class CommandError(AntefixError):
    """What a command was given does not fit together, or would overwrite something."""


class MetricError(AntefixError):
    """A score cannot be computed."""


class BenchmarkError(AntefixError):
    """Something cannot be measured here, or two arms do not compute the same."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word: the nearest known one, then all of them.

    >>> nearest("epoch", ["epochs", "seed"])
    "did you mean 'epochs'? Known: epochs, seed"
    """
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(choices)}" if choices else "there are none here"


def one_line(foreign: object, most: int = 200) -> str:
    """What a foreign file or library says, fit for a message: one line, printable, not endless.

    >>> one_line("bad\\n  file \\x1b[31m")
    'bad file ?[31m'
    """
    text = " ".join(str(foreign).split())
    if len(text) > most:
        text = text[:most] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)
