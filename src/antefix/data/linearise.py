"""How a source becomes text, and text becomes token ids: one object, kept in the card.

Training, generation and serving use the same object, so they cannot differ. Source (with its separator) and
target are tokenised apart and their ids joined.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from antefix.data.example import Chat, Message, Source, Table, Triples
from antefix.errors import DataError, nearest

# The names that the files of the paper's code give to E2E's fields.
_E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def _table(source: Source, names: dict[str, str], colon: str) -> str:
    if not isinstance(source, Table):
        raise DataError(f"this text format writes tables, the source is {_kind_of(source)}: set data.text.linearise")
    return " | ".join(f"{names.get(field, field)}{colon}{value}" for field, value in source.fields)


def _triples(source: Source) -> tuple[tuple[str, str, str], ...]:
    if not isinstance(source, Triples):
        raise DataError(f"this text format writes triples, the source is {_kind_of(source)}: set data.text.linearise")
    return source.triples


def _plain(source: Source) -> str:
    if not isinstance(source, str):
        raise DataError(
            f"this text format writes plain text, the source is {_kind_of(source)}: set data.text.linearise"
        )
    return source


LINEARISATIONS: dict[str, Callable[[Source], str]] = {
    # The paper's three, letter by letter as its code writes them.
    "e2e": lambda s: _table(s, _E2E_NAMES, " : "),
    "webnlg": lambda s: "".join(f" | {a} : {r} : {b}" for a, r, b in _triples(s)),
    "dart": lambda s: " | ".join(f"{a} : {r.lower()} : {b}" for a, r, b in _triples(s)),
    # Ours.
    "table": lambda s: _table(s, {}, ": "),
    "triples": lambda s: " | ".join(f"{a} : {r} : {b}" for a, r, b in _triples(s)),
    "plain": _plain,
}
"""Name -> how a source is written. The card keeps the name, so what it means must never change."""


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

    def to_dict(self) -> dict[str, Any]:
        """For a card: what differs from the defaults, and the linearisation's name."""
        return {"linearise": self.linearise} | self.model_dump(exclude_defaults=True)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TextFormat:
        """From a card or a recipe. Raises DataError for an unknown key or name, with the nearest known one."""
        for key in content:
            if key not in cls.model_fields:
                raise DataError(f"text format: unknown key '{key}': {nearest(key, cls.model_fields)}")
        try:
            made = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"text format: '{first['loc'][0]}': {first['msg']}") from error
        if made.linearise not in LINEARISATIONS:
            raise DataError(f"unknown linearisation '{made.linearise}': {nearest(made.linearise, LINEARISATIONS)}")
        return made

    def source_text(self, source: Source) -> str:
        """The source as text, without separator. Raises DataError if this format cannot write it."""
        if isinstance(source, Chat):
            raise DataError("the source is a conversation: set data.text.chat = true")
        return self.instruction + self.before_source + LINEARISATIONS[self.linearise](source)

    def encode_source(
        self, tokenizer: PreTrainedTokenizerBase, source: Source, *, for_encoder: bool = False
    ) -> list[int]:
        """Token ids of a source and its separator.

        A tokenizer that starts every text with a token of its own (Llama 2) does so here; for an encoder the
        text gets all of the tokenizer's special tokens and no separator.
        """
        if self.chat or isinstance(source, Chat):
            return self._encode_chat(tokenizer, source)
        text = self.source_text(source)
        if for_encoder:
            return _ids(tokenizer, text, special=True)
        ids = _ids(tokenizer, text + self.separator)
        opening = _ids(tokenizer, "", special=True)
        if opening and opening[0] == tokenizer.bos_token_id:
            ids = [opening[0], *ids]
        return ids

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

    def _encode_chat(self, tokenizer: PreTrainedTokenizerBase, source: Source) -> list[int]:
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template: set data.text.chat = false, or take a chat model")
        if isinstance(source, Chat):
            messages = source.messages
        else:
            messages = (Message("user", self.source_text(source)),)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        return list(ids)  # type: ignore[arg-type]


PAPER = TextFormat(before_source=" ", separator=" <|endoftext|> ", after_target=" ")
"""GPT-2 in the paper's code: `' {source} {bos} '` and `'{target} {eos}'`, with its bos = eos; add a linearisation."""


def default_format(sources: Sequence[Source]) -> TextFormat:
    """The format that fits the first source."""
    first = sources[0] if sources else ""
    if isinstance(first, Table):
        is_e2e = any(field in _E2E_NAMES for field, _ in first.fields)
        return TextFormat(linearise="e2e" if is_e2e else "table")
    if isinstance(first, Triples):
        return TextFormat(linearise="triples")
    return TextFormat(chat=isinstance(first, Chat))


_MEANING_FIELD = re.compile(r"\s*([^\[\],|:]+)\[([^\]]*)\]\s*(?:,|$)")


def parse_table(text: str) -> Table | None:
    """`name[The Eagle], food[French]` (E2E's own notation) as a table; None if the text is something else."""
    fields, position = [], 0
    while position < len(text):
        match = _MEANING_FIELD.match(text, position)
        if match is None:
            return None
        fields.append((match[1].strip(), match[2].strip()))
        position = match.end()
    return Table(tuple(fields)) if fields else None


def parse_source(text: str, text_format: TextFormat) -> Source:
    """A source as a person types it: E2E's notation, `field: value | field: value`, a JSON object, or plain text.

    Raises DataError if the format writes tables or triples and the text is neither.
    """
    text = text.strip()
    if not text:
        raise DataError("the source is empty")
    if text_format.linearise == "plain":
        return text
    if text_format.linearise in ("e2e", "table"):
        table = parse_table(text) or _json_table(text) or _piped_table(text)
        if table is None:
            raise DataError(
                f"'{text[:60]}' is no table: write name[The Eagle], food[French] or name: The Eagle | food: French"
            )
        return table
    triples = [tuple(part.strip() for part in triple.split(":", 2)) for triple in text.split("|") if triple.strip()]
    if any(len(t) != 3 for t in triples):
        raise DataError(
            f"'{text[:60]}' holds no triples: write subject : relation : object | subject : relation : object"
        )
    return Triples(tuple((a, r, b) for a, r, b in triples))


def _json_table(text: str) -> Table | None:
    if text[0] not in "{[":
        return None
    try:
        content = json.loads(text)
        pairs = content.items() if isinstance(content, dict) else content
        return Table(tuple((str(field), str(value)) for field, value in pairs))
    except (ValueError, TypeError):
        return None


def _piped_table(text: str) -> Table | None:
    pairs = [part.partition(":") for part in text.split("|")]
    if not all(colon and field.strip() for field, colon, _ in pairs):
        return None
    return Table(tuple((field.strip(), value.strip()) for field, _, value in pairs))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _kind_of(source: Source) -> str:
    return {str: "plain text", Table: "a table", Triples: "triples", Chat: "a conversation"}[type(source)]
