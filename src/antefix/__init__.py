"""Antefix: train, measure and keep prefixes, small learned tensors that steer a frozen language model.

The names below are the public ones. They are imported when first used, so that `import antefix` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antefix.attach import attached
    from antefix.attachment import Attachment
    from antefix.bank import Bank
    from antefix.base import Base, load_base
    from antefix.data import Chat, Example, Message, Table, Triples, Words, read
    from antefix.data.linearise import TextFormat
    from antefix.decoding import Decoding
    from antefix.doctor import examine
    from antefix.errors import AntefixError
    from antefix.generation import generate
    from antefix.labels import label
    from antefix.merge import merged
    from antefix.metrics import score
    from antefix.prefix import Card, Prefix
    from antefix.training.recipe import Recipe, TrainingRecipe, load_recipe
    from antefix.training.run import train

_PUBLIC = {
    "AntefixError": "antefix.errors",
    "Attachment": "antefix.attachment",
    "Bank": "antefix.bank",
    "Base": "antefix.base",
    "Card": "antefix.prefix",
    "Chat": "antefix.data",
    "Decoding": "antefix.decoding",
    "Example": "antefix.data",
    "Message": "antefix.data",
    "Prefix": "antefix.prefix",
    "Recipe": "antefix.training.recipe",
    "Table": "antefix.data",
    "TextFormat": "antefix.data.linearise",
    "TrainingRecipe": "antefix.training.recipe",
    "Triples": "antefix.data",
    "Words": "antefix.data",
    "attached": "antefix.attach",
    "examine": "antefix.doctor",
    "generate": "antefix.generation",
    "label": "antefix.labels",
    "load_base": "antefix.base",
    "load_recipe": "antefix.training.recipe",
    "merged": "antefix.merge",
    "read": "antefix.data",
    "score": "antefix.metrics",
    "train": "antefix.training.run",
}

__all__ = [
    "AntefixError",
    "Attachment",
    "Bank",
    "Base",
    "Card",
    "Chat",
    "Decoding",
    "Example",
    "Message",
    "Prefix",
    "Recipe",
    "Table",
    "TextFormat",
    "TrainingRecipe",
    "Triples",
    "Words",
    "attached",
    "examine",
    "generate",
    "label",
    "load_base",
    "load_recipe",
    "merged",
    "read",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'antefix' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
