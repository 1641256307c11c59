"""The preparation of WebNLG's official evaluation script: ASCII, lowercased, split at what is no letter, digit or `_`.

The script makes ASCII by unidecode, this by anyascii, which writes a few rare signs otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from anyascii import anyascii

_SPLIT = re.compile(r"(\W)")


def tokenise(texts: Sequence[str]) -> list[str]:
    """The tokens of every text, joined by one space."""
    return [" ".join(" ".join(_SPLIT.split(anyascii(text.strip()).lower())).split()) for text in texts]
