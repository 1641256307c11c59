"""One kept prefix: tensors and a card, as a folder. Knows files; never runs a model.

`docs/format.md` is the format's page: what a reader must accept and refuse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from antefix import atomic, strict_json
from antefix.base import Base, Dtype, load_base
from antefix.data.linearise import TextFormat
from antefix.decoding import Decoding
from antefix.errors import DataError, PrefixFileError, RecipeError, WrongBaseError, one_line
from antefix.fingerprint import fingerprint
from antefix.methods import method_class
from antefix.methods.base import MethodModule
from antefix.parts.initial import Positions
from antefix.parts.label_head import LabelHead
from antefix.parts.word_head import WordHead
from antefix.settings import validated
from antefix.sites import find_sites
from antefix.tasks import KeptTask, LabelTask, TextTask
from antefix.tensor_file import TENSORS_FILE, problem_of, read_tensors, sha256_of

FORMAT_VERSION = 1
CARD_FILE = "card.json"
MOST_CARD_BYTES = 1 << 20
_SHA256 = "tensors_sha256"


class BaseRecord(BaseModel):
    """Which base a prefix belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revision: str | None = None
    fingerprint: str

    def load(self, other: str | None = None, *, dtype: Dtype = "float32", device: str = "cpu") -> Base:
        """The base at its revision, or another one in its place, such as a folder with a copy. See `load_base`."""
        return load_base(other or self.name, dtype=dtype, device=device, revision=None if other else self.revision)


class Card(BaseModel):
    """What a prefix says about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    method: str
    config: dict[str, Any]
    positions: Positions
    base: BaseRecord
    task: KeptTask = TextTask()
    """What it answers: texts (null in the file), labels, with their names, or choices."""
    text_format: dict[str, Any] = Field(default_factory=dict)
    """How a source becomes text: linearisation, separator, end token (see `antefix.data.linearise.TextFormat`)."""
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

    @field_validator("task", mode="before")
    @classmethod
    def _null_writes_texts(cls, task: Any) -> Any:
        return TextTask() if task is None else task

    @field_serializer("task")
    def _texts_are_null(self, task: KeptTask) -> dict[str, Any] | None:
        return None if isinstance(task, TextTask) else task.model_dump()

    @property
    def num_virtual_tokens(self) -> int | None:
        """Slots a site, of several methods together those of all; None: it has none."""
        configs = [c for c in self.config.values() if isinstance(c, dict)] or [self.config]
        counts = [c.get("num_virtual_tokens") for c in configs]
        return sum(n for n in counts if isinstance(n, int)) or None


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

        Raises WrongBaseError if the base is not the one it was trained for, PrefixError if a tensor does not fit it.
        """
        if check_base and (found_fingerprint := fingerprint(model)) != self.card.base.fingerprint:
            # Rounding to float16 moves what the fingerprint looks at; bfloat16 and float32 agree.
            todo = "in float32 or bfloat16" if model.dtype == torch.float16 else "it was trained for"
            raise WrongBaseError(
                f"this prefix was trained for the base '{one_line(self.card.base.name)}' (fingerprint "
                f"{one_line(self.card.base.fingerprint, 16)}), the model given has fingerprint {found_fingerprint}: "
                f"load the base {todo}"
            )
        found = method_class(self.card.method)
        config = found.Config.model_validate(self.card.config)
        head, tensors = LabelHead.apart(self.tensors)
        module = found.restore(find_sites(model), config, tensors)
        if isinstance(self.card.task, LabelTask):
            words = self.card.task.word_ids
            labels = len(self.card.task.labels)
            module.head = WordHead(model, words) if words else LabelHead.restore(head, labels)
        return module

    def with_scores(self, name: str, scores: dict[str, Any]) -> Prefix:
        """The same prefix, its card telling these scores too (`test`: what it scored on the test set)."""
        return replace(self, card=self.card.model_copy(update={"scores": {**self.card.scores, name: scores}}))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, atomically.

        Raises PrefixFileError if the folder exists (unless `overwrite`), cannot be written, or could not be read
        again; what was there stays.
        """
        path = Path(folder)
        if path.exists() and not overwrite:
            raise PrefixFileError(f"{path} exists: choose another name, or say overwrite")
        for name, tensor in self.tensors.items():
            if problem := problem_of(tensor):
                raise PrefixFileError(f"{path}: not saved, tensor '{name}' {problem}")
        try:
            with atomic.new_folder(path, replace=overwrite) as scratch:
                # The bytes go through Python's own write: a full disk is then an error, not a crash of the mapping.
                tensors_file = scratch / TENSORS_FILE
                tensors_file.write_bytes(save(self.tensors, metadata={"format_version": str(FORMAT_VERSION)}))
                card = _card_bytes(self.card, sha256_of(tensors_file))
                if len(card) > MOST_CARD_BYTES:
                    raise PrefixFileError(f"{path}: not saved, its card has {len(card):,} bytes: shorten the notes")
                (scratch / CARD_FILE).write_bytes(card)
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
        card, sha256 = read_card_file(path)
        tensors = read_tensors(path / TENSORS_FILE)
        if sha256_of(path / TENSORS_FILE) != sha256:
            raise PrefixFileError(
                f"{path / TENSORS_FILE}: not the bytes that were kept ({_SHA256} in {CARD_FILE}); fetch it again"
            )
        return cls(tensors, card)


def read_card(folder: Path) -> Card:
    """The card of a kept prefix, without its tensors. Raises PrefixFileError."""
    return read_card_file(folder)[0]


def _card_bytes(card: Card, sha256: str) -> bytes:
    content = json.loads(card.model_dump_json())
    ordered = {"format_version": content.pop("format_version"), _SHA256: sha256, **content}
    return (json.dumps(ordered, indent=2, ensure_ascii=False) + "\n").encode()


def read_card_file(folder: Path) -> tuple[Card, str]:
    """The card, and the SHA-256 that its tensor file must have."""
    path = folder / CARD_FILE
    if not path.is_file():
        raise PrefixFileError(f"{path}: no such file; a prefix is a folder with {TENSORS_FILE} and {CARD_FILE}")
    try:
        with path.open("rb") as file:
            content = _card_json(file.read(MOST_CARD_BYTES + 1))
        sha256 = content.pop(_SHA256, None)
        if not isinstance(sha256, str):
            raise ValueError(f"{_SHA256}: missing, or no text")
        card = Card.model_validate(content)
        config = method_class(card.method).Config.model_validate(card.config).model_dump()
        if config.get("positions", card.positions) != card.positions:
            raise ValueError(f"positions: the card says {card.positions}, its config {config['positions']}")
        TextFormat.from_dict(card.text_format)
        validated(Decoding, card.decoding, "decoding.")
    except (OSError, ValueError, DataError, RecipeError) as error:
        raise PrefixFileError(f"{path}: not a readable card ({reason_of(error)})") from error
    return card, sha256


def _card_json(raw: bytes) -> dict[str, Any]:
    """A card's content, if it is of a format that can be read here. Raises ValueError."""
    if len(raw) > MOST_CARD_BYTES:
        raise ValueError(f"more than {MOST_CARD_BYTES:,} bytes")
    content = strict_json.parse(raw)
    version = content.get("format_version")
    if type(version) is not int:
        raise ValueError("format_version: missing, or no whole number")
    if version > FORMAT_VERSION:
        raise ValueError(f"format version {version}, this Antefix reads up to {FORMAT_VERSION}: upgrade it")
    return content


def reason_of(error: Exception) -> str:
    """Why foreign content was refused, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "card"
        return one_line(f"{where}: {first['msg']}")
    return one_line(error) or type(error).__name__
