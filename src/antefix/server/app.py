"""The server as an ASGI application: its routes, what stands before them, and how it says no."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from antefix.errors import AntefixError, one_line
from antefix.server import VERSION, chat, completions, listing, tables
from antefix.server.keys import Caller
from antefix.server.limits import BodyLimit
from antefix.server.logs import Logged, failed, note_refusal
from antefix.server.refusal import Refusal
from antefix.server.replies import Error
from antefix.server.serving import Serving, manager_of, serving_of

PAGE = Path(__file__).parent / "page"
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "The request is wrong.",
        401: "No API key, or an unknown one.",
        403: "The API key does not open this.",
        404: "There is no such model.",
        413: "The request is too long.",
        429: "There is no room; `Retry-After` says when to ask again.",
        500: "Our fault.",
        503: "The engine takes nothing now; `Retry-After` says when to ask again.",
    }.items()
}
_HEADERS = {
    # The page needs nothing from anywhere else, and nobody may put it into a frame.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(serving: Serving) -> FastAPI:
    """The application over an engine that runs already, and is stopped by whoever started it."""
    app = FastAPI(
        title="Antefix", version=VERSION, description="Many prefixes over one base.", docs_url=None, redoc_url=None,
        responses=_REFUSALS, separate_input_output_schemas=False,
    )  # fmt: skip
    app.state.serving = serving
    for module in (completions, chat, tables, listing):
        app.include_router(module.routes)
    app.get("/health", response_model=None)(health)
    app.get("/metrics", response_class=Response)(metrics)
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(AntefixError)(_failed)
    app.exception_handler(RequestValidationError)(_not_valid)
    app.exception_handler(HTTPException)(_http)
    app.get("/", include_in_schema=False)(page)
    app.mount("/page", _Page(directory=PAGE), name="page")
    app.add_middleware(BodyLimit, max_bytes=serving.rules.max_body_bytes)
    app.add_middleware(Logged, meters=serving.meters, log_texts=serving.rules.log_texts)
    _without_422(app)
    return app


async def health(request: Request) -> Response:
    """200 while the engine takes jobs. A port that answers is not health."""
    serving = serving_of(request)
    status = serving.engine.status()
    content = {
        "status": "ok" if status.alive else "unavailable",
        "engine": status.state,
        "running": status.running,
        "waiting": status.waiting,
        "restarts": status.num_restarts,
    }
    if status.alive:
        return JSONResponse(content)
    return JSONResponse(content, 503, headers={"Retry-After": "2"})


async def metrics(request: Request, caller: Annotated[Caller, Depends(manager_of)]) -> Response:
    """What Prometheus reads."""
    serving = serving_of(request)
    page = serving.meters.page(serving.engine.status(), len(serving.engine.resident()))
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


async def page() -> Response:
    """The page; what it needs stands below `/page`."""
    return FileResponse(PAGE / "index.html", headers=_HEADERS)


class _Page(StaticFiles):
    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def _said(refusal: Refusal) -> Response:
    return JSONResponse(refusal.content(), refusal.status, headers=refusal.headers())


def _refusal(request: Request, refusal: Refusal) -> Response:
    note_refusal(request.state.told, refusal)
    return _said(refusal)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refusal(request, error)


async def _failed(request: Request, error: Exception) -> Response:
    return _said(failed(request.state.told, error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    response = _said(Refusal(error.status_code, one_line(message)))
    response.headers.update(error.headers or {})
    return response


async def _not_valid(request: Request, error: Exception) -> Response:
    """FastAPI says 422, clients of this interface expect 400."""
    assert isinstance(error, RequestValidationError)
    first = _telling(error.errors())
    place = _place(first)
    param = first.get("ctx", {}).get("param") or (place[0] if place else None)
    message = first["msg"]
    if first["type"] == "json_invalid":
        message, param = f"the body is no JSON ({first.get('ctx', {}).get('error', '')})", None
    elif not place and first["type"] in ("model_attributes_type", "missing"):
        message = "send the body as a JSON object, with the header Content-Type: application/json"
    elif place and "param" not in first.get("ctx", {}):
        message = f"'{'.'.join(place[:6])}': {message}"
    return _refusal(request, Refusal(400, one_line(message, 400), param=param))


def _telling(errors: Sequence[Any]) -> Any:
    """Of a field that may be of several kinds there is an error for each: the one of the kind that was meant."""
    of_field = [one for one in errors if _place(one)[:1] == _place(errors[0])[:1]]
    return next((one for one in of_field if not one["type"].endswith("_type")), of_field[0])


def _place(error: Any) -> list[str]:
    """Where in the request, without the names of the kinds that were tried."""
    parts = [str(part) for part in error["loc"] if part not in ("body", "query", "str", "int")]
    return [part for part in parts if part.isidentifier() or part.isdigit()]


def _without_422(app: FastAPI) -> None:
    """The schema says what is sent: no 422 is."""
    made = app.openapi

    def schema() -> dict[str, Any]:
        content = made()
        for path in content["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return content

    app.openapi = schema  # type: ignore[method-assign]
