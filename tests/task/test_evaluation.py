"""Evaluation: scores of an LM's answers, its two failure modes, and one prompt against others."""

import pytest
from reading import BRIEF, GOLD, POOL, V1, V5, Reader, connect

from erlib.reports import extraction
from erlib.task import evaluation
from erlib.task.forms import parse_compact, to_compact
from erlib.task.schema import Document, Exemplar

PLACE = {"name": "Gardena", "type": "place"}


def test_comparison_gives_both_measures_and_the_two_failure_modes():
    lm, scored = connect(Reader()), GOLD[:6]
    runs = {v.name: extraction.evaluate(lm, scored, template=v, brief=BRIEF, demos=POOL[:5]) for v in (V1, V5)}
    table = evaluation.compare(runs, seed=0).set_index(["name", "measure"])["value"]
    # V1 reports the outlet too: 2 right of 3. Only the type `bought`, 2 of 6 relationships, is shown by the demos.
    assert table[V1.name, "entity F1"] == pytest.approx(0.8)
    assert table[V5.name, "entity F1"] == 1.0
    assert table[V5.name, "relationship F1"] == pytest.approx(0.5)
    modes = evaluation.failure_modes(runs, brief=BRIEF, seed=0).set_index(["name", "measure"])
    assert modes.loc[(V5.name, "salient fact recall"), "value"] == 0.5  # one of two facts
    assert modes.loc[(V5.name, "irrelevant items per document"), "value"] == 0.0
    assert modes.loc[(V1.name, "irrelevant items per document"), "value"] == 1.0
    assert modes.loc[(V5.name, "missed items per document"), "value"] == pytest.approx(4 / 6)
    assert (modes["low"] <= modes["value"]).all() and (modes["value"] <= modes["high"]).all()


def test_worst_answers_come_first_beside_their_gold():
    run = extraction.evaluate(connect(Reader()), GOLD[:3], template=V5, brief=BRIEF, demos=POOL[:5])
    table = evaluation.beside(run, brief=BRIEF)
    assert list(table["faults"]) == [1, 1, 0]
    assert table["listed"][0].startswith("missed: ") and table["document"][2] == GOLD[0].document.text
    assert table["gold"][0] == to_compact(GOLD[1].report)


def test_advantage_is_the_mean_of_both_f1_against_the_pooled_random_sets():
    lm, scored = connect(Reader()), GOLD[:6]
    best = extraction.evaluate(lm, scored, template=V5, brief=BRIEF, demos=[POOL[0], POOL[20], POOL[21]])
    others = [extraction.evaluate(lm, scored, template=V5, brief=BRIEF, demos=demos) for demos in (POOL[:3], POOL[3:6])]
    gain = evaluation.advantage(best, others, seed=0)
    assert gain.value == pytest.approx(((1 + 1) - (1 + 0.5)) / 2)
    assert gain.low <= gain.value <= gain.high


def test_predictions_survive_writing_and_reading(tmp_path):
    documents = [e.document for e in GOLD[:3]]
    predicted = [parse_compact(text) for text in ("A|firm|$1\n>bought|B\nB|firm", "none", "what?")]
    evaluation.write_predictions(tmp_path / "p.jsonl", documents, predicted)
    assert evaluation.read_predictions(tmp_path / "p.jsonl") == (documents, predicted)
    by_id = evaluation.read_by_id(tmp_path / "p.jsonl")
    assert by_id == {document.id: parsed for document, parsed in zip(documents, predicted, strict=True)}


# -- reports without gold -----------------------------------------------------------------------------------------

DOCUMENTS = [e.document for e in GOLD[:4]]
RIGHT = to_compact(GOLD[0].report)  # two firms and their relationship
WRITTEN = [parse_compact(text) for text in (RIGHT, "none", "what?\nand?", "A|firm\nwhat?")]


def test_items_and_defects_are_counted_per_answer():
    table = evaluation.item_counts(WRITTEN)
    assert table.to_numpy().tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 2], [1, 0, 1]]
    assert list(table.columns) == ["entities", "relationships", "defects"]


def test_reports_without_a_known_truth_are_ranked_by_defects_then_by_relationships():
    table = evaluation.ranked(DOCUMENTS[1:] + DOCUMENTS[:1], WRITTEN[1:] + WRITTEN[:1], brief=BRIEF)
    assert list(table["report"]) == [RIGHT, "none", "A|firm", "none"]
    assert list(table["faults"]) == [0, 0, 1, 2]
    assert table["defects"][3] == "unparsable: what?\nunparsable: and?"
    assert "true report" not in table


def test_where_the_truth_is_known_what_is_missed_or_too_much_is_a_fault_as_well():
    truths = {e.document.id: e.report for e in GOLD[:4]}
    table = evaluation.ranked(DOCUMENTS, WRITTEN, truths=truths, brief=BRIEF)
    assert list(table["document"]) == [DOCUMENTS[index].text for index in (0, 1, 2, 3)]
    # Nothing; three items missed; those and two bad lines; those, one bad line and a firm too many.
    assert list(table["faults"]) == [0, 3, 5, 5]
    assert table["true report"][2] == to_compact(GOLD[2].report)


# -- systems side by side -----------------------------------------------------------------------------------------


def two_systems():
    perfect = evaluation.evaluated(GOLD[:4], [parse_compact(to_compact(e.report)) for e in GOLD[:4]], BRIEF)
    silent = evaluation.evaluated(GOLD[:4], [parse_compact("none")] * 4, BRIEF)
    return {"perfect": perfect, "silent": silent}


def test_differences_are_paired_and_have_the_sign_of_the_first():
    table = evaluation.differences(two_systems(), [("perfect", "silent"), ("silent", "perfect")], seed=0)
    assert list(table["difference"]) == ["perfect minus silent"] * 2 + ["silent minus perfect"] * 2
    assert list(table["measure"]) == ["entity F1", "relationship F1"] * 2
    assert table[["value", "low", "high"]].to_numpy().tolist() == [[1.0] * 3] * 2 + [[-1.0] * 3] * 2


def test_the_share_of_documents_with_the_same_report_ignores_defects():
    same = evaluation.same_reports(WRITTEN, [parse_compact(text) for text in (RIGHT, "none", "none", "B|firm")])
    assert same.value == 0.75 and same.low < 0.75 < same.high


def test_what_a_corpus_does_not_have_is_left_out_instead_of_counting_as_nought_or_one():
    plain = [
        Exemplar(document=Document(id=f"d{n}", text="Gardena , Compton ."), report={"entities": [PLACE]})
        for n in (1, 2)
    ]
    right, wrong = parse_compact("Gardena|place"), parse_compact("Gardena|place\n>near|Compton\nCompton|place")
    runs = {
        "right": evaluation.evaluated(plain, [right] * 2, BRIEF),
        "wrong": evaluation.evaluated(plain, [wrong] * 2, BRIEF),
    }
    assert set(evaluation.compare(runs, seed=0)["measure"]) == {"entity F1"}
    assert "salient fact recall" not in set(evaluation.failure_modes(runs, brief=BRIEF, seed=0)["measure"])
    assert runs["right"].headline == 1.0 and runs["wrong"].headline == pytest.approx(2 / 3)
    assert evaluation.advantage(runs["right"], [runs["wrong"]], seed=0).value == pytest.approx(1 / 3)
    assert len(evaluation.differences(runs, [("right", "wrong")], seed=0)) == 1
    nothing = [Exemplar(document=Document(id="d", text="Good morning ."), report={"entities": []})]
    empty = {"right": evaluation.evaluated(nothing, [parse_compact("none")], BRIEF)}
    assert list(evaluation.compare(empty, seed=0)["value"]) == [1.0]  # nothing to find, nothing found
