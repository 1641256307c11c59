"""`POST /v1/tables`: a table in, a text out, in the text format that the prefix was trained with."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from antefix.data.linearise import TextFormat, default_format, parse_table
from antefix.server.answering import answer
from antefix.server.asking import Wanted, asking
from antefix.server.completions import TextShape
from antefix.server.formats import encode, format_of, source_of
from antefix.server.keys import Caller
from antefix.server.replies import Completion
from antefix.server.serving import caller_of, serving_of
from antefix.server.wire import TableRequest

routes = APIRouter()


@routes.post("/v1/tables", response_model=Completion)
async def write(asked: TableRequest, request: Request, caller: Annotated[Caller, Depends(caller_of)]) -> Response:
    """Write a text for a table, or for whatever else the prefix reads."""
    serving = serving_of(request)
    chosen = serving.choose(asked, caller)
    text_format = format_of(serving, chosen) or _format_for(asked)
    prompt = await encode(serving.tokens, text_format, source_of(asked.table, text_format))
    made = asking(serving, asked, chosen, [prompt], Wanted(max_tokens=asked.max_tokens, strip=True))
    shape = TextShape(made, asked.model, serving.tokens, scores=False)
    return await answer(request, made, shape, stream=asked.stream, with_usage=asked.with_usage)


def _format_for(asked: TableRequest) -> TextFormat:
    """For the bare base, or a prefix whose card has no format: the one that fits what was sent."""
    if isinstance(asked.table, dict):
        return TextFormat(linearise="table")
    if isinstance(asked.table, str):
        table = parse_table(asked.table)
        return TextFormat() if table is None else default_format([table])
    return TextFormat(linearise="table" if all(_is_pair(row) for row in asked.table) else "triples")


def _is_pair(row: object) -> bool:
    return isinstance(row, list) and len(row) == 2
