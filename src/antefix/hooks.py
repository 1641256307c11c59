"""Hooks of modules: at work for as long as a block, or until they are taken off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def while_hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take these hooks off when the block ends, in whatever way."""
    registered = list(handles)
    try:
        yield
    finally:
        take_off(registered)


def take_off(handles: list[RemovableHandle]) -> None:
    """Let these hooks act no more, and forget them."""
    for handle in handles:
        handle.remove()
    handles.clear()
