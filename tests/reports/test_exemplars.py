"""Exemplars: disjoint splits, decided by their seed."""

import random

import pytest
from reading import GOLD, exemplar

from erlib.reports import exemplars
from erlib.task.schema import Document, Exemplar


def test_splits_are_complete_and_disjoint_by_id_and_text():
    copies = [
        Exemplar(document=Document(id=f"copy-{i}", text=e.document.text.upper() + " "), report=e.report)
        for i, e in enumerate(GOLD[:10])
    ]
    divided = exemplars.split(GOLD + copies, seed=3)
    assert sorted(e.document.id for e in divided) == sorted(e.document.id for e in GOLD + copies)
    texts = [{e.document.text.casefold().strip() for e in exemplars.part(divided, name)} for name in exemplars.SPLITS]
    assert all(texts) and not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert divided == exemplars.split(GOLD + copies, seed=3) != exemplars.split(GOLD + copies, seed=4)


def test_105_exemplars_split_into_35_30_and_40():
    divided = exemplars.split([exemplar(number) for number in range(105)], seed=0)
    assert [len(exemplars.part(divided, name)) for name in ("pool", "dev", "test")] == [35, 30, 40]


def test_a_repeated_id_is_refused():
    with pytest.raises(ValueError, match="gold-000"):
        exemplars.split([GOLD[0], GOLD[0]], seed=0)


def test_splits_and_draws_do_not_touch_the_global_random_state():
    random.seed(5)
    before = random.getstate()
    exemplars.random_sets(GOLD, seed=1)
    exemplars.split(GOLD, seed=1)
    assert random.getstate() == before


def test_a_part_that_the_file_names_stays_and_gets_no_others():
    gold = [exemplar(n) for n in range(30)]
    named = [each.model_copy(update={"split": "test"} if n < 10 else {}) for n, each in enumerate(gold)]
    divided = exemplars.split(named, seed=0)
    assert {e.document.id for e in exemplars.part(divided, "test")} == {e.document.id for e in gold[:10]}
    assert len(exemplars.part(divided, "pool")) + len(exemplars.part(divided, "dev")) == 20
    with pytest.raises(ValueError, match="0 exemplars name no part, and open are: pool, dev"):
        exemplars.split(named[:10], seed=0)
    twin = named[0].model_copy(update={"split": None, "document": named[0].document.model_copy(update={"id": "twin"})})
    with pytest.raises(ValueError, match="'twin' repeats the text"):
        exemplars.split([*named, twin], seed=0)
