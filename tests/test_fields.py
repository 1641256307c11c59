"""Table values in texts: what is left out, what is added, and what this check does not try to know."""

from __future__ import annotations

import pytest

from antefix.data import Table
from antefix.errors import MetricError
from antefix.metrics.fields import FieldReport, check_fields

FERN = Table((("name", "Fern Hill"), ("price", "£20"), ("open", "yes")))
QUAY = Table((("name", "Old Quay"), ("price", "£35"), ("food", "fast food")))
MILL = Table((("name", "Mill"), ("dish", "food")))


def check(table: Table, text: str, *others: Table) -> FieldReport:
    """The findings of one text; the other tables only make values known."""
    return check_fields([table, *others], [text, *("" for _ in others)])


def test_shares_of_a_set() -> None:
    found = check_fields([FERN, QUAY], ["Fern Hill costs £20.", "The old quay near Fern Hill sells fast food at 7."])
    assert found.checked == 5
    assert found.not_checkable == 1  # yes
    assert found.missing == [[], [("price", "£35")]]
    assert found.added == [[], [("name", "Fern Hill"), ("number", "7")]]
    assert found.missing_share == pytest.approx(1 / 5)
    assert found.added_share == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Fern Hill", "at FERN HILL, daily"),
        ("family-friendly", "it is Family friendly"),
        ("family friendly", "a family-friendly inn"),
        ("£20-25", "for 20 - 25 pounds"),
        ("5 out of 5", "rated 5-out-of-5"),
        ("Caf\u00e9 Bo", "Cafe\u0301 Bo"),  # composed or not
        ("ﬁne", "fine"),
        ("1,000", "about 1,000 seats"),
        ("O'Brien's", "at O’Brien’s"),
    ],
)
def test_a_value_is_found_whatever_case_signs_and_spaces(value: str, text: str) -> None:
    assert check(Table((("field", value),)), text).missing == [[]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Fern Hill", "Fern and Hill"),
        ("ill", "Fern Hill"),
        ("20", "for £200"),
        ("1", "1.5 km"),
        ("less than £20", "under 20 pounds"),
        ("Café", "Cafe"),
    ],
)
def test_a_value_in_other_words_or_inside_a_word_is_missing(value: str, text: str) -> None:
    assert check(Table((("field", value),)), text).missing == [[("field", value)]]


def test_yes_and_no_and_signs_are_not_looked_for() -> None:
    found = check(Table((("open", "Yes"), ("rating", "***"), ("known", "none"))), "whatever 7")
    assert (found.checked, found.not_checkable, found.missing) == (0, 3, [[]])
    assert found.missing_share is None
    assert check(Table((("open", "yes"),)), "whatever").added_share is None


def test_the_longest_value_is_what_a_text_adds() -> None:
    assert check(FERN, "Fern Hill, £20, has fast food", QUAY, MILL).added[0] == [("food", "fast food")]
    assert check(FERN, "Fern Hill, £20, has food", QUAY, MILL).added[0] == [("dish", "food")]


def test_a_word_of_the_tables_own_value_is_no_addition() -> None:
    assert check(Table((("name", "Mill Food Hall"),)), "Mill Food Hall", MILL).added[0] == []
    assert check(Table((("name", "Mill Food Hall"),)), "Mill Food Hall: food", MILL).added[0] == [("dish", "food")]


def test_numbers_of_own_values_are_no_addition() -> None:
    table = Table((("length", "7 km"), ("price", "£20-25")))
    assert check(table, "20 or 25 pounds, 7 miles, 8 stops, 8 more").added == [[("number", "8")]]


def test_an_empty_text_misses_all_and_adds_nothing() -> None:
    found = check(FERN, "")
    assert found.missing == [[("name", "Fern Hill"), ("price", "£20")]]
    assert found.added == [[]]
    assert (found.missing_share, found.added_share) == (1, None)


def test_a_field_may_come_twice() -> None:
    table = Table((("guest", "Ann"), ("guest", "Bea")))
    assert check(table, "Bea came").missing == [[("guest", "Ann")]]


def test_the_finding_does_not_hang_on_the_order_of_the_tables() -> None:
    other = Table((("course", "food"),))
    assert check(FERN, "food", MILL, other).added[0] == [("course", "food")]
    assert check(FERN, "food", other, MILL).added[0] == [("course", "food")]


def test_what_cannot_be_checked_is_told() -> None:
    with pytest.raises(MetricError, match="1 texts for 2 tables: one text for every table"):
        check_fields([FERN, QUAY], ["a"])
    with pytest.raises(MetricError, match="there are no tables"):
        check_fields([], [])
