"""The tokeniser of mteval-v13a.pl in its default (not international) mode, for BLEU and NIST.

Only A-Z is lowercased, and no character beyond ASCII is ever split off: É stays É, "£20" is one token, so is
"family-friendly"; "20-25" becomes "20 - 25". Entities are replaced before lowercasing, so "&AMP;" is not one
(sacrebleu's 13a, given text lowercased beforehand, sees it otherwise).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_SPACED_OUT = (
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),  # ASCII punctuation but . , - and the apostrophe
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokenise(texts: Sequence[str]) -> list[str]:
    """The tokens of every text, joined by one space."""
    return [_tokens(text) for text in texts]


def _tokens(text: str) -> str:
    text = text.replace("<skipped>", "")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text.translate(_ASCII_LOWER)} "
    for pattern, spaced in _SPACED_OUT:
        text = pattern.sub(spaced, text)
    return " ".join(text.split())
