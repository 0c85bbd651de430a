"""Selection of exemplars: a search that beats its baselines, no demo scored on itself."""

import pytest
from reading import BRIEF, GOLD, POOL, V5, VERBS, Reader, connect

from erlib.reports import exemplars, extraction, selector
from erlib.task.schema import Document, Exemplar


def test_a_demo_is_never_scored_on_itself():
    shout = Document(id="other", text=GOLD[1].document.text.upper())
    for demo in (GOLD[1], Exemplar(document=shout, report=GOLD[1].report)):
        with pytest.raises(ValueError, match="both shown and scored"):
            extraction.evaluate(connect(Reader()), GOLD[:3], template=V5, brief=BRIEF, demos=[demo])
    with pytest.raises(ValueError, match="both shown and scored"):
        selector.select(connect(Reader()), GOLD[:9], GOLD[8:], template=V5, brief=BRIEF, seed=0)


def test_the_selector_finds_the_set_that_covers_every_type():
    lm = connect(Reader())
    selection = selector.select(lm, POOL, GOLD[:18], template=V5, brief=BRIEF, k=3, sets=6, swaps=60, seed=1)
    types = {r.type for e in selection.exemplars for r in e.report.relationships}
    assert types == set(VERBS)
    best = extraction.evaluate(lm, GOLD[:18], template=V5, brief=BRIEF, demos=selection.exemplars).headline
    assert best == 1.0
    baseline = exemplars.random_sets(POOL, k=3, draws=4, seed=0)
    scores = [extraction.evaluate(lm, GOLD[:18], template=V5, brief=BRIEF, demos=demos).headline for demos in baseline]
    assert sum(scores) / len(scores) < best


def test_the_selection_is_decided_by_its_seed_and_keeps_to_its_number_of_calls():
    results, engines = [], [Reader(), Reader()]
    for engine in engines:
        selection = selector.select(
            connect(engine), POOL, GOLD[:12], template=V5, brief=BRIEF, k=3, sets=6, swaps=5, seed=7, threads=4
        )
        results.append((selection.exemplars, list(selection.history["score"])))
    assert results[0] == results[1]
    assert len(engines[0].requests) <= selector.selection_calls(len(POOL), 12, sets=6, swaps=5, k=3)


def test_sets_compete_on_documents_that_none_of_them_shows():
    class Spy(Reader):
        def complete(self, request):
            texts = [message.text for message in request.messages if message.role == "user"]
            assert texts[-1] not in texts[:-1]
            return super().complete(request)

    selection = selector.select(connect(Spy()), POOL, GOLD[:8], template=V5, brief=BRIEF, k=3, sets=4, swaps=6, seed=2)
    pairs = selection.history[selection.history["stage"] == "swap search"]
    for start in range(0, len(pairs), 2):
        best, trial = pairs.iloc[start], pairs.iloc[start + 1]
        shown = {*best["exemplars"].split(", "), *trial["exemplars"].split(", ")}
        assert len(shown) == 4 and best["documents"] == trial["documents"] == 8 + len(POOL) - 4
        assert best["margin"] == -trial["margin"]


def test_too_small_a_pool_is_refused():
    with pytest.raises(ValueError, match="5 exemplars cannot be chosen from a pool of 3"):
        selector.select(connect(Reader()), GOLD[:3], GOLD[3:], template=V5, brief=BRIEF, seed=0)


def test_baselines_take_k_different_exemplars_of_the_pool():
    sets = [*exemplars.random_sets(GOLD, draws=3, seed=0), selector.labeled_few_shot(GOLD)]
    assert all(len({e.document.id for e in demos}) == 5 and set(demos) <= set(GOLD) for demos in sets)
    assert sets[3] == selector.labeled_few_shot(GOLD) and len(set(sets[:3])) == 3
