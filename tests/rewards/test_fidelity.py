"""What a reward model's scores are worth: textbook figures, kept naive versions, and each sign of the diagnosis."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib.judgements.annotation import Preference
from erlib.rewards import fidelity
from erlib.task.forms import short_prompt


def preference(document, pair, *, label="A", score=None, votes=None, a="aa", b="b"):
    sign = {"A": 1.0, "tie": 0.0, "B": -1.0}[label]
    return Preference(
        pair_id=f"{document}#{pair}",
        document_id=document,
        split="test",
        checkpoint="c" * 64,
        prompt=short_prompt(document),
        a=a,
        b=b,
        a_ids=tuple(a.encode()),
        b_ids=tuple(b.encode()),
        preference=label,
        score=sign * 2 if score is None else score,
        votes=(label,) if votes is None else votes,
        aspects={},
    )


def table(preferences, margins):
    return fidelity.pair_table(preferences, margins, completions=completions(preferences))


def completions(preferences):
    """Both sides of each preference as `sampling.table` has them, the longer the less likely."""
    rows = [(p.document_id, ids, -float(len(ids))) for p in preferences for ids in (p.a_ids, p.b_ids)]
    return pd.DataFrame(rows, columns=["document_id", "ids", "logprob"])


PREFERENCES = [
    preference("d1", "0-1", label="A", votes=("A", "A")),
    preference("d1", "0-2", label="B", votes=("B", "tie"), score=-0.5),
    preference("d2", "0-1", label="A", votes=("A", "B", "A"), score=1.5, a="x", b="long text"),
    preference("d2", "0-2", label="tie", votes=("A", "B")),
    preference("d3", "0-1", label="B", votes=("B",), a="same", b="also"),
]
MARGINS = [2.0, -1.0, -3.0, 0.5, 0.0]


def test_margins_are_those_of_the_sampled_ids_in_their_document():
    known = completions(PREFERENCES)
    scores = np.arange(2.0 * len(known)).reshape(-1, 2) ** 2
    last = {key: scores[row] for row, key in enumerate(zip(known["document_id"], known["ids"], strict=True))}
    found = fidelity.margins(PREFERENCES, known, scores)
    assert found.shape == (len(PREFERENCES), 2)
    for pair, margin in zip(PREFERENCES, found, strict=True):
        assert np.array_equal(margin, last[pair.document_id, pair.a_ids] - last[pair.document_id, pair.b_ids])
    with pytest.raises(KeyError):
        fidelity.margins([preference("nowhere", "0-1")], known, scores)


# -- accuracy -----------------------------------------------------------------------------------------------------


def test_accuracy_leaves_ties_out_and_counts_an_undecided_model_half():
    assert fidelity.accuracy(table(PREFERENCES, MARGINS)).value == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_accuracy_against_votes_counts_the_votes_of_pairs_that_two_decide():
    # d1: 2 of 2; d2: 1 of 3, and 1 of 2 in the pair whose label is a tie; the other pairs have one decided vote
    assert fidelity.accuracy(table(PREFERENCES, MARGINS), against="vote").value == pytest.approx(4 / 7)


@given(st.lists(st.tuples(st.sampled_from(["A", "tie", "B"]), st.integers(-2, 2), st.integers(0, 3)), min_size=1))
@settings(max_examples=50, deadline=None)
def test_accuracy_is_that_of_a_loop_over_pairs(pairs):
    preferences = [preference(f"d{group}", str(i), label=label) for i, (label, _, group) in enumerate(pairs)]
    points = [
        0.5 if margin == 0 else float((margin > 0) == (label == "A")) for label, margin, _ in pairs if label != "tie"
    ]
    found = fidelity.accuracy(table(preferences, [margin for _, margin, _ in pairs]))
    if points:
        assert found.value == pytest.approx(np.mean(points))
        assert found.low <= found.value <= found.high
    else:
        assert math.isnan(found.value)


def test_pairs_of_one_document_are_no_independent_evidence():
    """The same 40 right and 40 wrong pairs: spread over 80 documents, or the wrong ones in 4 documents of ten."""
    spread = [preference(f"d{i}", "0-1") for i in range(80)]
    heaped = [preference(f"d{i // 10}", str(i)) for i in range(80)]
    margins = [1.0] * 40 + [-1.0] * 40
    wide, narrow = (fidelity.accuracy(table(each, margins)) for each in (heaped, spread))
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_simple_rules_are_measured_on_the_same_pairs():
    preferences = [preference(f"d{i}", "0-1", a="longer text", b="short") for i in range(30)]
    preferences += [preference(f"e{i}", "0-1", label="B", a="longer text", b="short") for i in range(10)]
    found = fidelity.baselines(table(preferences, [1.0] * 30 + [-1.0] * 10)).set_index(["name", "measure"])["value"]
    assert found["reward model", "accuracy"] == 1.0
    assert found["prefer the longer", "accuracy"] == 0.75
    assert found["prefer the likelier", "accuracy"] == 0.25  # log-probability falls with length here
    assert found["prefer the longer", "model minus rule"] == 0.25


def test_groups_hold_every_decided_pair_once():
    grouped = fidelity.accuracy_by(table(PREFERENCES, MARGINS))
    assert dict(grouped.groupby("by")["pairs"].sum()) == {by: 4 for by in grouped["by"].unique()}
    found = grouped.set_index(["by", "group"])
    assert found.loc[("votes", "all agree"), "pairs"] == 2  # A A and a single B
    assert found.loc[("votes", "all agree"), "value"] == 0.75
    assert found.loc[("annotators preferred", "the shorter"), "pairs"] == 2
    assert found.loc[("strength of the preference", "to 1"), "value"] == 1.0
    quarters = [group for by, group in found.index if by == "margin of the model"]
    assert quarters == ["smallest quarter", "second", "third", "largest quarter"]


def test_length_correlations_of_model_and_annotators():
    preferences = [preference(f"d{i}", "0-1", a="x" * (i + 1), b="", score=(-1.0) ** i) for i in range(20)]
    found = fidelity.length_correlation(table(preferences, [float(i) for i in range(20)]))
    assert found["reward model"] == pytest.approx(1)
    assert abs(found["annotators"]) < 0.2


def test_the_worst_error_comes_first_in_full():
    worst = fidelity.worst(PREFERENCES, table(PREFERENCES, MARGINS), n=5)
    assert list(worst["margin"]) == [-3.0]
    shown = worst.iloc[0][["prompt", "A", "B", "annotators prefer"]].tolist()
    assert shown == [short_prompt("d2"), "x", "long text", "A"]


def test_an_aspect_has_an_accuracy_of_its_own_and_leaves_its_ties_out():
    judged = [
        {"entities": 1.0, "relationships": 0.0, "summaries": -2.0},
        {"entities": -0.5, "relationships": 0.0, "summaries": 1.0},
        {"entities": 0.0, "relationships": 2.0, "summaries": 1.0},
    ]
    pairs = [preference(f"d{n}", "0-1", label="A").model_copy(update={"aspects": a}) for n, a in enumerate(judged)]
    margins = np.array([[1.0, 0.0, 1.0], [2.0, 1.0, 1.0], [0.0, 3.0, -0.5]])
    found = fidelity.accuracy_by_aspect(table(pairs, margins.sum(axis=1)), pairs, margins)
    values = found.set_index(["measure", "name"])["value"].to_dict()
    assert values["accuracy in entities", "score of the aspect"] == 0.5
    assert values["accuracy in relationships", "score of the aspect"] == 1
    assert values["accuracy in summaries", "score of the aspect"] == pytest.approx(1 / 3)
    assert values["accuracy in summaries", "summed score"] == pytest.approx(2 / 3)


# -- calibration --------------------------------------------------------------------------------------------------


def sampled(n, *, stretch=1.0, seed=0):
    """Pairs whose labels follow sigmoid(margin); the margins are told `stretch` times too wide."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(0, 1.5, size=n)
    labels = np.where(rng.random(n) < 1 / (1 + np.exp(-margins)), "A", "B")
    return table([preference(f"d{i}", "0-1", label=str(label)) for i, label in enumerate(labels)], margins * stretch)


def test_a_calibrated_model_has_a_small_error_and_temperature_one():
    honest = sampled(6000)
    assert fidelity.calibration_error(honest) < 0.02
    assert fidelity.fit_temperature(honest) == pytest.approx(1, abs=0.08)
    binned = fidelity.reliability(honest)
    assert binned["pairs"].sum() == 6000
    assert ((binned["low"] <= binned["confidence"]) & (binned["confidence"] <= binned["high"])).mean() > 0.7


def test_a_temperature_mends_overconfidence_and_changes_no_order():
    fitted = fidelity.fit_temperature(sampled(3000, stretch=5, seed=1))
    fresh = sampled(6000, stretch=5, seed=2)
    assert fitted == pytest.approx(5, rel=0.12)
    assert fidelity.calibration_error(fresh) > 0.15
    assert fidelity.calibration_error(fresh, temperature=fitted) < 0.02
    assert fidelity.accuracy(fresh).value == fidelity.accuracy(sampled(6000, seed=2)).value


def test_a_cross_fitted_temperature_has_not_seen_the_document_that_it_is_used_on():
    stretched, others = sampled(3000, stretch=5, seed=2), sampled(300, stretch=5, seed=1)
    found = fidelity.cross_fitted(stretched, others, folds=3)
    assert fidelity.calibration_error(stretched) > 0.15
    assert fidelity.calibration_error(found) < 0.025
    assert list(found["pair_id"]) == list(stretched["pair_id"])
    ratios = stretched["margin"] / found["margin"]
    assert ratios.round(9).nunique() == 3
    # Of one document, the label is turned: its own fold's temperature does not move, the others' do.
    turned = stretched.assign(label=stretched["label"].where(stretched.index != 0, -stretched["label"]))
    again = turned["margin"] / fidelity.cross_fitted(turned, others, folds=3)["margin"]
    same = (ratios - again).abs() < 1e-12
    assert same[0] and 900 < same.sum() < 1100 and (again[same].round(9) == round(ratios[0], 9)).all()


def test_a_temperature_needs_a_preference_to_be_fitted_on():
    ties = table([preference(f"d{i}", "0-1", label="tie") for i in range(3)], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="none of 3 pairs has a preference"):
        fidelity.fit_temperature(ties)


def test_the_error_of_one_bin_by_hand():
    preferences = [preference(f"d{i}", "0-1", label="A" if i < 6 else "B") for i in range(10)]
    confidence = 1 / (1 + math.exp(-2.0))
    found = fidelity.calibration_error(table(preferences, [2.0] * 10), bins=1)
    assert found == pytest.approx(confidence - 0.6)


def test_noise_in_few_pairs_is_no_evidence_of_bad_calibration():
    """Of 400 pairs, calibrated models are never shown to miss a target of .10, and overconfident ones are."""
    honest = [fidelity.calibration_interval(sampled(400, seed=seed), samples=300) for seed in range(8)]
    assert all(found.low < 0.03 and found.low <= found.value <= found.high for found in honest)
    assert all(found.high < 0.10 for found in honest)
    off = [fidelity.calibration_interval(sampled(400, stretch=8, seed=seed), samples=300) for seed in range(4)]
    assert all(found.low > 0.10 for found in off)


def test_the_interval_of_the_calibration_error_is_over_documents():
    one = sampled(400)
    copies = pd.concat([one] * 4, ignore_index=True)  # four pairs a document that say the same
    alone, together = (fidelity.calibration_interval(table, samples=300) for table in (one, copies))
    assert together.value == pytest.approx(alone.value, abs=0.01)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.3)


# -- agreement and diagnosis ----------------------------------------------------------------------------------------


def test_agreement_is_over_two_decided_votes():
    # d1: A A agree; B tie and the single B say nothing. d2: A B A has one agreeing pair of three, A B none of one.
    assert fidelity.vote_agreement(PREFERENCES).value == pytest.approx(2 / 5)
    assert math.isnan(fidelity.vote_agreement([preference("d", "0-1")]).value)


HEALTHY = {
    "train_accuracy": 0.9, "accuracy": 0.85, "agreement": 0.85, "tie_share": 0.2, "gain_over_rules": 0.1,
    "calibration_error": 0.05, "length_model": 0.3, "length_annotators": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "sign"),
    [
        ({"agreement": 0.6}, "annotators disagree"),
        ({"tie_share": 0.5}, "many ties"),
        ({"train_accuracy": 0.7, "accuracy": 0.68}, "fits its own pairs badly"),
        ({"accuracy": 0.7}, "forgets them on new documents"),
        ({"gain_over_rules": -0.01}, "adds little to a simple rule"),
        ({"length_model": -0.6}, "leans on length more than people"),
        ({"calibration_error": 0.2}, "confidence is off"),
    ],
)
def test_each_sign_is_read_off_its_own_figure(changed, sign):
    def seen(figures):
        found = fidelity.diagnosis(**figures)
        return list(found.index[found["seen"] == "YES"])

    assert seen(HEALTHY) == []
    assert seen(HEALTHY | changed) == [sign]
