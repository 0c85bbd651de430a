"""Pre-training rows: what each kind holds, easy ones first."""

from itertools import islice

import pytest

from erlib.documents import corpus
from erlib.world import curriculum
from erlib.world.stream import World


@pytest.fixture(scope="module")
def world():
    return World(3, exposure=0.8)


def text_of(row):
    return "".join(text for text, _ in row["parts"])


def kind(row):
    if "Report:\n" in text_of(row):
        return "example"
    if len(row["parts"]) == 2:
        return "list"
    return "pairs" if " > " in row["parts"][1][0] else "facts"


def test_rows_hold_every_type_in_both_forms_and_no_brief(world):
    texts = [text_of(row) for row in islice(curriculum.rows(world, long_share=0.0), 4000, 4600)]
    together = "".join(texts)
    for type_ in ("organisation", "person", "place", "product", "event", "outlet", "handle", "date"):
        assert f"|{type_}" in together and f'"{type_}"' in together
    long = next(row for row in curriculum.rows(world, long_share=1.0) if kind(row) == "example")["parts"]
    assert sum(is_target for _, is_target in long) >= 3


def test_lists_and_short_posts_come_first_and_the_same_world_gives_the_same_rows(world):
    rows = list(islice(curriculum.rows(world), 4000))
    kinds = [kind(row) for row in rows]
    assert kinds[:300].count("list") > 150 > 0 == kinds[curriculum.LIST_ROWS :].count("list")
    assert {"pairs", "facts", "example"} == set(kinds[3000:])

    def longest(part):
        return max(len(text_of(row)) for row in part if kind(row) == "pairs")

    assert longest(rows[:500]) < longest(rows[3500:])
    assert rows[:200] == list(islice(curriculum.rows(World(3, exposure=0.8)), 200))


def test_pairs_say_how_two_names_are_related_in_that_order(world):
    rows = [row for row in islice(curriculum.rows(world, pair_share=0.9), 3000, 3200) if kind(row) == "pairs"]
    answers = [text for row in rows for text, is_target in row["parts"] if is_target]
    assert {"none", "uses", "acquired"} <= set(answers)
    for row in rows:
        post = row["parts"][0][0]
        for asked, _ in row["parts"][1::2]:
            source, target = asked.strip().removesuffix(":").split(" > ")
            assert source in post and target in post


def test_facts_are_told_of_the_name_that_is_asked_about_and_of_no_other(world, monkeypatch):
    monkeypatch.setattr(curriculum, "LIST_SHARE", 0.0)
    monkeypatch.setattr(curriculum, "SHORTEST", 100_000)
    rows = [row for row in islice(curriculum.rows(world, fact_share=0.7), 100) if kind(row) == "facts"]
    posts = {corpus.clean(sample.document.text): sample.truth.generic_report for sample in world.stream(400)}
    told = 0
    for row in rows:
        facts = {entity.name: entity.summary or "none" for entity in posts[row["parts"][0][0].strip()].entities}
        answers = [text for text, is_target in row["parts"] if is_target]
        asked = [text.strip().removesuffix(":") for text, _ in row["parts"][1::2]]
        assert dict(zip(asked, answers, strict=True)) == facts
        told += len(answers) - answers.count("none")
    assert len(rows) > 40 and told > len(rows)
