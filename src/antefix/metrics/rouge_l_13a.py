"""ROUGE-L without Java: the measure of `rouge_l`, on the tokens of mteval 13a in the place of the PTB tokeniser's.

Punctuation counts here and is dropped there, so the figures differ by a little: compare them only with their own
kind. For the official figure take `rouge_l`.
"""

from __future__ import annotations

from antefix.metrics import rouge_l, tokens_13a

VERSION = f"13a.1 of {rouge_l.VERSION}"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = ""

tokenise = tokens_13a.tokenise
from_sums = rouge_l.from_sums
evaluate = rouge_l.evaluate
