"""What every endpoint works with: the engine, the tokenizer, the models, who may ask, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request

from antefix.server.keys import ANYBODY, Caller, Keys
from antefix.server.limits import Admission
from antefix.server.meters import Meters
from antefix.server.refusal import Refusal

if TYPE_CHECKING:
    from antefix.server.engine import Engine
    from antefix.server.models import Chosen, Models
    from antefix.server.tokens import Tokens
    from antefix.server.wire import Asked


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a server allows."""

    max_body_bytes: int = 4 << 20
    default_max_tokens: int = 1024
    """Of a chat or a table that does not say how many; fewer where the context ends."""
    ping_s: float = 15.0
    """A stream that has nothing to say says so this often."""
    unread_s: float = 30.0
    """A client that reads nothing of its stream for so long is taken for gone."""
    grace_s: float = 20.0
    """Open requests have so long to end when the server is stopped."""
    log_texts: bool = False


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One server's parts."""

    engine: Engine
    tokens: Tokens
    models: Models
    admission: Admission
    rules: Rules
    keys: Keys | None = None
    meters: Meters = field(default_factory=Meters)

    def choose(self, asked: Asked, caller: Caller) -> Chosen:
        """The prefixes of a request. Raises Refusal for those that are not there, or not for this caller."""
        more = asked.antefix.prefixes if asked.antefix is not None else ()
        with self.telling_nothing(caller):
            chosen = self.models.chosen(asked.model, more)
        self.refuse_not_allowed(caller, chosen.prefixes)
        return chosen

    @contextmanager
    def telling_nothing(self, caller: Caller) -> Iterator[None]:
        """Names that are not there are refused as those that a key does not open: they may be other customers'."""
        try:
            yield
        except Refusal as refusal:
            if refusal.status == 404 and caller.prefixes is not None:
                raise _not_allowed(caller) from None
            raise

    def refuse_not_allowed(self, caller: Caller, prefixes: Sequence[str]) -> None:
        """Raises Refusal (403) for prefixes, or the bare base, that the caller's key does not open."""
        if not caller.may_use(tuple(prefixes)):
            raise _not_allowed(caller)


def _not_allowed(caller: Caller) -> Refusal:
    return Refusal(
        403, f"the API key '{caller.name}' does not open this model", param="model", code="model_not_allowed"
    )


def serving_of(request: Request) -> Serving:
    """The server's parts, for an endpoint."""
    found: Serving = request.app.state.serving
    return found


async def caller_of(request: Request) -> Caller:
    """Who sends a request. Raises Refusal (401)."""
    keys = serving_of(request).keys
    if keys is None:
        return ANYBODY
    caller = keys.caller(request.headers.get("authorization"))
    tell(request, key=caller.name)
    return caller


async def manager_of(request: Request) -> Caller:
    """Who sends a request that only a key with `manage = true` may send. Raises Refusal (401, 403)."""
    caller = await caller_of(request)
    if not caller.may_manage:
        raise Refusal(403, f"the API key '{caller.name}' may not do this: it needs manage = true", code="not_allowed")
    return caller


def tell(request: Request, **told: Any) -> None:
    """Words for the request's line in the log."""
    request.state.told.update(told)
