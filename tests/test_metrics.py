"""Every figure of the official E2E scorer, to the last printed digit; then our own text, hostile texts, properties.

The figures and the edge cases were made with tuetschek/e2e-metrics (commit 1b9c4d8) and are not in the repository,
nor is the E2E data: those tests are skipped without them, and `OWN_FIGURES` pins the same code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.data import Table, read
from antefix.errors import MetricError
from antefix.metrics import (
    E2E_METRICS,
    METRICS,
    cider,
    evaluate,
    load,
    meteor,
    rouge_l,
    score,
    tokens_13a,
    tokens_ptb,
)

AGREEMENT = SHARED / "facts" / "metric_agreement"
E2E = SHARED / "data" / "e2e_nlg" / "e2e-dataset.zip"
needs_shared = pytest.mark.skipif(
    not AGREEMENT.is_dir() or not E2E.is_file(), reason="the official figures are not here"
)
needs_java = pytest.mark.skipif(not tokens_ptb.have_java(), reason="no Java")
OF_TEXTS = [*E2E_METRICS, "rouge_l_13a"]
"""Labels have scores of their own: `test_tasks.py`."""
WITHOUT_JAVA = [name for name in OF_TEXTS if not load(name).NEEDS_JAVA]

Group = tuple[str, list[str]]
"""A meaning and its references."""
Pair = tuple[list[str], list[list[str]]]
"""Hypotheses and, for each, its references."""


@cache
def e2e_groups(split: str) -> list[Group]:
    groups = []
    for example in read(E2E, split=split):
        assert isinstance(example.source, Table)
        meaning = ", ".join(f"{field}[{value}]" for field, value in example.source.fields)
        groups.append((meaning, list(example.targets)))
    return groups


def all_test() -> list[Group]:
    return e2e_groups("test")


def several() -> list[Group]:
    return [group for group in all_test() if len(group[1]) >= 2]


def pair(groups: Iterable[Group], make: Callable[[str, list[str]], tuple[str, list[str]]]) -> Pair:
    made = [make(*group) for group in groups]
    return [hypothesis for hypothesis, _ in made], [references for _, references in made]


def without_every_seventh(text: str) -> str:
    return " ".join(token for n, token in enumerate(text.split(), start=1) if n % 7)


def first_half(text: str) -> str:
    tokens = text.split()
    return " ".join(tokens[: math.ceil(len(tokens) / 2)])


E2E_PAIRS: dict[str, Callable[[], Pair]] = {
    "test_loo_first": lambda: pair(several(), lambda m, r: (r[0], r[1:])),
    "test_loo_last": lambda: pair(several(), lambda m, r: (r[-1], r[:-1])),
    "test_drop7": lambda: pair(all_test(), lambda m, r: (without_every_seventh(r[0]), r)),
    "test_drop7_loo": lambda: pair(several(), lambda m, r: (without_every_seventh(r[0]), r[1:])),
    "test_drop7_upper": lambda: pair(all_test(), lambda m, r: (without_every_seventh(r[0]).upper(), r)),
    "test_half": lambda: pair(all_test(), lambda m, r: (first_half(r[0]), r)),
    "test_double": lambda: pair(all_test(), lambda m, r: (f"{r[0]} {r[-1]}", r)),
    "test_rotate1": lambda: (
        [r[0] for _, r in [*all_test()[1:], all_test()[0]]],
        [r for _, r in all_test()],
    ),
    "test_single_ref": lambda: pair(several(), lambda m, r: (r[1], [r[0]])),
    "test_identity_single": lambda: pair(all_test(), lambda m, r: (r[0], [r[0]])),
    "test_mr_as_text": lambda: pair(all_test(), lambda m, r: (m, r)),
    "test_mini25_loo": lambda: pair(several()[:25], lambda m, r: (r[0], r[1:])),
    "dev_loo_first": lambda: pair(e2e_groups("dev"), lambda m, r: (r[0], r[1:])),
}
EDGES: dict[str, Any] = (
    json.loads((AGREEMENT / "edge_cases.json").read_text(encoding="utf-8")) if AGREEMENT.is_dir() else {}
)
SMALL = ["test_mini25_loo", *EDGES]


def texts_of(name: str) -> Pair:
    if name in E2E_PAIRS:
        return E2E_PAIRS[name]()
    return EDGES[name]["hyps"], EDGES[name]["refs"]


@cache
def figures() -> dict[str, dict[str, Any]]:
    content = json.loads((AGREEMENT / "scores.json").read_text(encoding="utf-8"))
    return {**content["e2e_pairs"], **content["edge_cases"]}


@cache
def ptb() -> dict[str, str]:
    """The PTB tokens of every text of every pair: Java is started once for all."""
    found = [texts_of(name) for name in (*E2E_PAIRS, *EDGES)]
    texts = list(dict.fromkeys(t.strip() for h, groups in found for t in (*h, *(r for group in groups for r in group))))
    return dict(zip(texts, tokens_ptb.tokenise(texts), strict=True))


def ptb_pair(name: str) -> Pair:
    hypotheses, references = texts_of(name)
    return [ptb()[t.strip()] for t in hypotheses], [[ptb()[t.strip()] for t in group] for group in references]


def official_segments(name: str, key: str) -> list[float] | None:
    """Of the small pairs, the official figure of every segment."""
    segments = figures()[name]["official"].get("segments")
    return None if segments is None else [segment[key] for segment in segments]


@needs_shared
def test_there_are_33_official_pairs() -> None:
    assert sorted(figures()) == sorted([*E2E_PAIRS, *EDGES])
    assert len(figures()) == 33


@needs_shared
@pytest.mark.parametrize("name", E2E_PAIRS)
def test_the_pairs_are_the_official_ones(name: str) -> None:
    hypotheses, references = texts_of(name)
    content = "\n".join(hypotheses) + "\n\n\n" + "\n\n".join("\n".join(group) for group in references)
    assert hashlib.sha256(content.encode()).hexdigest() == figures()[name]["sha256"]


@needs_shared
@pytest.mark.parametrize("name", [*E2E_PAIRS, *EDGES])
def test_bleu_and_nist_are_the_official_ones_to_the_tenth_digit(name: str) -> None:
    hypotheses, references = texts_of(name)
    found = score(references, hypotheses, ["bleu", "nist"])
    official = figures()[name]["official"]
    assert f"{found['bleu']:.10f}" == f"{official['BLEU']:.10f}"
    assert f"{found['nist']:.10f}" == f"{official['NIST']:.10f}"


@needs_shared
@needs_java
@pytest.mark.parametrize("name", [*E2E_PAIRS, *EDGES])
def test_rouge_l_and_cider_are_the_official_ones(name: str) -> None:
    hypotheses, references = ptb_pair(name)
    for module, key in ((rouge_l, "ROUGE_L"), (cider, "CIDEr")):
        found = module.evaluate(references, hypotheses)
        assert found.score == pytest.approx(figures()[name]["official"][key], abs=1e-12), key
        if (segments := official_segments(name, key)) is not None:
            assert found.rows[:, 0].tolist() == pytest.approx(segments, abs=1e-12), key


@needs_java
def test_meteor_is_the_official_one_on_small_sets_and_bears_hostile_texts() -> None:
    # One start of the program, which takes longer than all the rest, for all of these.
    with meteor.program() as running:
        for name in SMALL if E2E.is_file() else ():
            hypotheses, references = ptb_pair(name)
            found = meteor.evaluate_with(running, references, hypotheses)
            assert found.score == pytest.approx(figures()[name]["official"]["METEOR"], abs=1e-12), name
            assert found.rows[:, 0].tolist() == pytest.approx(official_segments(name, "METEOR"), abs=1e-12), name
        own = [[tokens_ptb.tokenise(group) for group in OWN_REFERENCES], tokens_ptb.tokenise(OWN_HYPOTHESES)]
        assert f"{meteor.evaluate_with(running, *own).score:.10f}" == OWN_FIGURES["meteor"]
        hostile = tokens_ptb.tokenise(HOSTILE)
        assert meteor.evaluate_with(running, [[text] for text in hostile], hostile[::-1]).score < 1
        assert f"{meteor.evaluate_with(running, *own).score:.10f}" == OWN_FIGURES["meteor"], "nothing is left behind"


@pytest.mark.slow
@needs_shared
@needs_java
@pytest.mark.parametrize("name", E2E_PAIRS)
def test_all_scores_of_the_large_sets_are_the_official_ones(name: str) -> None:
    hypotheses, references = texts_of(name)
    found = score(references, hypotheses)
    official = figures()[name]["official"]
    for metric, key in (("meteor", "METEOR"), ("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):
        assert found[metric] == pytest.approx(official[key], abs=1e-12), metric
    assert f"{found['bleu']:.10f} {found['nist']:.10f}" == f"{official['BLEU']:.10f} {official['NIST']:.10f}"


OWN_REFERENCES = [
    ["The Copper Pan sells soup for £4.50.", "Soup costs £4.50 at the Copper Pan, by the old quay."],
    ["Don't miss 20-30 kinds of tea, served until 10 p.m.", "There are 20-30 teas until 10 p.m."],
    ["A family-friendly café near the quay.", "ÉTÉ is a café; it's near the quay & welcomes families."],
    ["The final score was 0 to 0, after 0 goals.", "It ended 0 to 0."],
    ["Heron Loop is a seven-kilometre walk from Aldby station."],
]
OWN_HYPOTHESES = [
    "The Copper Pan sells soup at £4.50.",
    "There are 20-30 kinds of tea until 10 p.m.",
    "été, a café near the quay &amp; family-friendly",
    "The final score was 0 to 0.",
    "",
]
OWN_FIGURES = {
    "bleu": "0.6948007521",
    "nist": "3.9984626899",
    "meteor": "0.3748605232",
    "rouge_l": "0.6691574508",
    "cider": "3.5060590436",
    "rouge_l_13a": "0.6464843710",
}
"""Computed by this code after it had given all figures of the official scorer."""


@pytest.mark.parametrize("name", [name for name in OF_TEXTS if name != "meteor"])
def test_our_own_texts_keep_their_figures(name: str) -> None:
    if name not in WITHOUT_JAVA and not tokens_ptb.have_java():
        pytest.skip("no Java")
    assert f"{score(OWN_REFERENCES, OWN_HYPOTHESES, [name])[name]:.10f}" == OWN_FIGURES[name]


def test_every_metric_offers_what_the_protocol_asks() -> None:
    for name in METRICS:
        module = load(name)
        assert module.VERSION
        assert isinstance(module.NEEDS_JAVA, bool)
        assert isinstance(module.RESAMPLED, str)
    assert set(E2E_METRICS) < set(METRICS)


class TestTokens:
    def test_of_mteval_lower_only_ascii_and_split_only_ascii(self) -> None:
        texts = [
            "It's £20-25, family-friendly!",
            "1,000.5 or 3.5% at 7 p.m., ÉTÉ",
            "&quot;A&AMP;B&quot;<skipped>",
            "",
        ]
        assert tokens_13a.tokenise(texts) == [
            "it's £20 - 25 , family-friendly !",
            "1,000.5 or 3.5 % at 7 p . m . , ÉtÉ",
            '" a & amp ; b "',
            "",
        ]

    @needs_java
    def test_of_ptb_split_contractions_and_drop_punctuation(self) -> None:
        assert tokens_ptb.tokenise(["It isn't £5, is it?", "", "It isn't £5, is it?"]) == [
            "it is n't # 5 is it",
            "",
            "it is n't # 5 is it",
        ]

    @needs_java
    def test_of_ptb_come_back_one_line_a_text(self) -> None:
        assert len(tokens_ptb.tokenise(HOSTILE)) == len(HOSTILE)


HOSTILE = [
    "", " ", "|||", "a ||| b", "SCORE ||| a ||| b", "EVAL ||| 1 2 3", "\x00", "a\x00b", "\ud800 alone", "\ufeffmark",
    "\u00a0", "a\u00a0b", "<doc>", "</s>", "&nbsp;", "&lt;p&gt;", "word " * 500, "x" * 5000, "\u202eleft", "e\u0301",
    "\u200b", "\U0001f600 smile", "...", "?!", "''", "`", '"', "\\", "\t", "%s {} $1", "中文字符", "-LRB-", "0",
    "0 0 0", "\x1b[31mred", "https://a.b/c?d=e&f=g", "<skipped>", "(a) [b] {c}",
]  # fmt: skip


@needs_java
def test_hostile_texts_are_scored() -> None:
    references = [[text, "a plain text"] for text in HOSTILE if text.strip()]
    found = score(references, HOSTILE[: len(references)], [name for name in OF_TEXTS if name != "meteor"])
    assert all(math.isfinite(value) and value >= 0 for value in found.values())


def test_a_line_break_inside_a_text_is_a_space() -> None:
    broken = ["one\ntwo", "one\r\ntwo", "one\rtwo", "one\u2028two", "one\x85\x0ctwo", "\none two\n"]
    whole = ["one two"] * len(broken)
    names = WITHOUT_JAVA + (["rouge_l"] if tokens_ptb.have_java() else [])
    assert score([[text] for text in broken], whole, names) == score([[text] for text in whole], broken, names)
    assert score([[text] for text in broken], broken, ["bleu"]) == {"bleu": 1}


def test_empty_hypotheses_score_zero() -> None:
    assert score([["a b"], ["c"]], ["", " "], WITHOUT_JAVA) == {"bleu": 0.0, "nist": 0.0, "rouge_l_13a": 0.0}


def test_a_reference_whose_every_sign_is_dropped_matches_nothing() -> None:
    # BLEU as the script smooths it: 2 words and 1 pair without a match are 1 / (2 * 2) and 1 / (4 * 1).
    smoothed = (1 / 4 * 1 / 4) ** (1 / 4)
    found = score([["<skipped>"]], ["a b"], WITHOUT_JAVA)
    assert found == pytest.approx({"bleu": smoothed, "nist": 0, "rouge_l_13a": 0})


TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
CORPUS = st.lists(st.tuples(TEXT, st.lists(TEXT.filter(str.strip), min_size=1, max_size=3)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(CORPUS, st.randoms(use_true_random=False))
def test_the_order_of_inputs_and_of_references_does_not_matter(corpus: list[tuple[str, list[str]]], order: Any) -> None:
    def scored(pairs: list[tuple[str, list[str]]]) -> dict[str, float]:
        return score([references for _, references in pairs], [text for text, _ in pairs], WITHOUT_JAVA)

    shuffled = [(text, order.sample(references, len(references))) for text, references in corpus]
    order.shuffle(shuffled)
    found = scored(corpus)
    assert scored(shuffled) == pytest.approx(found, abs=1e-12)
    assert 0 <= found["bleu"] <= 1
    assert 0 <= found["rouge_l_13a"] <= 1
    assert found["nist"] >= 0


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXT.filter(str.strip), min_size=1, max_size=4))
def test_a_text_is_as_good_as_itself_can_be(texts: list[str]) -> None:
    found = score([["something else", text] for text in texts], texts, ["bleu", "rouge_l_13a"])
    assert found == pytest.approx({"bleu": float(any(tokens_13a.tokenise(texts))), "rouge_l_13a": 1})


@pytest.mark.parametrize(
    ("references", "hypotheses", "metrics", "message"),
    [
        ([["a"]], ["a", "b"], ["bleu"], "2 hypotheses for 1 inputs: one hypothesis for every input is needed"),
        ([], [], ["bleu"], "nothing to score: there are no hypotheses"),
        ([["a"], []], ["a", "b"], ["bleu"], "input 2 has no reference"),
        ([["a"], ["b", " \n"]], ["a", "b"], ["bleu"], "input 2: reference 2 is empty"),
        ([["a"]], ["a"], ["blue"], "unknown metric 'blue': did you mean 'bleu'?"),
    ],
)
def test_what_cannot_be_scored_is_told(
    references: list[list[str]], hypotheses: list[str], metrics: list[str], message: str
) -> None:
    with pytest.raises(MetricError, match=re.escape(message)):
        score(references, hypotheses, metrics)


class TestWithoutJava:
    def test_a_metric_that_needs_it_is_an_error_of_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(MetricError, match="rouge_l, cider: needs Java, and no 'java' is on the PATH; install"):
            score([["a"]], ["a"], ["bleu", "rouge_l", "cider"])
        assert score([["a"]], ["a"], WITHOUT_JAVA)["rouge_l_13a"] == 1

    @pytest.fixture
    def broken_java(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        java = tmp_path / "java"
        java.write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
        java.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    @pytest.mark.usefixtures("broken_java")
    def test_a_tokeniser_that_fails_is_told_with_its_last_words(self) -> None:
        with pytest.raises(MetricError, match=r"the PTB tokeniser failed: 0 of 2 lines came back \(no memory\)"):
            score([["a"]], ["b"], ["cider"])

    @pytest.mark.usefixtures("broken_java")
    def test_a_meteor_that_fails_is_told_and_does_not_hang(self) -> None:
        with pytest.raises(MetricError, match="METEOR's Java program failed"):
            meteor.evaluate([["a"]], ["a"])


def test_rows_add_up_to_the_score() -> None:
    for name, found in evaluate(OWN_REFERENCES, OWN_HYPOTHESES, WITHOUT_JAVA).items():
        assert len(found.rows) == len(OWN_HYPOTHESES)
        assert load(name).from_sums(found.rows.sum(axis=0)) == pytest.approx(found.score, abs=1e-15)
