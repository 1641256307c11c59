"""What a prefix reads: the text format of its card, and sources of all kinds in it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from antefix.data.example import Source, Table, Triples
from antefix.data.linearise import LINEARISATIONS, TextFormat, parse_source
from antefix.errors import DataError
from antefix.server.refusal import Refusal

if TYPE_CHECKING:
    from antefix.server.models import Chosen
    from antefix.server.serving import Serving
    from antefix.server.tokens import Tokens


def format_of(serving: Serving, chosen: Chosen) -> TextFormat | None:
    """The text format of the first of these prefixes that has one. Raises Refusal for one that cannot be read."""
    for name in chosen.prefixes:
        if content := serving.models.card(name).text_format:
            try:
                return TextFormat.from_dict(content)
            except DataError as error:
                raise Refusal(400, f"the prefix's card: {error}", param="model", code="broken_prefix") from error
    return None


async def encode(tokens: Tokens, text_format: TextFormat, source: Source) -> tuple[int, ...]:
    """The ids of a source; a text is read as a person types it. Raises Refusal for one the format cannot write."""

    def encoded() -> tuple[int, ...]:
        read = parse_source(source, text_format) if isinstance(source, str) else source
        return tuple(text_format.encode_source(tokens.tokenizer, read))

    try:
        return await asyncio.to_thread(encoded)
    except DataError as error:
        raise Refusal(400, str(error)) from error


def source_of(content: Any, text_format: TextFormat) -> Source:
    """What a client sends as a table, as the source that the format writes. Raises Refusal."""
    kind = LINEARISATIONS[text_format.linearise].kind
    try:
        if isinstance(content, str):
            return parse_source(content, text_format)
        if kind is Table:
            return Table.of(content)
        if kind is Triples:
            return Triples.of(content)
    except DataError as error:
        raise Refusal(400, str(error), param="table") from error
    raise Refusal(400, "this prefix reads plain text: send 'table' as a text", param="table")
