"""The simulated panel: its utility follows the client's truth, its annotators err as stated."""

import itertools

import numpy as np
import pytest

from erlib.chain.manifest import ROOT
from erlib.documents import corpus, files
from erlib.judgements.annotation import Preference
from erlib.task import metrics
from erlib.task.forms import short_prompt, to_compact
from erlib.task.schema import ASPECTS
from erlib.world import panel, stream

BRIEF = files.read_brief(ROOT / "params" / "brief.yml")


@pytest.fixture(scope="module")
def samples():
    return stream.World(seed=3, brief=BRIEF).stream(120)


@pytest.fixture(scope="module")
def jury(samples):
    return panel.Panel(samples, BRIEF)


@pytest.fixture(scope="module")
def rich(samples):
    """A document with three wanted entities or more, an unwanted one, a relationship and two salient facts."""
    for sample in samples:
        report = sample.truth.report
        unwanted = [m for m in sample.truth.mentions if not m.wanted and m.type == "handle"]
        if (
            len(report.entities) > 2
            and report.relationships
            and unwanted
            and sum(len(e.facts) for e in report.entities) > 1
        ):
            return corpus.clean(sample.document.text), report, unwanted[0]
    raise AssertionError("no such document")


def total(utility):
    return sum(utility.values())


def test_the_true_report_is_without_fault_and_nothing_is_better(jury, samples):
    for sample in samples:
        text = corpus.clean(sample.document.text)
        assert jury.utility(text, to_compact(sample.truth.report)) == dict.fromkeys(ASPECTS, 0.0)
        assert total(jury.utility(text, to_compact(sample.truth.generic_report))) <= 0
        assert total(jury.utility(text, "none")) <= 0


def test_each_fault_costs_in_its_aspect(jury, rich):
    text, report, unwanted = rich
    lines = to_compact(report).split("\n")
    linked = next(line for line in lines if line.startswith(">"))
    fact = next(line for line in lines if line.count("|") == 2)
    entity = report.entities[0]
    swapped = f"{entity.name}|{'event' if entity.type != 'event' else 'place'}"
    faults = {
        "entities": [
            [*lines, f"{unwanted.name}|{unwanted.type}"],
            [*lines, "Nobody Ltd|organisation"],
            [*lines, "a line | that | cannot | be | read"],
            [swapped if line.split("|")[:2] == [entity.name, entity.type] else line for line in lines],
        ],
        "relationships": [[line for line in lines if line != linked], [*lines, ">left|Nobody Ltd"]],
        "summaries": [
            [line.rsplit("|", 1)[0] if line == fact else line for line in lines],
            [f"{line}; a lovely day" if line == fact else line for line in lines],
        ],
    }
    for aspect, reports in faults.items():
        for found in reports:
            utility = jury.utility(text, "\n".join(found))
            assert utility[aspect] < 0, (aspect, found)
            if aspect != "entities":  # a missed or wrong entity takes its relationships and facts along
                assert all(value == 0 for other, value in utility.items() if other != aspect), (aspect, found, utility)


def test_more_faults_are_worse(jury, rich):
    text, report, _ = rich
    names = [entity.name for entity in report.entities]
    worth = []
    for kept in range(len(names) + 1):
        few = report.model_copy(
            update={
                "entities": report.entities[:kept],
                "relationships": [r for r in report.relationships if {r.source, r.target} <= set(names[:kept])],
            }
        )
        worth.append(total(jury.utility(text, to_compact(few))))
    assert worth == sorted(worth) and worth[0] < worth[-1] == 0


@pytest.mark.parametrize("text", ["", "none", "|||", ">x|y", "a|b\x00|c\n" * 50, "\ud800|organisation", "𝕏" * 3000])
def test_any_text_can_be_judged(jury, samples, text):
    document = corpus.clean(samples[0].document.text)
    assert total(jury.utility(document, text)) <= 0
    scores = jury.judge("simulated-1", document, text, "none")
    assert set(scores) == set(ASPECTS) and all(score in (-2, -1, 0, 1, 2) for score in scores.values())


def test_an_unknown_document_is_refused_with_the_mend(jury):
    with pytest.raises(LookupError, match="annotators: people"):
        jury.utility("a post about nothing", "none")


@pytest.fixture(scope="module")
def questions(samples):
    """Pairs of the true report with one line less against one with another line less."""
    found = []
    for sample in samples:
        lines = to_compact(sample.truth.report).split("\n")
        less = ["\n".join(lines[:i] + lines[i + 1 :]) for i in range(len(lines))][:4]
        found += [(corpus.clean(sample.document.text), a, b) for a, b in itertools.combinations(less, 2) if a != b]
    return found


def preferences(jury, name, questions, **settings):
    return np.sign([total(jury.judge(name, *question, **settings)) for question in questions])


def test_the_same_question_gets_the_same_answer_and_another_seed_another(jury, samples, questions):
    again, other = panel.Panel(samples, BRIEF), panel.Panel(samples, BRIEF, seed=1)
    first = preferences(jury, "simulated-2", questions)
    assert (first == preferences(again, "simulated-2", questions)).all()
    assert (first != preferences(other, "simulated-2", questions)).any()


def test_reports_that_say_the_same_are_a_tie(jury, samples):
    text = corpus.clean(samples[1].document.text)
    report = to_compact(samples[1].truth.report)
    for name in jury.names:
        assert set(jury.judge(name, text, report, report).values()) == {0}


def test_annotators_find_the_better_report_more_often_than_not_and_the_careless_one_least(jury, questions):
    truth = np.sign([round(total(jury.utility(d, a)) - total(jury.utility(d, b)), 9) for d, a, b in questions])
    right = {}
    for name in jury.names:
        votes = preferences(jury, name, questions)
        known = (votes != 0) & (truth != 0)
        right[name] = (votes[known] == truth[known]).mean()
    assert len(questions) > 200
    assert all(right[name] > 0.7 for name in jury.names[:4])
    assert right["simulated-5"] == min(right.values()) > 0.5
    assert right["simulated-1"] - right["simulated-5"] > 0.15


def test_decided_annotators_agree_as_often_as_people_do(jury, questions):
    votes = np.array([preferences(jury, name, questions) for name in jury.names[:4]])
    pairs = [(a == b)[(a != 0) & (b != 0)].mean() for a, b in itertools.combinations(votes, 2)]
    assert 0.7 < np.mean(pairs) < 0.88


def test_a_tired_annotator_errs_more(jury, questions):
    truth = np.sign([total(jury.utility(d, a)) - total(jury.utility(d, b)) for d, a, b in questions])
    fresh, tired = (preferences(jury, "simulated-4", questions, position=n) for n in (0, 10_000))
    assert (tired == truth).mean() < (fresh == truth).mean()


def test_longer_texts_take_longer(jury):
    short, long = (jury.seconds("simulated-1", "a b c", "none", "x|y\n" * n) for n in (1, 40))
    assert long > short > 0


def test_the_world_finds_documents_by_id(samples):
    world = stream.World(seed=3, brief=BRIEF)
    parts = [*samples[40:43], *world.gold(3), *world.fresh(2), *world.out_of_distribution(2)]
    assert world.find([sample.document.id for sample in parts]) == parts
    for wrong in ("stream-12", "gold-x", "row-7", "", "stream-", "gold--01", "stream-٣"):
        with pytest.raises(LookupError, match="no document of the embedded world"):
            world.find([wrong])


def test_a_label_is_right_where_it_names_the_report_that_is_worth_more(jury, samples):
    """The true report against an empty one, in either order, tied, and against itself."""
    sample = next(sample for sample in samples if sample.truth.report.entities)
    text, best = corpus.clean(sample.document.text), to_compact(sample.truth.report)
    cases = [(best, "none", "A"), ("none", best, "B"), ("none", best, "A"), (best, "none", "tie"), (best, best, "tie")]
    labels = []
    for number, (a, b, preference) in enumerate(cases):
        labels.append(
            Preference(
                pair_id=str(number),
                document_id="d",
                split="test",
                checkpoint="c",
                prompt=short_prompt(text),
                a=a,
                b=b,
                a_ids=(),
                b_ids=(),
                preference=preference,
                score=0.0,
                votes=(),
                aspects={},
            )
        )
    assert jury.right(labels, texts={"d": text}) == metrics.wilson(2, 4)  # nothing is better than itself
