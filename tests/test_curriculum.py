"""Pre-training rows: what each kind holds, easy ones first, planted faults that the verdict counts."""

import random
import re
from itertools import islice

import pytest

from erlib import curriculum
from erlib.schema import parse_compact, to_compact
from erlib.synthetic import World


@pytest.fixture(scope="module")
def world():
    return World(3, exposure=0.8)


def text_of(row):
    return "".join("</s>" if text is None else text for text, _ in row["parts"])


def kind(row):
    text = text_of(row)
    if "</s>" in text:
        return "verdict"
    if "Report:\n" in text:
        return "example"
    return "list" if len(row["parts"]) == 2 else "pairs"  # no pair in a post without two names


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
    assert {"verdict", "pairs", "example"} <= set(kinds[3000:])

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


def test_a_verdict_counts_the_faults_of_its_draft(world):
    for row in islice((row for row in curriculum.rows(world) if kind(row) == "verdict"), 40):
        asked, draft, end, again, verdict = row["parts"]
        assert asked == again and end == (None, False) and [flag for _, flag in row["parts"]] == [False] * 4 + [True]
        total, missed, wrong = map(int, re.findall(r"\d+", verdict[0]))
        assert total == min(9, missed + wrong)
        assert parse_compact(draft[0]).valid


@pytest.mark.parametrize("count", [0, 1, 4])
def test_planted_faults_change_what_a_report_states(world, count):
    changed = 0
    for index in range(60):
        document, truth = world.post(index)
        report = truth.generic_report
        draft = curriculum.with_faults(random.Random(index), document.text, report, count=count)
        changed += to_compact(draft) != to_compact(report)
    assert changed == 0 if count == 0 else changed >= 45
