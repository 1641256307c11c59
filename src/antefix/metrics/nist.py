"""NIST (Doddington 2002) as mteval-v13a.pl gives it in tuetschek/e2e-metrics: corpus level, orders 1-5,
case-insensitive for A-Z, without an upper bound. No library gives this figure, so the code is our own.

A matched n-gram weighs its information, log2(count(w1..wn-1) / count(w1..wn)), counted over all references of the
whole set; for one word the first count is that of all reference tokens. The script is written in perl, where the
text "0" is false: a bigram that begins with "0" is weighed as a single word is. Published figures have this
quirk, so this one has it too.

An empty hypothesis has no n-gram; if all are empty, the score is 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from antefix.metrics import tokens_13a
from antefix.metrics.base import Evaluated, Rows

VERSION = "mteval13a.1"
NEEDS_JAVA = False
HIGHER_IS_BETTER = True
RESAMPLED = "every draw keeps the n-gram weights of the whole set"
ORDERS = 5

tokenise = tokens_13a.tokenise

_NGram = tuple[str, ...]


def evaluate(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Evaluated:
    """NIST of a corpus of tokenised texts.

    Columns of the rows: information of the matches of order 1 to 5, n-grams of the hypothesis of order 1 to 5,
    reference tokens, references that have a token, and 1 to count segments by. Resampled rows keep the
    information weights of the whole set.
    """
    groups = [[text.split() for text in group] for group in references]
    counts: Counter[_NGram] = Counter()
    for group in groups:
        for tokens in group:
            counts.update(_ngrams(tokens))
    num_tokens = sum(len(tokens) for group in groups for tokens in group)
    pairs = zip(groups, hypotheses, strict=True)
    rows = np.array([_row(group, text.split(), counts, num_tokens) for group, text in pairs])
    return Evaluated(from_sums(rows.sum(axis=0)), rows)


def from_sums(sums: Rows) -> float:
    """The corpus score of summed rows."""
    information, ngrams = sums[:ORDERS], sums[ORDERS : 2 * ORDERS]
    reference_tokens, num_references, num_segments = sums[2 * ORDERS :]
    if reference_tokens == 0:
        return 0.0
    mean_reference_tokens = reference_tokens / (num_references / num_segments)
    return float(np.sum(information / np.maximum(ngrams, 1))) * _length_penalty(ngrams[0] / mean_reference_tokens)


def _row(references: Sequence[list[str]], hypothesis: list[str], counts: Counter[_NGram], num_tokens: int) -> Rows:
    row = np.zeros(2 * ORDERS + 3)
    counted = [Counter(_ngrams(tokens)) for tokens in references]
    for ngram, count in Counter(_ngrams(hypothesis)).items():
        matches = min(count, max(reference.get(ngram, 0) for reference in counted))
        if matches:
            row[len(ngram) - 1] += matches * _information(ngram, counts, num_tokens)
    row[ORDERS : 2 * ORDERS] = [max(len(hypothesis) - order, 0) for order in range(ORDERS)]
    lengths = [len(tokens) for tokens in references]
    row[2 * ORDERS :] = [sum(lengths), sum(length > 0 for length in lengths), 1]
    return row


def _information(ngram: _NGram, counts: Counter[_NGram], num_tokens: int) -> float:
    """In bits."""
    before = ngram[:-1]
    weighed_as_one_word = before in ((), ("0",))
    return math.log2((num_tokens if weighed_as_one_word else counts[before]) / counts[ngram])


def _ngrams(tokens: list[str]) -> list[_NGram]:
    return [ngram for order in range(ORDERS) for ngram in zip(*(tokens[n:] for n in range(order + 1)), strict=False)]


def _length_penalty(ratio: float) -> float:
    """1 for texts as long as the mean reference, 0.5 for two thirds of that."""
    if ratio >= 1:
        return 1.0
    if ratio <= 0:
        return 0.0
    return math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2)
