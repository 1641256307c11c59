"""One kept prefix: tensors and a card, as a folder. Knows files; never runs a model.

`docs/format.md` is the format's page: what a reader must accept and refuse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from antefix import atomic
from antefix.base import fingerprint
from antefix.errors import PrefixFileError, WrongBaseError, nearest
from antefix.methods import METHODS, method_class
from antefix.methods.base import MethodModule
from antefix.parts.initial import Positions
from antefix.sites import find_sites
from antefix.tensor_file import TENSORS_FILE, read_tensors

FORMAT_VERSION = 1
CARD_FILE = "card.json"
_MOST_CARD_BYTES = 1 << 20


class BaseRecord(BaseModel):
    """Which base a prefix belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revision: str | None = None
    fingerprint: str


class Card(BaseModel):
    """What a prefix says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = FORMAT_VERSION
    method: str
    config: dict[str, Any]
    positions: Positions
    base: BaseRecord
    text_format: dict[str, Any] = Field(default_factory=dict)
    """How a source becomes text: linearisation, separator, end token (see `antefix.data.TextFormat`)."""
    decoding: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `generate` that are used unless told otherwise."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Data name and hash, rows, steps, seed, library versions, seconds."""
    scores: dict[str, Any] = Field(default_factory=dict)
    """Dev and test scores, each with the version of its metric."""
    parents: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    licence: str | None = None
    notes: str = ""


@dataclass(frozen=True)
class Prefix:
    """Tensors and card of one prefix, as kept."""

    tensors: dict[str, Tensor]
    card: Card

    @property
    def num_values(self) -> int:
        """How many numbers the prefix stores."""
        return sum(t.numel() for t in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """How many bytes its tensors take on disk."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def module(self, model: PreTrainedModel, *, check_base: bool = True) -> MethodModule:
        """The prefix as a module that can be attached.

        Raises WrongBaseError if the base is not the one it was trained for.
        """
        if check_base and (found_fingerprint := fingerprint(model)) != self.card.base.fingerprint:
            raise WrongBaseError(
                f"this prefix was trained for the base '{self.card.base.name}' (fingerprint "
                f"{self.card.base.fingerprint}), the model given has fingerprint {found_fingerprint}: "
                "load the base it was trained for"
            )
        found = method_class(self.card.method)
        config = found.Config.model_validate(self.card.config)
        return found.restore(find_sites(model), config, self.tensors)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, atomically.

        Raises PrefixFileError if the folder exists (unless `overwrite`), or cannot be written.
        """
        path = Path(folder)
        if path.exists() and not overwrite:
            raise PrefixFileError(f"{path} exists: choose another name, or say overwrite")
        try:
            with atomic.new_folder(path, replace=overwrite) as scratch:
                # The bytes go through Python's own write: a full disk is then an error, not a crash of the mapping.
                (scratch / TENSORS_FILE).write_bytes(
                    save(self.tensors, metadata={"format_version": str(FORMAT_VERSION)})
                )
                (scratch / CARD_FILE).write_text(self.card.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise PrefixFileError(
                f"{path}: could not be saved ({error.strerror or error}); nothing was changed"
            ) from error
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Prefix:
        """Read a folder, checking everything before anything is used.

        Raises PrefixFileError, naming file and tensor or key.
        """
        path = Path(folder)
        if not path.is_dir():
            raise PrefixFileError(f"{path}: no such folder; a prefix is a folder with {TENSORS_FILE} and {CARD_FILE}")
        return cls(read_tensors(path / TENSORS_FILE), read_card(path))


def read_card(folder: Path) -> Card:
    """The card of a kept prefix, without its tensors. Raises PrefixFileError."""
    path = folder / CARD_FILE
    try:
        if path.stat().st_size > _MOST_CARD_BYTES:
            raise PrefixFileError(f"{path}: more than {_MOST_CARD_BYTES:,} bytes; that is no card")
        content = json.loads(path.read_bytes())
        version = content.get("format_version", FORMAT_VERSION) if isinstance(content, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise PrefixFileError(
                f"{path}: format version {version}, this Antefix reads up to {FORMAT_VERSION}: upgrade it"
            )
        card = Card.model_validate(content)
        if card.method not in METHODS:
            raise PrefixFileError(f"{path}: unknown method '{card.method[:60]}': {nearest(card.method, METHODS)}")
        method_class(card.method).Config.model_validate(card.config)
    except FileNotFoundError as error:
        raise PrefixFileError(
            f"{path}: no such file; a prefix is a folder with {TENSORS_FILE} and {CARD_FILE}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise PrefixFileError(f"{path}: not a readable card ({_reason(error)})") from error
    return card


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "card"
        return f"{where}: {first['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def kept(module: MethodModule, card: Card) -> Prefix:
    """A trained module as a prefix: folded, ready to be saved."""
    return Prefix(module.kept_tensors(), card)
