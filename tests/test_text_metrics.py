"""Scores of summaries, of WebNLG and of DART: small cases by hand, and the libraries that count."""

from __future__ import annotations

import math

import pytest
import sacrebleu

from antefix.metrics import evaluate, load, score, tokens_webnlg

REFERENCES = [["The café sells tea.", "Tea is sold by the café."], ["A dog runs."], ["It is a small, red house."]]
HYPOTHESES = ["The cafe sells tea", "A dog is running.", "It is a red, small house."]
NAMES = ["rouge_1", "rouge_2", "rouge_l_f1", "chrf", "ter", "bleu_webnlg", "ter_webnlg", "bleu_dart"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_add_up_to_the_score(name: str) -> None:
    found = evaluate(REFERENCES, HYPOTHESES, [name])[name]
    assert len(found.rows) == 3
    assert load(name).from_sums(found.rows.sum(axis=0)) == pytest.approx(found.score, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_empty_texts_are_the_worst(name: str) -> None:
    assert score([["a b"], ["c d"]], ["", ""], [name])[name] == (1.0 if name.startswith("ter") else 0.0)


def test_rouge_by_hand() -> None:
    """Three words, two of them right: precision 2/3, recall 1. Two pairs, one right: precision 1/2, recall 1."""
    found = score([["the cat", "no word of it"]], ["the cat sat"], ["rouge_1", "rouge_2", "rouge_l_f1"])
    assert found == pytest.approx({"rouge_1": 0.8, "rouge_2": 2 / 3, "rouge_l_f1": 0.8})


def test_chrf_is_sacrebleus() -> None:
    columns = [[group[n] if n < len(group) else "" for group in REFERENCES] for n in range(2)]
    assert score(REFERENCES, HYPOTHESES, ["chrf"])["chrf"] == pytest.approx(
        sacrebleu.corpus_chrf(HYPOTHESES, columns).score
    )


def test_ter_by_hand() -> None:
    """A wrong word of three; a block that is moved is one edit; edits are divided by the mean reference length."""
    assert score([["a b d"]], ["a b c"], ["ter"])["ter"] == pytest.approx(1 / 3)
    assert score([["c d a b"]], ["a b c d"], ["ter"])["ter"] == pytest.approx(1 / 4)
    assert score([["a b c d", "a b"]], ["a c"], ["ter"])["ter"] == pytest.approx(1 / 3)


def test_webnlg_prepares_as_its_script() -> None:
    assert tokens_webnlg.tokenise([" Café-bar,  3.5 km_long "]) == ["cafe - bar , 3 . 5 km_long"]


def test_webnlg_reads_three_references_and_smooths_nothing() -> None:
    four = [["x x x x", "y y y y", "z z z z", "a b c d"]]
    assert score(four, ["a b c d"], ["bleu_webnlg", "ter_webnlg"]) == {"bleu_webnlg": 0.0, "ter_webnlg": 1.0}
    assert score(four, ["a b c d"], ["bleu"]) == {"bleu": 1.0}
    assert score([["a b c d e"]], ["a b x d e"], ["bleu_webnlg"]) == {"bleu_webnlg": 0.0}


def test_a_reference_that_darts_script_misses_is_an_empty_one() -> None:
    """Four words against a reference of ten: nearer to none than to ten, so that nothing is taken off for brevity."""
    references = [["a b c d e f g h i j"]]
    found = score(references, ["a b c d"], ["bleu_dart", "bleu_webnlg"])
    assert found == pytest.approx({"bleu_dart": 1.0, "bleu_webnlg": math.exp(1 - 10 / 4)})
