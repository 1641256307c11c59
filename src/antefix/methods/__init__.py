"""The table of methods: a name and where its class lives. Adding a method is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from antefix.errors import RecipeError, nearest

if TYPE_CHECKING:
    from antefix.methods.base import MethodModule

METHODS: dict[str, str] = {
    "infix": "antefix.methods.infix:Infix",
    "prefix_tuning": "antefix.methods.prefix_tuning:PrefixTuning",
}


def method_class(name: str) -> type[MethodModule]:
    """The class of a method. Raises RecipeError for an unknown name, with the nearest known one."""
    if name not in METHODS:
        raise RecipeError(f"unknown method '{name}': {nearest(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[MethodModule] = getattr(import_module(module), attribute)
    return found
