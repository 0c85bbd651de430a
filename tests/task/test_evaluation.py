"""Evaluation: scores of an LM's answers, its two failure modes, and one prompt against others."""

import pytest
from test_extraction import BRIEF, GOLD, POOL, V1, V5, Reader, connect

from erlib.reports import extraction
from erlib.task import evaluation
from erlib.task.forms import parse_compact, to_compact


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
    assert modes.loc[(V5.name, "irrelevant items a document"), "value"] == 0.0
    assert modes.loc[(V1.name, "irrelevant items a document"), "value"] == 1.0
    assert modes.loc[(V5.name, "missed items a document"), "value"] == pytest.approx(4 / 6)
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
