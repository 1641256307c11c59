"""API keys: who may ask, for which prefixes, and who may load and unload them. Holds hashes, never keys.

The file is TOML, one table a key:

    [[key]]
    name = "kitchen"
    sha256 = "..."                 # printf %s "$KEY" | sha256sum
    prefixes = ["menus", "news"]   # left out: all of them, and the bare base
    manage = false                 # may load and unload prefixes
"""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from antefix.errors import ServerError, one_line
from antefix.server.refusal import Refusal


class Key(BaseModel):
    """One key, by its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """For logs and metrics."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    prefixes: tuple[str, ...] | None = None
    """Names in the bank that may be asked for; None: all, and the bare base."""
    manage: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: list[Key]


@dataclass(frozen=True)
class Caller:
    """Who asks, and what it may have."""

    name: str
    prefixes: frozenset[str] | None
    """None: all, and the bare base."""
    may_manage: bool

    def may_use(self, names: tuple[str, ...]) -> bool:
        """Whether it may have these prefixes on a request; none of them: the bare base."""
        if self.prefixes is None:
            return True
        return bool(names) and self.prefixes.issuperset(names)


ANYBODY = Caller("", None, True)
"""Of a server without keys."""


class Keys:
    """The keys of a file."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Raises ServerError for a file that is missing or wrong."""
        try:
            found = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ServerError(f"API keys: {path}: {error.strerror or error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ServerError(f"API keys: {path}: {where}: {one_line(first['msg'])}") from error
        except ValueError as error:  # no TOML, no UTF-8
            raise ServerError(f"API keys: {path}: {one_line(error)}") from error
        if not found.key:
            raise ServerError(f"API keys: {path}: there is no [[key]] in it, so nobody could ask")
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in found.key]
            if len(set(values)) < len(values):
                raise ServerError(f"API keys: {path}: two keys have the same {field}")
        return cls(found.key)

    def caller(self, authorization: str | None) -> Caller:
        """Who sends this `Authorization` header. Raises Refusal (401) for a missing or an unknown key."""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise Refusal(401, "no API key: send the header 'Authorization: Bearer KEY'", code="missing_api_key")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # All are compared, each in constant time: how long it takes tells nothing of which one came near.
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        if not found:
            raise Refusal(401, "this API key is not known here", code="invalid_api_key")
        key = found[0]
        return Caller(key.name, None if key.prefixes is None else frozenset(key.prefixes), key.manage)
