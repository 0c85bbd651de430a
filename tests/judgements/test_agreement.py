"""Agreement against the `krippendorff` package, textbook cases and closed forms."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib.judgements import agreement

NAN = math.nan

# Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), example C: 12 units, 4 observers.
TEXTBOOK = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
).T


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_own_example(level, value):
    assert agreement.alpha(TEXTBOOK, level=level) == pytest.approx(value, abs=5e-4)


ratings = st.integers(2, 5).flatmap(
    lambda raters: st.lists(
        st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, NAN]), min_size=raters, max_size=raters),
        min_size=2,
        max_size=15,
    )
)


@settings(max_examples=150, deadline=None)
@given(rows=ratings, level=st.sampled_from(["nominal", "ordinal", "interval"]))
def test_alpha_equals_the_packages(rows, level):
    krippendorff = pytest.importorskip("krippendorff")
    table = np.array(rows)
    ours = agreement.alpha(table, level=level)
    paired = table[(~np.isnan(table)).sum(axis=1) > 1]
    if len(np.unique(paired[~np.isnan(paired)])) < 2:  # nothing can disagree: the package raises or gives nan
        assert math.isnan(ours)
        return
    assert ours == pytest.approx(krippendorff.alpha(reliability_data=table.T, level_of_measurement=level), abs=1e-9)


def test_alpha_is_undefined_where_all_ratings_are_equal_or_nothing_was_rated_twice():
    for table in ([[1, 1], [1, 1]], [[1, NAN], [NAN, 0]]):
        table = np.array(table, dtype=float)
        assert math.isnan(agreement.alpha(table, level="nominal"))
        interval = agreement.alpha_interval(table, [0, 1], level="interval")
        assert all(math.isnan(value) for value in interval)


def test_the_jackknife_leaves_out_whole_groups():
    groups = np.repeat(np.arange(6), 2)
    interval = agreement.alpha_interval(TEXTBOOK, groups, level="nominal")
    # Kept naive: the same by calling alpha without each group.
    values = np.array([agreement.alpha(TEXTBOOK[groups != group], level="nominal") for group in range(6)])
    error = math.sqrt(5 / 6 * ((values - values.mean()) ** 2).sum())
    assert interval.value == pytest.approx(0.743, abs=5e-4)
    assert interval.low == pytest.approx(interval.value - 2.570582 * error, abs=1e-6)  # t, 5 degrees of freedom
    assert interval.high == pytest.approx(min(1, interval.value + 2.570582 * error), abs=1e-6)


def test_raw_agreement_counts_pairs_of_ratings_and_nothing_else():
    table = np.array([[1, 1, 1], [1, 0, NAN], [NAN, NAN, -1], [0, 0, 1]], dtype=float)
    assert agreement.raw(table, range(4)).value == pytest.approx((3 + 0 + 1) / (3 + 1 + 3))
    assert agreement.raw(agreement.decided(table), range(4)).value == 1.0  # [1 1 1] alone is left
    assert math.isnan(agreement.raw(table[2:3], [0]).value)


def test_raw_agreements_interval_is_wider_where_units_of_a_group_go_together():
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.random(60) < 0.7, 6)
    table = np.column_stack([np.ones(360), np.where(rows, 1.0, -1.0)])
    together = agreement.raw(table, np.repeat(np.arange(60), 6))
    apart = agreement.raw(table, np.arange(360))
    assert together.high - together.low > 1.8 * (apart.high - apart.low)


def test_the_ceiling_is_the_known_band():
    assert agreement.ceiling(0.75) == (0.75, pytest.approx(0.8536, abs=1e-4))
    assert agreement.ceiling(1.0) == (1.0, 1.0)
    assert agreement.ceiling(0.4) == (0.4, 0.5)


def test_annotators_who_err_independently_set_the_upper_end_of_the_band():
    rng = np.random.default_rng(1)
    truth = rng.choice([-1.0, 1.0], size=4_000)
    votes = np.column_stack([np.where(rng.random(4_000) < 0.85, truth, -truth) for _ in range(2)])
    pairwise = agreement.raw(votes, np.arange(4_000) // 10).value
    assert agreement.ceiling(pairwise)[1] == pytest.approx(0.85, abs=0.02)


def test_a_fall_is_seen_and_chance_is_not():
    rng = np.random.default_rng(2)

    def votes(share: float, n: int) -> tuple[np.ndarray, np.ndarray]:
        equal = rng.random(n) < share
        return np.column_stack([np.ones(n), np.where(equal, 1.0, -1.0)]), np.arange(n) // 3

    level = votes(0.8, 600)
    found = agreement.fall(level, votes(0.55, 300), error=0.001)
    assert found and found.level > found.now
    assert not any(agreement.fall(level, votes(0.8, 300), error=0.001) for _ in range(40))
    assert agreement.fall(level, votes(0.95, 300), error=0.001) is None
    assert agreement.fall(level, (np.full((3, 2), NAN), np.arange(3)), error=0.5) is None  # not known


def test_kappas_of_textbook_cases():
    # Cohen (1960): 50 proposals, both yes 20, both no 15, yes/no 5, no/yes 10: kappa 0.4.
    table = np.array([[1, 1]] * 20 + [[0, 0]] * 15 + [[1, 0]] * 5 + [[0, 1]] * 10, dtype=float)
    assert agreement.cohen(table) == pytest.approx(0.4)
    # Fleiss' kappa of the same two: Scott's pi, (0.7 - 0.505) / (1 - 0.505)
    assert agreement.fleiss(table) == pytest.approx((0.7 - 0.505) / 0.495)
    assert math.isnan(agreement.cohen(np.ones((4, 2)))) and math.isnan(agreement.fleiss(np.ones((4, 2))))


def frame() -> pd.DataFrame:
    scores = {
        ("p1", "d1"): ((1, 2, 0), (1, 1, 0)),
        ("p2", "d1"): ((-1, 0, 1), (-2, 0, -1)),
        ("p3", "d2"): ((0, 0, 0), (0, -1, 0)),
        ("p4", "d3"): ((2, 2, 2), (-1, 0, 0)),
    }
    rows = [(*pair, name, *row) for pair, both in scores.items() for name, row in zip("xy", both, strict=True)]
    found = pd.DataFrame(rows, columns=["pair_id", "document_id", "annotator", "one", "two", "three"])
    total = found[["one", "two", "three"]].sum(axis=1)
    return found.assign(total=total, preference=np.sign(total), batch=[1, 1, 1, 1, 2, 2, 2, 2])


def test_the_table_compares_signs_by_aspect_and_leaves_ties_out_where_it_says_so():
    table = agreement.table(frame(), aspects=("one", "two", "three"), seed=0).set_index(["subject", "measure"])["value"]
    assert table["preference", "raw agreement"] == 0.25  # p1; p2 and p3 pair a tie with B, p4 A with B
    assert table["preference, decided", "raw agreement"] == 0.5  # p1 and p4
    assert table["one", "raw agreement"] == 0.75
    assert table["summed score", "alpha, interval"] < 1


def test_windows_are_apart():
    windows = agreement.by_window(frame(), "batch", seed=0)
    raw = windows[windows["measure"] == "raw agreement"].set_index("batch")["value"]
    assert raw[1] == 0.5 and raw[2] == 0.0
