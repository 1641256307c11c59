"""`GET /v1/models` and what stands below it; prefixes read and forgotten while the server runs, as vLLM does LoRA."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import TypeAdapter

from antefix import bank
from antefix.bank import Entry
from antefix.bank.entry import latest_scores
from antefix.errors import ServingError
from antefix.server.keys import Caller
from antefix.server.refusal import Refusal
from antefix.server.replies import Model, ModelList, OfPrefix
from antefix.server.serving import Serving, caller_of, manager_of, serving_of, tell
from antefix.server.wire import LoadRequest, UnloadRequest
from antefix.server.writing import refusal_of

routes = APIRouter()
_PAGE = 1000
"""Prefixes that are looked through at once."""
_MODEL: TypeAdapter[Model] = TypeAdapter(Model)


@routes.get("/v1/models", response_model=ModelList)
async def models(
    request: Request,
    caller: Annotated[Caller, Depends(caller_of)],
    search: Annotated[str, Query(max_length=200, description="Words in names, tags and notes.")] = "",
    tag: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int | None, Query(ge=1, le=1_000_000)] = None,
    after: Annotated[str, Query(max_length=600, description="Only what comes after this id.")] = "",
) -> Response:
    """The base and its prefixes, those that the caller may ask for."""
    serving = serving_of(request)
    resident = {one.name for one in serving.engine.resident()}

    def written(entries: Sequence[Entry]) -> list[bytes]:
        return [
            _MODEL.dump_json(serving.models.prefix_model(entry.name, _of_prefix(entry, entry.name in resident)))
            for entry in entries
            if caller.may_use((entry.name,))
        ]

    found: list[bytes] = []
    if not (tag or after) and search.lower() in serving.models.base_id.lower() and caller.may_use(()):
        found.append(_MODEL.dump_json(serving.models.base_model()))
    start = "" if after == serving.models.base_id else after.removeprefix(f"{serving.models.base_id}:")
    size = _PAGE if limit is None or caller.prefixes is not None else min(limit + 1, _PAGE)
    async for entries in _pages(
        serving, bank.Query(text=search, tags=(tag,) if tag else (), broken=False), start, size
    ):
        found += await asyncio.to_thread(written, entries)
        if limit is not None and len(found) > limit:
            break
    more = b"true" if limit is not None and len(found) > limit else b"false"
    content = b'{"object":"list","data":[%s],"has_more":%s}' % (b",".join(found[:limit]), more)
    return Response(content, media_type="application/json")


async def _pages(serving: Serving, query: bank.Query, after: str, size: int) -> AsyncIterator[Sequence[Entry]]:
    """The bank's entries, so many at once: streams go on between two pages of a bank of a hundred thousand."""
    while True:
        entries = await serving.models.page(query.model_copy(update={"after": after, "limit": size}))
        yield entries
        if len(entries) < size:
            return
        after = entries[-1].name


@routes.get("/v1/models/{model_id:path}")
async def model(model_id: str, request: Request, caller: Annotated[Caller, Depends(caller_of)]) -> Model:
    """One of them, a prefix with its card."""
    serving = serving_of(request)
    with serving.telling_nothing(caller):
        name = serving.models.name_of(model_id)
    serving.refuse_not_allowed(caller, () if name is None else (name,))
    if name is None:
        return serving.models.base_model()
    card = serving.models.card(name)
    resident = any(one.name == name for one in serving.engine.resident())
    of_prefix: OfPrefix = {
        "name": name,
        "method": card.method,
        "num_virtual_tokens": card.num_virtual_tokens,
        "tags": list(card.tags),
        "licence": card.licence,
        "scores": latest_scores(card),
        "resident": resident,
        "card": card.model_dump(mode="json"),
    }
    return serving.models.prefix_model(name, of_prefix)


@routes.post("/v1/load_prefix", response_class=PlainTextResponse)
async def load(asked: LoadRequest, request: Request, caller: Annotated[Caller, Depends(manager_of)]) -> str:
    """Read a prefix of the bank into memory, before anybody asks for it."""
    serving = serving_of(request)
    with serving.telling_nothing(caller):
        folder = _folder(serving, asked)
    serving.refuse_not_allowed(caller, (folder,))
    serving.models.card(folder)
    serving.models.refuse_taken(asked.prefix_name, folder)  # before anything is read for it
    try:
        await (serving.engine.pin(folder) if asked.pin else serving.engine.load(folder))
    except ServingError as error:
        raise refusal_of(str(error), error.kind) from error
    serving.models.call(asked.prefix_name, folder)
    tell(request, prefixes=[folder])
    return f"Success: prefix '{asked.prefix_name}' added successfully."


@routes.post("/v1/unload_prefix", response_class=PlainTextResponse)
async def unload(asked: UnloadRequest, request: Request, caller: Annotated[Caller, Depends(manager_of)]) -> str:
    """Forget a prefix; texts that are being written with it go on. In the bank it stays, and is read when asked for."""
    serving = serving_of(request)
    name = serving.models.resident_name(asked.prefix_name)
    serving.refuse_not_allowed(caller, (name,))
    was_given = serving.models.forget(asked.prefix_name)
    try:
        await serving.engine.unload(name)
    except ServingError as error:
        if not (was_given and error.kind == "not_found"):  # else it has left the memory before, and its name goes now
            raise refusal_of(str(error), error.kind) from error
    tell(request, prefixes=[name])
    return f"Success: prefix '{asked.prefix_name}' removed successfully."


def _folder(serving: Serving, asked: LoadRequest) -> str:
    """The name in the bank. Raises Refusal for a path that leads anywhere else."""
    if asked.prefix_path is None:
        return serving.models.name_of_prefix(asked.prefix_name)
    path = Path(asked.prefix_path)
    if path.is_absolute() and path.parent == Path(serving.models.bank.folder).absolute():
        path = Path(path.name)
    if len(path.parts) != 1:
        raise Refusal(400, "'prefix_path' must be a folder of the bank, by its name", param="prefix_path")
    return serving.models.name_of_prefix(str(path))


def _of_prefix(entry: Entry, resident: bool) -> OfPrefix:
    return {
        "name": entry.name,
        "method": entry.method,
        "num_virtual_tokens": entry.num_virtual_tokens,
        "tags": list(entry.tags),
        "licence": entry.licence,
        "scores": entry.scores,
        "resident": resident,
    }
