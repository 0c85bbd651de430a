"""Verdicts: a value beside its target is met, missed or undecided, and is shown so."""

import math

import numpy as np
import pytest

from erlib.chain import run, tables
from erlib.chain.verdict import counts, failed
from erlib.task.metrics import Interval


@pytest.mark.parametrize(
    ("value", "target", "outcome"),
    [(0.8, ">= 0.80", "met"), (0.79, ">= 0.8", "missed"), (1, "<1", "missed"), (True, "== 1", "met"),
     (0.01, "< 1e-1", "met"), (float("nan"), "> 0", "missed"), (None, "> 0", "missed"), (math.inf, "> 1", "met"),
     (np.float32(0.5), "<= 0.5", "met"), (0.5, None, None)],
)  # fmt: skip
def test_a_value_without_an_interval_is_met_or_missed(value, target, outcome) -> None:
    assert run.check("x", value, target=target).outcome == outcome


@pytest.mark.parametrize(
    ("low", "high", "target", "outcome"),
    [
        (0.689, 0.785, ">= 0.75", "undecided"),
        (0.750, 0.785, ">= 0.75", "met"),
        (0.750, 0.785, "> 0.75", "undecided"),
        (0.689, 0.750, "> 0.75", "missed"),
        (0.689, 0.750, ">= 0.75", "undecided"),
        (0.689, 0.749, ">= 0.75", "missed"),
        (0.01, 0.09, "< 0.1", "met"),
        (0.01, 0.11, "< 0.1", "undecided"),
        (0.10, 0.11, "< 0.1", "missed"),
        (0.10, 0.11, "<= 0.1", "undecided"),
        (0, 0, "== 0", "met"),
        (0, 1, "== 0", "undecided"),
        (1, 2, "== 0", "missed"),
        (3.0, math.inf, ">= 2", "met"),
        (1.0, math.inf, ">= 2", "undecided"),
        (3.0, None, ">= 2", "met"),
        (math.nan, 1.0, ">= 2", "missed"),
        (math.nan, 3.0, ">= 2", "undecided"),
    ],
)
def test_an_interval_is_missed_only_where_all_of_it_lies_on_the_wrong_side(low, high, target, outcome) -> None:
    middle = next(end for end in (low, high) if end is not None and math.isfinite(end))
    assert run.check("x", middle, low=low, high=high, target=target).outcome == outcome


def test_a_value_may_be_an_interval() -> None:
    row = run.check("accuracy", Interval(0.736, 0.689, 0.785), target=">= 0.75")
    assert row == ("accuracy", 0.736, 0.689, 0.785, ">= 0.75", "undecided", True)
    assert run.check("x", Interval(math.nan, math.nan, math.nan), target="> 0").outcome == "missed"


def test_only_a_missed_gate_fails_a_phase() -> None:
    missed, undecided = {"target": "> 1"}, {"low": 0, "high": 2, "target": "> 1"}
    assert failed([run.check("x", 0, **missed)])
    assert not failed([run.check("x", 0, **missed, gate=False), run.check("y", 1, **undecided), run.check("z", 0)])
    rows = [
        run.check("x", 0, **missed)._asdict(),
        run.check("y", 1, **undecided)._asdict(),
        run.check("z", 0)._asdict(),
    ]
    assert counts(rows) == {"met": 0, "undecided": 1, "missed": 1}
    assert tables.tally(rows) == "0 met, 1 undecided, 1 missed"


def test_a_target_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match='looks like ">= 0.80"'):
        run.check("x", 1.0, target="about 1")


def test_the_table_words_numbers_and_outcomes() -> None:
    checks = [
        run.check("documents", 300.0, target=">= 300"),
        run.check("documents an hour", 1234567.8),
        run.check("sign test, p", 2e-5, target="< 0.001"),
        run.check("share", 0.00002),
        run.check("ratio", 4.0, low=2.5, high=math.inf, target="> 5", gate=False),
        run.check("lost", 0.5, low=0.4, high=0.6, target="> 0.7", gate=False),
    ]
    table = tables.verdict_table(checks)
    assert list(table["value"]) == ["300", "1,234,568", "< 0.001", "2e-05", "4", "0.5"]
    assert list(table["95 % interval"]) == ["", "", "", "", "from 2.5", "0.4 to 0.6"]
    assert list(table["outcome"]) == ["✓ met", "", "✓ met", "", "○ undecided", "✗ missed (not a gate)"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.0, "12"), (0.25, "0.25"), (2.09808349e-05, "2.09808e-05"), (1234567.25, "1234567.25"), (-3.0, "-3"),
     (math.nan, "NaN"), (math.inf, "inf"), (0.123456789, "0.123457")],
)  # fmt: skip
def test_displayed_frames_keep_counts_whole_and_small_numbers_visible(value: float, text: str) -> None:
    assert tables.cell(value) == text
