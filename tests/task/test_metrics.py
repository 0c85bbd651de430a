"""Scores against hand-computed cases and nervaluate, statistics against textbook values and scipy."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from erlib.task import metrics
from erlib.task.schema import Brief, Defect, Entity, Kind, Parsed, Relationship, Report

NO_BRIEF = None
BRIEF = Brief(
    client="a desk",
    purpose="to know",
    summaries="short",
    entities=[
        Kind(type="org", description="a company", example="Korvex"),
        Kind(type="person", description="acts for a company", example="Ada"),
        Kind(type="handle", description="an account", example="@bo", wanted=False),
    ],
    relationships=[
        Kind(type="buys", description="takes over", example="A buys B"),
        Kind(type="leads", description="runs", example="A leads B"),
        Kind(type="partners", description="works with", example="A and B", symmetric=True),
        Kind(type="knows", description="a friend", example="A knows B", wanted=False),
    ],
)


def report(entities: str = "", relationships: str = "") -> Report:
    """Entities as "Name/type/summary, ...", relationships as "source type target, ..."."""
    fields = [item.strip().split("/") for item in entities.split(",") if item.strip()]
    links = [item.split() for item in relationships.split(",") if item.strip()]
    return Report(
        entities=[Entity(name=name, type=kind, summary="".join(summary)) for name, kind, *summary in fields],
        relationships=[Relationship(source=source, type=kind, target=target) for source, kind, target in links],
    )


# -- exact match --------------------------------------------------------------------------------------------------


def test_exact_match_by_hand() -> None:
    gold = [report("A/org, B/org, C/person", "A buys B, C leads A"), report(), report("D/org")]
    predicted = [report("A/org, B/person, E/org", "A buys B, A buys E"), report("F/org"), report()]
    scores = metrics.score(gold, predicted, NO_BRIEF)
    assert scores.entity_counts.tolist() == [[1, 2, 2], [0, 1, 0], [0, 0, 1]]
    assert scores.relationship_counts.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert scores.entity_precision == 1 / 4
    assert scores.entity_recall == 1 / 4
    assert scores.entity_f1 == 1 / 4
    assert scores.relationship_precision == scores.relationship_recall == scores.relationship_f1 == 1 / 2


def test_direction_counts_except_for_symmetric_types_where_both_orders_are_one() -> None:
    gold = [report("A/x, B/x", "A partners B")]
    swapped = [report("A/x, B/x", "B partners A")]
    both = [report("A/x, B/x", "A partners B, B partners A")]
    assert metrics.score(gold, swapped, NO_BRIEF).relationship_counts.tolist() == [[0, 1, 1]]
    assert metrics.score(gold, swapped, BRIEF).relationship_counts.tolist() == [[1, 0, 0]]
    assert metrics.score(gold, both, BRIEF).relationship_counts.tolist() == [[1, 0, 0]]


def test_nothing_to_find_and_nothing_found_is_perfect_and_anything_else_is_not() -> None:
    nothing = metrics.score([report()], [report()], NO_BRIEF)
    assert nothing.entity_precision == nothing.entity_recall == nothing.entity_f1 == 1
    invented = metrics.score([report()], [report("A/x")], NO_BRIEF)
    assert invented.entity_precision == invented.entity_recall == invented.entity_f1 == 0
    silent = metrics.score([report("A/x")], [report()], NO_BRIEF)
    assert silent.entity_precision == silent.entity_recall == silent.entity_f1 == 0


def test_reports_must_pair_up() -> None:
    with pytest.raises(ValueError, match="shorter"):
        metrics.score([report()], [], NO_BRIEF)
    assert metrics.score([], [], NO_BRIEF).entity_counts.shape == (0, 3)


# -- schemas ------------------------------------------------------------------------------------------------------


def schema(frame, name: str) -> dict:
    return frame.set_index("schema").loc[name].to_dict()


def test_entity_schemas_tell_type_and_boundary_errors_apart() -> None:
    document = "Ada Bo of Korvex Labs met Tam in Osti."
    gold = report("Ada Bo/person, Korvex Labs/org, Tam/person, Osti/place")
    predicted = report("Ada Bo/person, Korvex/org, Tam/org, Nowhere/place")
    frame = metrics.entity_schemas([gold], [predicted], [document])
    # Ada Bo right; Korvex right type, wrong border; Tam right border, wrong type; Osti missed; Nowhere spurious.
    columns = ["correct", "incorrect", "partial", "missed", "spurious"]
    counts = {row["schema"]: [row[column] for column in columns] for _, row in frame.iterrows()}
    assert counts == {
        "strict": [1, 2, 0, 1, 1],
        "exact": [2, 1, 0, 1, 1],
        "partial": [2, 0, 1, 1, 1],
        "type": [2, 1, 0, 1, 1],
    }
    assert schema(frame, "partial")["f1"] == pytest.approx(2.5 / 4)


def test_an_exact_match_is_not_lost_to_an_overlapping_prediction_that_came_first() -> None:
    gold, predicted = report("Korvex Labs/org"), report("Korvex/org, Korvex Labs/org")
    assert schema(metrics.entity_schemas([gold], [predicted], ["Korvex Labs"]), "strict")["correct"] == 1


words = ["Ada", "Bo", "Korvex", "Osti", "Tam", "Vel"]
entity_lists = st.dictionaries(st.sampled_from(words), st.sampled_from(["org", "person"]), max_size=5)


def as_report(entities: dict[str, str]) -> Report:
    return Report(entities=[Entity(name=name, type=kind) for name, kind in entities.items()])


@given(st.lists(st.tuples(entity_lists, entity_lists), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_headline_score_agrees_with_nervaluate_strict(pairs: Sequence[tuple[dict, dict]]) -> None:
    gold, predicted = [as_report(a) for a, _ in pairs], [as_report(b) for _, b in pairs]
    frame = metrics.entity_schemas(gold, predicted, [" ".join(words)] * len(pairs))
    scores = metrics.score(gold, predicted, NO_BRIEF)
    if scores.entity_counts.sum():
        strict = schema(frame, "strict")
        assert strict["correct"] == scores.entity_counts[:, 0].sum()
        assert strict["precision"] == pytest.approx(scores.entity_precision)
        assert strict["recall"] == pytest.approx(scores.entity_recall)
        assert strict["f1"] == pytest.approx(scores.entity_f1)


# -- taxonomy and rates -------------------------------------------------------------------------------------------


def errors(gold: Report, predicted: Report, document: str, defects: Sequence[Defect] = ()) -> list[tuple[str, str]]:
    frame = metrics.taxonomy([document], [gold], [Parsed(predicted, tuple(defects))], BRIEF)
    assert (frame["document"] == 0).all()
    return list(frame[["kind", "item"]].itertuples(index=False, name=None))


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        ("Ada/person", "Ada/person", []),
        ("Ada/person", "", ["missed"]),
        ("Ada/person", "Ada/org", ["type"]),
        ("Korvex Labs/org", "Korvex/org", ["boundary"]),
        ("Korvex Labs/org", "Korvex/org, Korvex Labs/org", ["spurious"]),
        ("Korvex Labs/org", "Labs/org, Korvex Labs/person", ["type", "spurious"]),
        ("", "Osti/org", ["spurious"]),
        ("", "bo/handle", ["irrelevant"]),
        ("", "Nowhere/handle", ["ungrounded"]),
        ("Ada/person", "Adele/person", ["ungrounded", "missed"]),
    ],
)
def test_each_kind_of_entity_error(gold: str, predicted: str, expected: list[str]) -> None:
    document = "Ada and bo of Korvex Labs in Osti"
    assert errors(report(gold), report(predicted), document) == [(kind, "entity") for kind in expected]


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        ("A buys B", "A buys B", []),
        ("A buys B", "", ["missed"]),
        ("A buys B", "A leads B", ["type"]),
        ("A buys B", "B buys A", ["wrong_end"]),
        ("A buys B", "A buys C", ["wrong_end"]),
        ("A buys B", "C leads D", ["spurious", "missed"]),
        ("", "A knows B", ["irrelevant"]),
        ("A buys B", "A buys B, A buys C", ["spurious"]),
    ],
)
def test_each_kind_of_relationship_error(gold: str, predicted: str, expected: list[str]) -> None:
    entities = "A/org, B/org, C/org, D/org"
    found = errors(report(entities, gold), report(entities, predicted), "A B C D")
    assert found == [(kind, "relationship") for kind in expected]


def test_unparsable_text_is_an_error_and_other_defects_are_not_told_twice() -> None:
    defects = [Defect("unparsable", "???"), Defect("unknown_type", "x")]
    assert errors(report(), report(), "", defects) == [("unparsable", "text")]


@given(st.lists(st.tuples(entity_lists, entity_lists), max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_taxonomy_accounts_for_every_false_positive_and_false_negative(pairs: Sequence[tuple[dict, dict]]) -> None:
    gold, predicted = [as_report(a) for a, _ in pairs], [as_report(b) for _, b in pairs]
    counts = metrics.score(gold, predicted, NO_BRIEF).entity_counts
    parsed = [Parsed(p, ()) for p in predicted]
    n = metrics.taxonomy([" ".join(words)] * len(pairs), gold, parsed, BRIEF)["kind"].value_counts()
    both = n.get("type", 0) + n.get("boundary", 0)
    assert both + n.get("spurious", 0) + n.get("irrelevant", 0) + n.get("ungrounded", 0) == counts[:, 1].sum()
    assert both + n.get("missed", 0) == counts[:, 2].sum()


def test_fact_recall_by_hand() -> None:
    gold = [report("A/org/85 staff; loss-making, B/org/hiring"), report("C/org/sued twice"), report()]
    predicted = [report("A/org/Loss-Making; 185 staff, B/org/"), report("D/org/sued twice"), report()]
    facts = metrics.fact_recall(gold, predicted)
    assert facts.found.tolist() == [1, 0, 0]  # not "85 staff" inside "185 staff", not the fact of another entity
    assert facts.total.tolist() == [3, 1, 0]
    assert facts.words.tolist() == [3, 2, 0]
    assert facts.recall == 1 / 4
    assert math.isnan(metrics.fact_recall([report()], [report()]).recall)


def test_rates() -> None:
    parsed = [Parsed(report(), ()), Parsed(report(), (Defect("unparsable", ""), Defect("ungrounded", "A")))]
    assert metrics.parse_rate(parsed) == metrics.grounded_rate(parsed) == 0.5
    assert math.isnan(metrics.parse_rate([]))


# -- intervals and tests ------------------------------------------------------------------------------------------


def random_counts(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, size=(n, 3))


def test_the_bootstrap_agrees_with_scipy() -> None:
    counts = random_counts(60, seed=0)

    def statistic(tp, fp, fn, axis):
        return 2 * tp.sum(axis) / (2 * tp.sum(axis) + fp.sum(axis) + fn.sum(axis))

    expected = stats.bootstrap(
        tuple(counts.T), statistic, paired=True, vectorized=True, n_resamples=4000, method="percentile", rng=0
    ).confidence_interval
    interval = metrics.bootstrap_f1(counts, seed=0, samples=4000)
    assert interval.value == metrics.f1(counts)
    assert interval.low == pytest.approx(expected.low, abs=0.01)
    assert interval.high == pytest.approx(expected.high, abs=0.01)


def test_the_paired_bootstrap_agrees_with_a_loop() -> None:
    a, b = random_counts(40, seed=1), random_counts(40, seed=2)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(3000):
        rows = rng.integers(40, size=40)
        draws.append(metrics.f1(a[rows]) - metrics.f1(b[rows]))
    interval = metrics.paired_bootstrap_f1(a, b, seed=0, samples=3000)
    assert interval.value == pytest.approx(metrics.f1(a) - metrics.f1(b))
    assert interval[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.015)


def test_a_system_compared_with_itself_differs_by_nothing() -> None:
    counts = random_counts(30, seed=3)
    assert metrics.paired_bootstrap_f1(counts, counts, seed=0) == (0, 0, 0)
    with pytest.raises(ValueError, match="same documents"):
        metrics.paired_bootstrap_f1(counts, counts[1:], seed=0)


def test_the_mean_and_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    interval = metrics.bootstrap_mean(values, seed=0, samples=4000)
    error = stats.sem(values)
    assert interval.value == pytest.approx(values.mean())
    assert interval[1:] == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.02)
    shifted = metrics.paired_bootstrap_mean(values + 0.5, values, seed=0)
    assert shifted == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_is_of_sums_and_survives_documents_without_anything_to_count() -> None:
    interval = metrics.bootstrap_ratio([1, 0, 0], [2, 0, 0], seed=0)
    assert interval == (0.5, 0.5, 0.5)
    assert all(math.isnan(end) for end in metrics.bootstrap_ratio([0], [0], seed=0))


def test_intervals_repeat_with_the_seed_and_widen_with_the_level() -> None:
    counts = random_counts(30, seed=4)
    narrow, wide = (metrics.bootstrap_f1(counts, seed=1, level=level) for level in (0.8, 0.99))
    assert narrow == metrics.bootstrap_f1(counts, seed=1, level=0.8)
    assert wide.low < narrow.low <= narrow.value <= narrow.high < wide.high
    with pytest.raises(ValueError, match="at least one document"):
        metrics.bootstrap_f1(counts[:0], seed=1)


def test_wilson_by_the_formula() -> None:
    n, p, z = 100, 0.49, stats.norm.ppf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert metrics.wilson(49, 100) == pytest.approx((p, centre - half, centre + half))
    assert metrics.wilson(0, 10)[1:] == pytest.approx((0, 0.2775), abs=1e-4)
    assert math.isnan(metrics.wilson(0, 0).value)
    for n in range(1, 60):  # rounding must not leave 0 or 1 outside: error bars have no negative length
        assert metrics.wilson(0, n).low == 0 and metrics.wilson(n, n).high == 1


@pytest.mark.parametrize(("n", "p"), [(50, 0.14), (100, 0.015), (200, 0.0004)])
def test_the_sign_test_gives_the_known_values_of_a_49_27_result(n: int, p: float) -> None:
    assert metrics.sign_test(round(0.49 * n), round(0.27 * n)) == pytest.approx(p, rel=0.15)


def test_the_sign_test_by_hand() -> None:
    assert metrics.sign_test(5, 0) == pytest.approx(2 / 2**5)
    assert metrics.sign_test(3, 3) == 1
    assert metrics.sign_test(0, 0) == 1


def test_an_interval_is_written_with_its_ends() -> None:
    assert f"{metrics.Interval(0.5, 0.25, 1.0):+.2f}" == "+0.50 (+0.25 to +1.00)"
    assert f"{metrics.Interval(1, 2, 3)}" == str(metrics.Interval(1, 2, 3))
