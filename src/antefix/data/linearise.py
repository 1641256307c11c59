"""How a source becomes text, and text becomes token ids: one object, kept in the card.

Training and generation use the same object, so they cannot differ. Source (with its separator) and
target are tokenised apart and their ids joined.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from antefix.data.example import Chat, Message, Source, Table, Triples, Words
from antefix.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The names that the files of the paper's code give to E2E's fields.
_E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


@dataclass(frozen=True, slots=True)
class Linearisation:
    """How sources of one kind are written as text."""

    kind: type
    write: Callable[[Any], str]


def _fields(table: Table, names: Mapping[str, str], colon: str) -> str:
    return " | ".join(f"{names.get(field, field)}{colon}{value}" for field, value in table.fields)


LINEARISATIONS: dict[str, Linearisation] = {
    # The paper's three, letter by letter as its code writes them.
    "e2e": Linearisation(Table, lambda s: _fields(s, _E2E_NAMES, " : ")),
    "webnlg": Linearisation(Triples, lambda s: "".join(f" | {a} : {r} : {b}" for a, r, b in s.triples)),
    "dart": Linearisation(Triples, lambda s: " | ".join(f"{a} : {r.lower()} : {b}" for a, r, b in s.triples)),
    # Ours.
    "table": Linearisation(Table, lambda s: _fields(s, {}, ": ")),
    "triples": Linearisation(Triples, lambda s: " | ".join(f"{a} : {r} : {b}" for a, r, b in s.triples)),
    "plain": Linearisation(str, str),
    "words": Linearisation(Words, lambda s: " ".join(s.words)),
}
"""Name -> how a source is written. The card keeps the name, so what it means must never change."""

_KINDS = {str: "plain text", Table: "tables", Triples: "triples", Chat: "conversations", Words: "words"}


class TextFormat(BaseModel):
    """Everything that decides which tokens a source and a target become."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    linearise: str = "plain"
    """A name of `LINEARISATIONS`."""
    instruction: str = ""
    """Stands before every source."""
    before_source: str = ""
    separator: str = "\n"
    """Between source and target; belongs to the source's tokens."""
    before_target: str = ""
    after_target: str = ""
    """Before the end token."""
    end_token: str | None = None
    """One token; None: the tokenizer's own end of text."""
    chat: bool = False
    """Wrap the source in the tokenizer's chat template, as the user's turn."""
    max_source_tokens: int | None = Field(default=None, ge=1)
    """Cut the end off a longer source; its separator, or its chat template, stays. None: nothing is cut."""

    def to_dict(self) -> dict[str, Any]:
        """For a card: everything, so that a later default cannot change what a kept prefix was trained with."""
        return self.model_dump()

    @field_validator("linearise")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in LINEARISATIONS:
            raise DataError(f"unknown linearisation '{name}': {nearest(name, LINEARISATIONS)}")
        return name

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TextFormat:
        """From a card or a recipe. Raises DataError for an unknown key or name, with the nearest known one."""
        for key in content:
            if key not in cls.model_fields:
                raise DataError(f"text format: unknown key '{key}': {nearest(key, cls.model_fields)}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"text format: '{first['loc'][0]}': {first['msg']}") from error

    def source_text(self, source: Source) -> str:
        """The source as text, without separator. Raises DataError if this format cannot write it."""
        if isinstance(source, Chat):
            raise DataError("the source is a conversation: set data.text.chat = true")
        return self.instruction + self.before_source + self._written(source)

    def encode_source(
        self, tokenizer: PreTrainedTokenizerBase, source: Source, *, for_encoder: bool = False
    ) -> list[int]:
        """Token ids of a source and its separator, `max_source_tokens` at most.

        A tokenizer that starts every text with a token of its own (Llama 2) does so here; for an encoder the
        text gets all of the tokenizer's special tokens and no separator.
        """
        if self.chat or isinstance(source, Chat):
            return self._encode_chat(tokenizer, source)
        text = self.source_text(source)
        if for_encoder:
            return self._encode_for_encoder(tokenizer, text)
        opening = _ids(tokenizer, "", special=True)
        start = opening[:1] if opening and opening[0] == tokenizer.bos_token_id else []
        ids = start + _ids(tokenizer, text + self.separator)
        if self.max_source_tokens is None or len(ids) <= self.max_source_tokens:
            return ids
        end = _ids(tokenizer, self.separator)
        room = self.max_source_tokens - len(start) - len(end)
        if room < 1:
            raise DataError(f"max_source_tokens = {self.max_source_tokens} leaves no room beside the separator")
        return start + _ids(tokenizer, text)[:room] + end

    def encode_source_cut(
        self, tokenizer: PreTrainedTokenizerBase, source: Source, *, for_encoder: bool = False
    ) -> tuple[list[int], bool]:
        """The same, and whether the source was cut to `max_source_tokens`."""
        whole = self.model_copy(update={"max_source_tokens": None})
        ids = whole.encode_source(tokenizer, source, for_encoder=for_encoder)
        if self.max_source_tokens is None or len(ids) <= self.max_source_tokens:
            return ids, False
        return self.encode_source(tokenizer, source, for_encoder=for_encoder), True

    def encode_target(self, tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
        """Token ids of a target and its end token."""
        ids = _ids(tokenizer, self.before_target + target + self.after_target)
        return [*ids, self.stop_token_id(tokenizer)]

    def stop_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token that ends a target. Raises DataError if `end_token` is no single token."""
        if self.end_token is None:
            if tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no end-of-text token: set data.text.end_token")
            return int(tokenizer.eos_token_id)
        ids = _ids(tokenizer, self.end_token)
        if len(ids) != 1:
            raise DataError(f"end_token {self.end_token!r} is {len(ids)} tokens for this tokenizer, it must be one")
        return ids[0]

    def _encode_for_encoder(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        if self.max_source_tokens is None:
            return _ids(tokenizer, text, special=True)
        return list(tokenizer(text, truncation=True, max_length=self.max_source_tokens)["input_ids"])

    def _encode_chat(self, tokenizer: PreTrainedTokenizerBase, source: Source) -> list[int]:
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template: set data.text.chat = false, or take a chat model")
        messages = source.messages if isinstance(source, Chat) else (Message("user", self._written(source)),)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        opening = next((t for t in turns if t["role"] == "user"), turns[0])
        opening["content"] = self.instruction + self.before_source + opening["content"]
        ids = _templated(tokenizer, turns)
        while self.max_source_tokens is not None and len(ids) > self.max_source_tokens:
            # The longest turn is cut, so that the template around it stays whole.
            longest = max(turns, key=lambda turn: len(turn["content"]))
            kept = _ids(tokenizer, longest["content"])[: self.max_source_tokens - len(ids)]
            if not kept:
                raise DataError(f"max_source_tokens = {self.max_source_tokens} leaves no room in the chat template")
            num_chars = len(str(tokenizer.decode(kept)).rstrip("\ufffd"))
            longest["content"] = longest["content"][: min(num_chars, len(longest["content"]) - 1)]
            ids = _templated(tokenizer, turns)
        return ids

    def _written(self, source: Source) -> str:
        linearisation = LINEARISATIONS[self.linearise]
        if not isinstance(source, linearisation.kind):
            raise DataError(
                f"the linearisation '{self.linearise}' writes {_KINDS[linearisation.kind]}, the data holds "
                f"{_KINDS[type(source)]}: set data.text.linearise"
            )
        return linearisation.write(source)


def default_format(sources: Sequence[Source]) -> TextFormat:
    """The format that fits these sources, which are of one kind."""
    first = sources[0] if sources else ""
    if isinstance(first, Table):
        fields = {field for source in sources if isinstance(source, Table) for field, _ in source.fields}
        return TextFormat(linearise="e2e" if fields & _E2E_NAMES.keys() else "table")
    if isinstance(first, Triples):
        return TextFormat(linearise="triples")
    if isinstance(first, Words):
        return TextFormat(linearise="words")
    return TextFormat(chat=isinstance(first, Chat))


_MEANING_FIELD = re.compile(r"\s*([^\[\],|:]+)\[([^\]]*)\]\s*(?:,|$)")


def parse_table(text: str) -> Table | None:
    """`name[Fern Hill], food[French]` (E2E's own notation) as a table; None if the text is something else."""
    fields, position = [], 0
    while position < len(text):
        match = _MEANING_FIELD.match(text, position)
        if match is None:
            return None
        fields.append((match[1], match[2]))
        position = match.end()
    return _table_of(fields)


def parse_source(text: str, text_format: TextFormat) -> Source:
    """A source as a person types it, of the kind the format writes.

    A table: E2E's notation, `field: value | field: value`, or a JSON object. Triples:
    `subject : relation : object | ...`, or a JSON list. Else the text itself. Raises DataError if it is empty, or
    none of these.
    """
    text = text.strip()
    if not text:
        raise DataError("the source is empty")
    if text_format.linearise == "plain":
        return text
    source: Source | None
    if LINEARISATIONS[text_format.linearise].kind is Words:
        return Words(tuple(text.split()))
    if LINEARISATIONS[text_format.linearise].kind is Table:
        source = parse_table(text) or _table_of(_json(text) or _piped(text, num_parts=2))
        shown = "table: write name[Fern Hill], food[French] or name: Fern Hill | food: French"
    else:
        source = _triples_of(_json(text) or _piped(text, num_parts=3))
        shown = "list of triples: write subject : relation : object | subject : relation : object"
    if source is None:
        raise DataError(f"'{text[:60]}' is no {shown}")
    return source


def _piped(text: str, *, num_parts: int) -> list[list[str]] | None:
    """`a : b | a : b`, each with so many parts; None if it is something else."""
    pieces = [[part.strip() for part in piece.split(":", num_parts - 1)] for piece in text.split("|") if piece.strip()]
    return pieces if all(len(piece) == num_parts and all(piece) for piece in pieces) else None


def _json(text: str) -> Any:
    if text[0] not in "{[":
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _table_of(content: Any) -> Table | None:
    try:
        return Table.of(content)
    except DataError:
        return None


def _triples_of(content: Any) -> Triples | None:
    try:
        return Triples.of(content)
    except DataError:
        return None


def _templated(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[int]:
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses this conversation ({error})") from error
    return list(ids)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
