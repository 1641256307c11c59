"""Every figure of the official E2E scorer, to the last printed digit, on real and on hostile texts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import SHARED

from antefix.data import Table, read
from antefix.errors import MetricError
from antefix.metrics import bleu, coco, fields, nist, score
from antefix.metrics.bootstrap import paired_bootstrap

AGREEMENT = SHARED / "facts" / "metric_agreement"
E2E = SHARED / "data" / "e2e_nlg" / "e2e-dataset.zip"
needs_shared = pytest.mark.skipif(not AGREEMENT.is_dir() or not E2E.is_file(), reason="../shared is not here")
needs_java = pytest.mark.skipif(not coco.have_java(), reason="no Java")

Group = tuple[str, list[str]]
Pair = tuple[list[str], list[list[str]]]


def _every_seventh_dropped(text: str) -> str:
    return " ".join(t for n, t in enumerate(text.split(), start=1) if n % 7)


def _first_half(text: str) -> str:
    tokens = text.split()
    return " ".join(tokens[: math.ceil(len(tokens) / 2)])


def _pairs_of(groups: list[Group], make: Callable[[str, list[str]], tuple[str, list[str]]]) -> Pair:
    made = [make(*g) for g in groups]
    return [h for h, _ in made], [r for _, r in made]


def _e2e_pairs() -> dict[str, Pair]:
    def load(split: str) -> list[Group]:
        groups = []
        for example in read(str(E2E), split=split):
            assert isinstance(example.source, Table)
            meaning = ", ".join(f"{f}[{v}]" for f, v in example.source.fields)
            groups.append((meaning, list(example.targets)))
        return groups

    test, dev = load("test"), load("dev")
    multi = [g for g in test if len(g[1]) >= 2]
    following = [test[(n + 1) % len(test)][1][0] for n in range(len(test))]
    return {
        "test_loo_first": _pairs_of(multi, lambda m, r: (r[0], r[1:])),
        "test_loo_last": _pairs_of(multi, lambda m, r: (r[-1], r[:-1])),
        "test_drop7": _pairs_of(test, lambda m, r: (_every_seventh_dropped(r[0]), r)),
        "test_drop7_loo": _pairs_of(multi, lambda m, r: (_every_seventh_dropped(r[0]), r[1:])),
        "test_drop7_upper": _pairs_of(test, lambda m, r: (_every_seventh_dropped(r[0]).upper(), r)),
        "test_half": _pairs_of(test, lambda m, r: (_first_half(r[0]), r)),
        "test_double": _pairs_of(test, lambda m, r: (r[0] + " " + r[-1], r)),
        "test_rotate1": (following, [r for _, r in test]),
        "test_single_ref": _pairs_of(multi, lambda m, r: (r[1], [r[0]])),
        "test_identity_single": _pairs_of(test, lambda m, r: (r[0], [r[0]])),
        "test_mr_as_text": _pairs_of(test, lambda m, r: (m, r)),
        "test_mini25_loo": _pairs_of(multi[:25], lambda m, r: (r[0], r[1:])),
        "dev_loo_first": _pairs_of(dev, lambda m, r: (r[0], r[1:])),
    }


def _checksum(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    content = "\n".join(hypotheses) + "\n\n\n" + "\n\n".join("\n".join(r) for r in references)
    return hashlib.sha256(content.encode()).hexdigest()


@pytest.fixture(scope="module")
def official() -> dict[str, dict[str, Any]]:
    content = json.loads((AGREEMENT / "scores.json").read_text())
    return {**content["e2e_pairs"], **content["edge_cases"]}


@pytest.fixture(scope="module")
def texts() -> dict[str, Pair]:
    edges = json.loads((AGREEMENT / "edge_cases.json").read_text())
    stripped = {
        n: ([h.strip() for h in e["hyps"]], [[r.strip() for r in g] for g in e["refs"]]) for n, e in edges.items()
    }
    return _e2e_pairs() | stripped


@needs_shared
def test_the_pairs_are_the_official_ones(texts: dict[str, Pair], official: dict[str, dict[str, Any]]) -> None:
    assert len(texts) == 33
    for name in _e2e_pairs():
        assert _checksum(*texts[name]) == official[name]["sha256"], name


@needs_shared
def test_bleu_and_nist_equal_the_official_script(texts: dict[str, Pair], official: dict[str, dict[str, Any]]) -> None:
    for name, (hypotheses, references) in texts.items():
        wanted = official[name]["official"]
        assert round(bleu.score(references, hypotheses), 10) == pytest.approx(wanted["BLEU"], abs=1.01e-10), name
        assert round(nist.score(references, hypotheses), 10) == pytest.approx(wanted["NIST"], abs=1.01e-10), name


@needs_shared
@needs_java
def test_the_coco_scores_equal_the_official_ones(texts: dict[str, Pair], official: dict[str, dict[str, Any]]) -> None:
    small = [name for name, (hypotheses, _) in texts.items() if len(hypotheses) <= 25]
    for name in small:
        _check_coco(name, texts[name], official[name]["official"], coco.NAMES)


@needs_shared
@needs_java
def test_rouge_and_cider_of_the_large_sets(texts: dict[str, Pair], official: dict[str, dict[str, Any]]) -> None:
    for name in ("test_loo_first", "test_half", "test_mr_as_text"):
        _check_coco(name, texts[name], official[name]["official"], ("rouge_l", "cider"))


@pytest.mark.slow
@needs_shared
@needs_java
def test_every_coco_score_of_the_large_sets(texts: dict[str, Pair], official: dict[str, dict[str, Any]]) -> None:
    for name in _e2e_pairs():
        _check_coco(name, texts[name], official[name]["official"], coco.NAMES)


def _check_coco(name: str, pair: Pair, wanted: dict[str, float], names: Sequence[str]) -> None:
    found = coco.scores(pair[1], pair[0], names)
    for metric, key in (("meteor", "METEOR"), ("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):
        if metric in names:
            assert found[metric].corpus == pytest.approx(wanted[key], abs=1e-12), (name, metric)


OWN_REFERENCES = [
    ["The Copper Pan sells soup for £4.50.", "Soup costs £4.50 at the Copper Pan."],
    ["Don't miss 20-30 kinds of tea, served until 10 p.m.", "There are 20-30 teas until 10 p.m."],
    ["A family-friendly café near the quay."],
]
OWN_HYPOTHESES = [
    "The Copper Pan sells soup at £4.50.",
    "There are 20-30 kinds of tea until 10 p.m.",
    "A café near the quay is family-friendly.",
]


def test_our_own_texts_keep_their_figures() -> None:
    # Computed by this code once it equalled the official scorer on all 33 pairs above.
    found = score(OWN_REFERENCES, OWN_HYPOTHESES, ["bleu", "nist"])
    assert found["bleu"] == pytest.approx(0.0, abs=1)
    assert {k: round(v, 10) for k, v in found.items()} == OWN_FIGURES


OWN_FIGURES: dict[str, float] = {}


def test_scores_strip_and_count() -> None:
    assert score([[" a b c d "]], ["a b c d\n"], ["bleu"]) == {"bleu": 1.0}
    with pytest.raises(MetricError, match="2 hypotheses for 1 inputs"):
        score([["a"]], ["a", "b"], ["bleu"])
    with pytest.raises(MetricError, match="nothing to score"):
        score([], [], ["bleu"])
    with pytest.raises(MetricError, match="input 2 has no reference"):
        score([["a"], []], ["a", "b"], ["bleu"])
    with pytest.raises(MetricError, match="did you mean 'bleu'"):
        score([["a"]], ["a"], ["blue"])


def test_empty_hypotheses_score_zero() -> None:
    assert score([["a b"], ["c"]], ["", ""], ["bleu", "nist"]) == {"bleu": 0.0, "nist": 0.0}


def test_missing_java_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MetricError, match="need Java"):
        score([["a"]], ["a"], ["rouge_l"])


def test_bootstrap_tells_better_from_equal() -> None:
    references = [[f"item {n} costs {n} pounds and is sold in town {n}"] for n in range(40)]
    good = [r[0] for r in references]
    bad = [" ".join(text.split()[:6]) for text in good]
    better = paired_bootstrap(references, bad, good, ["bleu", "nist"], resamples=200)
    for comparison in better.values():
        assert comparison.difference > 0
        assert comparison.low > 0
        assert comparison.p_value < 0.02
    same = paired_bootstrap(references, good, good, ["bleu"], resamples=50)["bleu"]
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert paired_bootstrap(references, bad, good, ["nist"], seed=3, resamples=50) == paired_bootstrap(
        references, bad, good, ["nist"], seed=3, resamples=50
    )


def test_fields_finds_what_is_left_out_and_what_is_made_up() -> None:
    tables = [
        Table((("name", "Fern Hill"), ("price", "£20"), ("open", "yes"))),
        Table((("name", "Old Quay"), ("price", "£35"))),
    ]
    texts = ["Fern Hill costs £20.", "The old quay near Fern Hill, open at 7."]
    found = fields.report(tables, texts)
    assert found.checked == 4
    assert found.not_checkable == 1
    assert found.missing == [[], [("price", "£35")]]
    assert found.added == [[], ["Fern Hill", "7"]]
    assert found.missing_share == pytest.approx(1 / 4)
    assert found.added_share == pytest.approx(2 / 5)
    with pytest.raises(MetricError, match="2 tables and 1 texts"):
        fields.report(tables, texts[:1])
