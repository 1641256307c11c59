"""The table of methods for people and machines."""

from __future__ import annotations

from typing import Any

from antefix.accounting import storage_bytes
from antefix.base import Base
from antefix.errors import ConfigError, PrefixError
from antefix.methods import METHODS, method_class


def listed() -> list[dict[str, Any]]:
    """Of every method: name, what it is, paper, parts, whether it folds, what examples must have beside a source."""
    return [_row(name) for name in METHODS]


def counted(base: Base, name: str) -> dict[str, Any]:
    """How many values a method trains and keeps on a base at its defaults, and whether it folds; or why it cannot.

    `refusal`: what the base lacks. `asks_for`: what a recipe must say first, where there is no default.
    """
    found = method_class(name)
    try:
        module = found.build(base, found.Config())
    except PrefixError as error:
        why = "asks_for" if isinstance(error, ConfigError) else "refusal"
        return dict.fromkeys(("trained", "kept", "kept_bytes", "refusal", "asks_for")) | {why: str(error)}
    num_kept = sum(t.numel() for t in module.kept_tensors().values())
    # In an encoder nothing is computed once for all texts: rows before its texts stay rows.
    folds = found.folds_to_key_value and module.encoder_rows() is None
    return {
        "folds_to_key_value": folds,
        "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "kept": num_kept,
        "kept_bytes": storage_bytes(num_kept),
        "refusal": None,
        "asks_for": None,
    }


def _row(name: str) -> dict[str, Any]:
    found = method_class(name)
    return {
        "name": name,
        "summary": found.summary,
        "paper": found.paper,
        "parts": list(found.parts),
        "folds_to_key_value": found.folds_to_key_value,
        "needs": list(found.needs),
    }
