"""Token ids to text while they come: whole characters only, and never a stop string.

Knows a tokenizer's `decode`, and nothing of requests. However the tokens and the text are cut into pieces, what comes
out, put together, is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no character (yet)."""


_CONTEXT = 6
"""Tokens of the prompt that the first piece is decoded after: more than the bytes of a character."""


class TextStream:
    """Decodes tokens as they come, after those given as `after`.

    A character whose bytes are spread over tokens comes with the last of them.
    """

    def __init__(self, decode: Callable[[list[int]], str], after: Sequence[int] = ()) -> None:
        self._decode = decode
        # Decoders look at the token before (SentencePiece's space), so every piece is decoded after the one before.
        self._ids = list(after[-_CONTEXT:])
        self._before = 0
        self._read = len(self._ids)
        self.num_chars = 0
        """Characters given out so far."""

    def push(self, token_id: int) -> str:
        """The text that this token completes, maybe none."""
        self._ids.append(token_id)
        return self._given(self._new())

    def flush(self) -> str:
        """The rest, with U+FFFD for the bytes that became no character."""
        known, whole = self._both()
        return self._given(whole[len(known) :])

    def _both(self) -> tuple[str, str]:
        return self._decode(self._ids[self._before : self._read]), self._decode(self._ids[self._before :])

    def _new(self) -> str:
        known, whole = self._both()
        if len(whole) <= len(known) or whole.endswith(_UNFINISHED):
            return ""
        return whole[len(known) :]

    def _given(self, text: str) -> str:
        if text:
            self._before, self._read = self._read, len(self._ids)
            self.num_chars += len(text)
        return text


class StopStrings:
    """Passes text on until one of the stop strings is complete; it and what follows are kept back.

    The one that is complete first counts, of several the longest. What may yet become one waits.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be shown now. After `found` it is nothing any more."""
        if self.found:
            return ""
        held = self._held + text
        places = [(place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = ""
            return held[: min(places)[1]]
        kept = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def flush(self) -> str:
        """What waited in vain: the text is over."""
        held, self._held = self._held, ""
        return held


class Stripped:
    """A text without the spaces around it, which belong to a text format and not to the text."""

    def __init__(self) -> None:
        self._held: str | None = None

    def push(self, text: str) -> str:
        """What is inside for certain; spaces wait for what comes after them."""
        found = text.lstrip() if self._held is None else self._held + text
        if not found:
            return ""
        inside = found.rstrip()
        self._held = found[len(inside) :]
        return inside


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are a beginning of the stop string, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
