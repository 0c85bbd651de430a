"""Answers that nearly keep to the form: what is plainly meant is taken, each repair is listed, drafts never count."""

import json
import time

import pytest

from erlib.task.answers import parse_json
from erlib.task.forms import to_json
from erlib.task.schema import Brief, Defect, Entity, Kind, Relationship, Report

REPORT = Report(
    entities=[
        Entity(name="Orrin Vale", type="person", summary="left"),
        Entity(name="Tessaro Mills", type="organisation"),
    ],
    relationships=[Relationship(source="Orrin Vale", target="Tessaro Mills", type="works_for")],
)
GOOD = to_json(REPORT)
DRAFT = '{"entities": [{"name": "Draft", "type": "person", "summary": ""}], "relationships": []}'
ITEM = '{"name": "Orrin Vale", "type": "person", "summary": ""}'


def repairs(parsed):
    return [detail for kind, detail in parsed.defects if kind == "repaired"]


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        (GOOD, ""),
        (f"Here it is:\n```json\n{GOOD}\n```\nAnything else?", ""),
        (f"<think>maybe {DRAFT}? no</think>\n{GOOD}", ""),
        (f"<thinking>\n{DRAFT}\n</thinking>{GOOD}", ""),
        (f"it starts without a mark {DRAFT}</think>{GOOD}", ""),
        (f"{GOOD}\n\nDocument:\nNext one.\nReport:\n{DRAFT}", ""),
        (f'Format: {{"entities": [], "relationships": []}}\n{GOOD}', "the last of 2 reports"),
        (f"Draft: {DRAFT}\nFinal: {GOOD}", "the last of 2 reports"),
        ('{"report": ' + GOOD + "}", "taken out of the object around it"),
        ('{"answer": {"report": ' + GOOD + "}}", "taken out of the object around it"),
        ("[" + GOOD + "]", ""),
        ('{"reasoning": "two names", ' + GOOD[1:], "left out: "),
        (GOOD.replace('"left"', '"le\nft"').replace("le\nft", "left\n"), "a line break inside a text"),
        (GOOD.replace('""}], "rel', '""},], "rel'), "a comma before a closing bracket"),
        (GOOD.replace('"summary": ""', '"summary": null'), "a summary of null"),
        (GOOD.replace('"summary": "left"', '"summary": ["left"]'), "a summary as a list"),
        (GOOD.replace('"summary": ""', '"summary": "", "confidence": 0.9'), "left out of an item: confidence"),
        (
            GOOD.replace('"target": "Tessaro Mills"', '"target": "tessaro  mills"'),
            "an end in another case: tessaro  mills",
        ),
        (
            GOOD.replace('"entities"', '"Entities"').replace('"relationships"', '"Relationships"'),
            "keys in another case",
        ),
        (GOOD.replace('"name"', '"Name"'), "keys in another case"),
        (GOOD.replace('"', "'"), "JSON that was not written as JSON is"),
        (GOOD.replace('{"entities"', "{entities").replace("entities:", "entities:"), "JSON that was not written"),
        (GOOD.replace('], "rel', '], // the rest\n "rel'), "JSON that was not written"),
    ],
)
def test_what_is_plainly_meant_is_taken_and_each_repair_is_listed(text, repaired):
    parsed = parse_json(text)
    assert parsed.report == REPORT
    assert parsed.valid
    assert [defect.kind for defect in parsed.defects] == ["repaired"] * len(parsed.defects)
    if repaired:
        assert any(repair.startswith(repaired) for repair in repairs(parsed)), repairs(parsed)
    else:
        assert not parsed.defects


@pytest.mark.parametrize("text", [f"<think>\nmaybe {DRAFT}", f"{'<think>' * 3}{DRAFT}", "<think></think>", "</think>"])
def test_who_never_stopped_thinking_has_not_answered(text):
    parsed = parse_json(text)
    assert parsed.report == Report() and not parsed.valid


def test_marks_of_thinking_inside_a_name_are_a_name():
    report = Report(entities=[Entity(name="<think>Loopa</think>", type="product", summary="</think>")])
    assert parse_json(to_json(report)) == (report, ())


def test_a_bad_item_leaves_its_neighbours_alone():
    items = json.loads(GOOD)["entities"]
    for bad in ({"name": "no type"}, "a text", 7, None, {"name": ["x"], "type": "y"}):
        parsed = parse_json(json.dumps({"entities": [items[0], bad, items[1]], "relationships": []}))
        assert parsed.report.entities == REPORT.entities
        assert [defect.kind for defect in parsed.defects] == ["unparsable"]


def test_a_loop_that_was_cut_off_keeps_the_first_and_is_no_whole_answer():
    parsed = parse_json('{"entities": [' + f"{ITEM}, " * 300)
    assert [entity.name for entity in parsed.report.entities] == ["Orrin Vale"]
    assert not parsed.valid
    assert sum(defect.kind == "duplicate" for defect in parsed.defects) == 299


@pytest.mark.parametrize("cut", [len(ITEM) + 14, len(ITEM) + 15, len(ITEM) + 20])
def test_an_answer_that_breaks_off_is_never_closed_for_it(cut):
    parsed = parse_json(('{"entities": [' + f"{ITEM}, " * 2)[:cut])
    assert [entity.name for entity in parsed.report.entities] == ["Orrin Vale"]
    assert not parsed.valid and not repairs(parsed)


BRIEF = Brief(
    client="a desk",
    purpose="to know",
    summaries="short",
    entities=[Kind(type=kind, description="one", example="x") for kind in ("person", "organisation", "Org", "org")],
    relationships=[Kind(type="works_for", description="is employed", example="A of B")],
)


def test_types_are_written_as_the_brief_writes_them_where_only_one_can_be_meant():
    text = GOOD.replace('"person"', '"Person"').replace('"organisation"', '"ORG"').replace("works_for", "Works_For")
    parsed = parse_json(text, brief=BRIEF)
    assert [entity.type for entity in parsed.report.entities] == ["person", "ORG"]  # Org or org: who knows
    assert parsed.report.relationships[0].type == "works_for"
    assert repairs(parsed) == ["a type in another case: Person", "a type in another case: Works_For"]
    assert Defect("unknown_type", "ORG") in parsed.defects


def test_an_end_that_could_be_two_entities_is_missing():
    both = GOOD.replace('"Orrin Vale", "type"', '"TESSARO MILLS", "type"', 1)
    text = both.replace('"source": "Orrin Vale"', '"source": "tessaro mills"')
    parsed = parse_json(text)
    assert parsed.report.relationships == ()
    assert Defect("missing_entity", "tessaro mills") in parsed.defects


@pytest.mark.parametrize(
    "text",
    [
        "{" * 1_000_000,
        '{"a": ' * 200_000,
        '{"entities": [' + "{'a': " * 15_000 + "}" * 15_000 + "]}",
        '{"entities": "' + "\\" * 500_000,
        "<think>" * 150_000,
        "</think" * 150_000,
        f"{DRAFT}\n" * 10_000,
        ('{"entities": [' + f"{ITEM}, " * 20_000),
    ],
    ids=lambda text: text[:20],
)
def test_a_megabyte_of_anything_is_read_in_seconds(text):
    began = time.process_time()
    parse_json(text)
    assert time.process_time() - began < 20  # a quadratic reading takes hours
