"""The blind test: power against simulation, what is asked, who asks whom, and statistics of known cases."""

import json
from collections import Counter
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from erlib.judgements import agreement, blindtest
from erlib.judgements.blindtest import Comparison, Vote
from erlib.task import metrics
from erlib.task.forms import parse_compact
from erlib.task.schema import ASPECTS, Document, Entity, Relationship, Report

SYSTEMS = ("policy", "frontier")


def documents(n):
    return [Document(id=f"d{i}", text=f"Korvex {i} bought Velia Labs.") for i in range(n)]


def reports(n, summary=""):
    return [Report(entities=(Entity(name=f"Korvex {i}", type="organisation", summary=summary),)) for i in range(n)]


def asked(n, *, both_orders=0.0, seed=0):
    by_system = {"policy": reports(n, "grid"), "frontier": reports(n)}
    return blindtest.questions(documents(n), by_system, both_orders=both_orders, seed=seed)


def votes(*choices, document="d0", flip=False):
    """Judgements of one document by as many annotators: + for the policy, 0 a tie, - for the frontier."""
    a, b = SYSTEMS[::-1] if flip else SYSTEMS
    scores = {"+": 1, "0": 0, "-": -1}
    return [
        Vote(
            comparison_id=f"{document}#{1 + flip}",
            document_id=document,
            annotator=f"person-{place}",
            position=0,
            a_system=a,
            b_system=b,
            scores=dict.fromkeys(ASPECTS, -scores[choice] if flip else scores[choice]),
        )
        for place, choice in enumerate(choices)
    ]


# -- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "win", "loss", "alpha"), [(12, 0.6, 0.2, 0.05), (25, 0.49, 0.27, 0.05), (6, 0.7, 0.1, 0.05)]
)
def test_power_is_the_sum_over_all_outcomes(n, win, loss, alpha):
    """Oracle: every number of wins and losses, its probability, and scipy's own test."""
    from scipy.stats import multinomial

    chance = 0.0
    for wins in range(n + 1):
        for losses in range(n + 1 - wins):
            decided = wins + losses
            if decided and binomtest(wins, decided).pvalue <= alpha:
                chance += multinomial.pmf((wins, n - decided, losses), n, (win, 1 - win - loss, loss))
    assert blindtest.power(n, win=win, loss=loss, alpha=alpha) == pytest.approx(chance, abs=1e-9)


def test_no_number_of_equals_is_told_apart_more_often_than_alpha():
    assert blindtest.power(300, win=0.38, loss=0.38, alpha=0.05) <= 0.05
    assert blindtest.power(5, win=0.9, loss=0.1, alpha=0.05) == 0  # even 5 : 0 has p = .06


def test_needed_is_the_first_step_with_enough_power():
    shares = {"win": blindtest.SOURCE["win"], "loss": blindtest.SOURCE["loss"], "alpha": 0.001}
    n = blindtest.needed(**shares, target=0.9)
    assert blindtest.power(n, **shares) >= 0.9 > blindtest.power(n - 10, **shares)
    with pytest.raises(ValueError, match="more than 50 documents"):
        blindtest.needed(**shares, limit=50)


def test_the_source_s_shares_have_the_published_p_values():
    for n, p in ((50, 0.14), (100, 0.015), (200, 0.0004)):
        wins, losses = (round(blindtest.SOURCE[side] * n) for side in ("win", "loss"))
        assert metrics.sign_test(wins, losses) == pytest.approx(p, rel=0.15)


# -- what is asked ------------------------------------------------------------------------------------------------


def test_the_form_of_a_report_does_not_tell_its_writer():
    one = Report(
        entities=(
            Entity(name="Velia", type="organisation"),
            Entity(name="Korvex", type="organisation", summary="grid"),
        ),
        relationships=(Relationship(source="Korvex", target="Velia", type="acquired"),),
    )
    other = one.model_copy(update={"entities": one.entities[::-1]})
    text = "Korvex bought Velia"
    assert blindtest.shown(one, text) == blindtest.shown(other, text)
    assert blindtest.shown(one, text).startswith("Korvex|organisation|grid\n>acquired|Velia\nVelia")
    assert set(parse_compact(blindtest.shown(one, text)).report.entities) == set(one.entities)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 30), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_orders_are_balanced_recorded_and_the_second_one_mirrors_the_first(n, share, seed):
    found = asked(n, both_orders=share, seed=seed)
    first = {c.document_id: c for c in found.comparisons if c.order == 1}
    second = {c.document_id: c for c in found.comparisons if c.order == 2}
    assert list(first) == [document.id for document in documents(n)]
    assert len(second) == round(share * n)
    led = Counter(c.a_system for c in first.values())
    assert abs(led["policy"] - led["frontier"]) <= 1
    for document_id, again in second.items():
        once = first[document_id]
        assert (again.a, again.b, again.a_system, again.b_system) == (once.b, once.a, once.b_system, once.a_system)
    for comparison in found.comparisons:
        assert ("grid" in comparison.a) == (comparison.a_system == "policy")
    assert len({c.id for c in found.comparisons}) == len(found.comparisons)


def test_which_system_is_first_follows_from_the_seed():
    def orders(seed):
        return [c.a_system for c in asked(40, seed=seed).comparisons]

    assert orders(1) == orders(1) != orders(2)


def test_same_reports_are_ties_without_being_asked():
    same = blindtest.questions(documents(3), {"policy": reports(3), "frontier": reports(3)}, both_orders=1.0, seed=0)
    assert same.comparisons == [] and same.identical == ["d0", "d1", "d2"]
    found = blindtest.result(votes("+"), "policy", identical=["d1", "d2"])
    assert (found.wins, found.ties, found.losses, found.n) == (1, 2, 0, 3)


def test_an_annotator_meets_a_document_again_only_after_all_first_times():
    found = blindtest.queues(asked(30, both_orders=0.5).comparisons, ["a", "b", "c"], each=2, seed=0)
    every = Counter(c.document_id for queue in found.values() for c in queue if c.order == 1)
    assert set(every.values()) == {2}
    assert {len([c for c in queue if c.order == 1]) for queue in found.values()} == {20}
    for queue in found.values():
        orders = [c.order for c in queue]
        assert orders == sorted(orders)
        assert {c.document_id for c in queue if c.order == 2} <= {c.document_id for c in queue if c.order == 1}
    with pytest.raises(ValueError, match="1 to 3 annotators"):
        blindtest.queues([], ["a", "b", "c"], each=4, seed=0)


def test_judges_see_texts_and_their_number_and_no_system():
    seen = []

    def judge(annotator, document, a, b, *, position):
        seen.append((annotator, position))
        return dict.fromkeys(ASPECTS, 2 * ("grid" in a) - 1)

    queued = blindtest.queues(asked(10, both_orders=1.0).comparisons, ["a", "b"], each=1, seed=0)
    given_ = blindtest.ask(queued, judge)
    assert seen == [(name, place) for name in ("a", "b") for place in range(10)]
    assert {each.preferred() for each in given_} == {"policy"}
    assert blindtest.result(given_, "policy").wins == 10


# -- people -------------------------------------------------------------------------------------------------------


@pytest.fixture
def queued():
    return blindtest.queues(asked(3).comparisons, ["person-1", "person-2"], each=1, seed=0)


def answers(queued):
    rest = {"entities": 1, "relationships": 0, "summaries": -2, "seconds": 31.0, "at": "2025-06-01T10:00:00Z"}
    return [{"annotator": task["annotator"], "pair_id": task["pair_id"], **rest} for task in blindtest.tasks(queued)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_people_are_sent_no_system_and_their_answers_come_back(queued, tmp_path):
    assert all(name not in json.dumps(task) for task in blindtest.tasks(queued) for name in SYSTEMS)
    rows = answers(queued)
    assert len(rows) == 3
    read = blindtest.read_answers(write(tmp_path / "some.jsonl", [*rows[:2], rows[2] | {"pair_id": "d9#1-0"}]), queued)
    assert [each.pair_id for each in read.judgements] == [row["pair_id"] for row in rows[:2]]
    assert read.elsewhere == 1
    found = read.votes
    assert [each.comparison_id for each in found] == [row["pair_id"] for row in rows[:2]]
    assert {each.preferred() == each.b_system for each in found} == {True}
    assert found[0].preferred("entities") == found[0].a_system and found[0].preferred("relationships") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entities": 3}, r"bad.jsonl:2: entities: .*less than or equal to 2"),
        ({"annotator": "somebody"}, "bad.jsonl:2: .* is no task"),
    ],
)
def test_answers_that_do_not_fit_are_named(queued, tmp_path, change, message):
    rows = answers(queued)
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        blindtest.read_answers(write(tmp_path / "bad.jsonl", rows), queued)
    with pytest.raises(ValueError, match="twice.jsonl:2: .* second time"):
        blindtest.read_answers(write(tmp_path / "twice.jsonl", [rows[0], rows[0]]), queued)


# -- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "outcome"),
    [("+", 1), ("0", 0), ("-", -1), ("++-", 1), ("+0-", 0), ("+00", 0), ("+0", 0), ("+-", 0), ("--0", -1)],
)
def test_a_document_is_won_by_more_than_half_of_its_judgements(choices, outcome):
    for flip in (False, True):  # whoever is A
        assert blindtest.outcomes(votes(*choices, flip=flip), "policy") == {"d0": outcome}
        assert blindtest.outcomes(votes(*choices, flip=flip), "frontier") == {"d0": -outcome}


def test_the_sum_of_the_aspects_decides_and_each_aspect_on_its_own():
    (one,) = votes("+")
    mixed = one.model_copy(update={"scores": {"entities": 2, "relationships": -1, "summaries": 0}})
    assert [mixed.preferred(aspect) for aspect in (None, *ASPECTS)] == ["policy", "policy", "frontier", None]
    assert blindtest.result([mixed], "policy", aspect="relationships").losses == 1


def counted(wins, ties, losses):
    choices = "+" * wins + "0" * ties + "-" * losses
    given_ = [each for place, choice in enumerate(choices) for each in votes(choice, document=f"d{place}")]
    return blindtest.result(given_, "policy")


def test_counts_intervals_and_both_sign_tests_of_the_source_s_shares():
    found = counted(49, 24, 27)
    assert (found.wins, found.ties, found.losses, found.n) == (49, 24, 27, 100)
    assert found.win == metrics.wilson(49, 100) and found.tie.value == 0.24
    assert found.p == pytest.approx(binomtest(49, 76).pvalue)
    assert found.p_ties_split == pytest.approx(binomtest(49 + 12, 100).pvalue)
    assert found.ratio.value == pytest.approx(49 / 27)
    assert found.ratio.low < 49 / 27 < found.ratio.high
    assert counted(3, 1, 2).p_ties_split == 1.0  # the odd tie goes to the side that is behind: 3 to 3
    table = blindtest.table({"blind": found}).loc["blind"]
    assert (table["wins"], table["win"], table["p"]) == (49, 0.49, found.p)


def test_results_can_be_read_counts_as_counts_and_small_p_values_as_such():
    row = blindtest.readable({"blind": counted(49, 24, 27), "clear": counted(300, 20, 30)})
    assert row.loc["blind", ["documents", "won", "tied", "lost"]].tolist() == [100, 49, 24, 27]
    assert row.loc["blind", "share won"] == "0.49 [0.39, 0.59]"
    assert row.loc["blind", "won to lost"].startswith("1.81 [")
    assert row.loc["blind", "p"] == "0.015"
    assert 0 < float(row.loc["clear", "p"]) < 1e-50


def test_extremes_are_finite_or_stated():
    assert counted(10, 0, 0).ratio.value == 10 and counted(10, 0, 0).p < 0.01
    none = counted(0, 0, 0)
    assert none.n == 0 and none.p == 1.0 and np.isnan(none.win.value)


def test_position_bias_is_found_where_there_is_one_and_only_there():
    def panel(lean):
        def judge(annotator, document, a, b, *, position):
            rng = np.random.default_rng(crc32(f"{annotator}/{document}/{a}".encode()))
            better = 0.5 if "grid" in a else -0.5  # the policy is better
            return dict.fromkeys(ASPECTS, int(np.sign(better + lean + rng.normal())))

        return blindtest.ask(
            blindtest.queues(asked(200, both_orders=1.0).comparisons, ["a", "b"], each=2, seed=0), judge
        )

    fair, leaning = (blindtest.position_bias(panel(lean), seed=0) for lean in (0.0, 0.6))
    assert fair.twice == leaning.twice == 400
    assert fair.p > 0.01 and fair.first.low < 0.5 < fair.first.high
    assert leaning.p < 1e-6 and leaning.first.low > 0.55
    assert leaning.same.value < fair.same.value


def test_an_order_that_was_asked_once_says_nothing_about_consistency():
    found = blindtest.position_bias(votes("+"), seed=0)
    assert found.twice == 0 and np.isnan(found.same.value) and found.first.value == 1.0


def test_judgements_are_shared_out_by_annotator():
    given_ = votes("+", "-", document="d0") + votes("+", "0", document="d1")
    table = blindtest.by_judgement([(v.annotator, v) for v in given_], "policy", seed=0).set_index(["name", "measure"])
    assert table.loc[("person-0", "win"), "value"] == 1.0
    assert table.loc["person-1", "value"].to_dict() == {"win": 0.0, "tie": 0.5, "loss": 0.5}
    assert (table["judgements"] == 2).all()


def test_judgements_go_into_the_statistics_of_agreement():
    laid = blindtest.frame(votes("+", "-", "0"))
    assert laid["preference"].tolist() == [1, -1, 0] and laid["total"].tolist() == [3, -3, 0]
    table = agreement.table(laid, aspects=ASPECTS, seed=0).set_index(["subject", "measure"])
    assert table.loc[("preference", "raw agreement"), "value"] == 0.0


def test_the_clearest_documents_come_first_on_either_side():
    comparisons = asked(3, seed=4).comparisons
    strength = {"d0": 1, "d1": -2, "d2": 2}
    given_ = [
        blindtest.vote(
            c, "a", 0, dict.fromkeys(ASPECTS, strength[c.document_id] * (1 if c.a_system == "policy" else -1))
        )
        for c in comparisons
    ]
    won, lost = blindtest.clearest(comparisons, given_, "policy", n=2)
    assert won["score"].tolist() == [6.0, 3.0] and won["document"].tolist() == [c.document for c in comparisons][::-2]
    assert lost["score"].tolist() == [-6.0]
    assert "grid" in won["policy"][0] and "grid" not in won["frontier"][0]


def test_more_annotators_do_not_narrow_what_documents_decide():
    """Ten copies of each judgement are no more information: documents are resampled."""
    few = [each for place in range(40) for each in votes("+-"[place % 2], document=f"d{place}")]
    many = [each for place in range(40) for each in votes(*"+-"[place % 2] * 10, document=f"d{place}")]
    widths = [
        blindtest.by_judgement([("all", each) for each in given_], "policy", seed=0).set_index("measure").loc["win"]
        for given_ in (few, many)
    ]
    assert widths[0]["high"] - widths[0]["low"] == pytest.approx(widths[1]["high"] - widths[1]["low"])
    assert blindtest.result(few, "policy").p == blindtest.result(many, "policy").p


def test_a_comparison_says_nothing_more_than_its_fields():
    with pytest.raises(ValueError, match="extra"):
        Comparison(**asked(1).comparisons[0].model_dump(), winner="policy")
