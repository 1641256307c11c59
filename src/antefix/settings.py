"""`key=value` words of the command line, and pydantic's refusals as one line that names the nearest known key."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from antefix.errors import RecipeError, nearest

Settings = TypeVar("Settings", bound=BaseModel)


def override(content: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Put `key=value` words into (nested) settings, in place; dotted keys reach into sections.

    A value is read as TOML does, a bare word is a string. Raises RecipeError for anything else.
    """
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"'{word}' is no override: write key=value, for example training.epochs=3")
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        put(content, key.strip(), value)
    return content


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of (nested) settings, in place. Raises RecipeError where one of its parts is no section."""
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"'{key}': '{parent}' is no section")
    section[last] = value


def validated(model: type[Settings], content: Any, prefix: str = "") -> Settings:
    """The settings, checked. Raises RecipeError: an unknown key (with the nearest), a missing one, a bad value."""
    try:
        found = model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        *parents, last = [str(part) for part in first["loc"]] or [""]
        where = prefix + ".".join([*parents, last])
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"unknown key '{where}': {nearest(last, _section(model, parents).model_fields)}"
            ) from error
        if first["type"] == "missing":
            raise RecipeError(f"'{where}' is missing") from error
        message = first["msg"].removeprefix("Value error, ")
        if not last:
            raise RecipeError(message) from error
        given = json.dumps(first["input"], default=str)
        raise RecipeError(f"'{where}' is {given}: {message}") from error
    _refuse_quoted_numbers(found, content, prefix)
    return found


def _refuse_quoted_numbers(found: BaseModel, content: Any, prefix: str) -> None:
    for name, given in content.items() if isinstance(content, dict) else ():
        value = getattr(found, name, None)
        if isinstance(value, BaseModel):
            _refuse_quoted_numbers(value, given, f"{prefix}{name}.")
        elif isinstance(given, str) and isinstance(value, int | float):
            raise RecipeError(f"'{prefix}{name}' is {json.dumps(given)}, a text: write it without quotes")


def _section(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    parts = iter(path)
    for part in parts:
        annotation = model.model_fields[part].annotation
        if get_origin(annotation) is dict:  # of sections, by any name
            annotation = get_args(annotation)[1]
            next(parts, None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return model
