"""The paired bootstrap: its draws score like corpora, its intervals cover, its p-values do not promise too much."""

from __future__ import annotations

import numpy as np
import pytest

from antefix.errors import MetricError
from antefix.metrics import METRICS, evaluate, load
from antefix.metrics.base import Evaluated, mean_of_segments
from antefix.metrics.bootstrap import Comparison, compare

REFERENCES = [[f"item {n} costs {n} pounds and is sold in town {n}", f"for {n} pounds, item {n}"] for n in range(30)]
GOOD = [group[n % 2] for n, group in enumerate(REFERENCES)]
SHORT = [" ".join(text.split()[:4]) for text in GOOD]
METRICS_USED = ["bleu", "nist", "rouge_l_13a"]


def compared(first: list[str], second: list[str], metrics: list[str], **options: int) -> dict[str, Comparison]:
    one, other = (evaluate(REFERENCES, texts, metrics) for texts in (first, second))
    return compare(one, other, **options)


def of_means(*scores: list[float]) -> list[dict[str, Evaluated]]:
    return [{"rouge_l": Evaluated(float(np.mean(s)), mean_of_segments(s))} for s in scores]


@pytest.mark.parametrize("name", ["bleu", "rouge_l_13a"])
def test_a_draw_scores_as_the_drawn_inputs_would(name: str) -> None:
    draw = np.random.default_rng(3).integers(len(SHORT), size=len(SHORT))
    drawn = evaluate([REFERENCES[n] for n in draw], [SHORT[n] for n in draw], [name])[name].score
    rows = evaluate(REFERENCES, SHORT, [name])[name].rows
    assert load(name).from_sums(np.bincount(draw, minlength=len(rows)) @ rows) == pytest.approx(drawn, abs=1e-12)


def test_a_draw_of_nist_keeps_the_weights_of_the_whole_set_and_says_so() -> None:
    found = evaluate(REFERENCES, GOOD, ["nist"])["nist"]
    half = np.arange(len(GOOD)) < 15
    drawn = load("nist").from_sums(half @ found.rows)
    assert drawn > evaluate(REFERENCES[:15], GOOD[:15], ["nist"])["nist"].score + 0.1
    assert "weights of the whole set" in load("nist").RESAMPLED


def test_the_better_system_is_better_by_every_metric() -> None:
    for name, found in compared(GOOD, SHORT, METRICS_USED, resamples=200).items():
        assert 0 < found.low < found.difference < found.high, name
        assert found.p_value == pytest.approx(2 / 201)


def test_the_difference_is_that_of_the_scores() -> None:
    good, short = (evaluate(REFERENCES, texts, METRICS_USED) for texts in (GOOD, SHORT))
    for name, found in compare(good, short, resamples=5).items():
        assert found.difference == pytest.approx(good[name].score - short[name].score, abs=1e-12)


def test_the_other_way_round_it_is_the_same_with_the_other_sign() -> None:
    there = compared(GOOD, SHORT, METRICS_USED, resamples=50)
    back = compared(SHORT, GOOD, METRICS_USED, resamples=50)
    for name in METRICS_USED:
        assert back[name].difference == pytest.approx(-there[name].difference)
        assert (back[name].low, back[name].high) == pytest.approx((-there[name].high, -there[name].low))
        assert back[name].p_value == there[name].p_value


def test_a_system_is_no_better_than_itself() -> None:
    for found in compared(GOOD, GOOD, METRICS_USED, resamples=20).values():
        assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_seed_decides_the_draws() -> None:
    def interval(seed: int) -> Comparison:
        return compared(GOOD, SHORT, ["nist"], resamples=50, seed=seed)["nist"]

    assert interval(1) == interval(1)
    assert interval(1).high != interval(2).high


def test_chance_is_seldom_called_a_difference_and_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    called = covered = 0
    for trial in range(200):
        pair = random.normal(0.5, 0.1, size=(2, 40)).tolist()
        found = compare(*of_means(*pair), resamples=200, seed=trial)["rouge_l"]
        called += found.p_value < 0.05
        covered += found.low <= 0 <= found.high
    assert called <= 20
    assert 180 <= covered <= 198


def test_every_metric_of_the_table_says_how_it_is_resampled() -> None:
    notes = {name: load(name).RESAMPLED for name in METRICS}
    assert [name for name, note in notes.items() if note] == ["nist", "meteor", "cider", "meteor_webnlg"]
    found = compare(*[{"meteor": e["rouge_l"]} for e in of_means([0.1, 0.2], [0.2, 0.2])], resamples=2)
    assert found["meteor"].note == "differences of the means of the inputs' scores, not of the corpus figures"


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(MetricError, match="systems on 2 and 3 inputs cannot be compared"):
        compare(*of_means([0.1, 0.2], [0.1, 0.2, 0.3]))
    with pytest.raises(MetricError, match="at least 1 resample, 0 were asked for"):
        compare(*of_means([0.1], [0.2]), resamples=0)
    with pytest.raises(MetricError, match="1 hypotheses for 30 inputs"):
        compared(GOOD, GOOD[:1], ["bleu"])
