"""Both text forms of a report are lossless, and the parsers of model output are total."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from erlib.task.answers import parse_json
from erlib.task.forms import parse_compact, to_compact, to_json
from erlib.task.schema import Brief, Defect, Entity, Kind, Parsed, Relationship, Report

AWKWARD = [
    "none",
    ">",
    "> a",
    "|",
    "\\",
    "\\n",
    "a\nb",
    "a\r\nb",
    "\u2028",
    "\x1c.",
    "a\x85b",
    '"',
    "{",
    "]",
    "\0",
    "é",
    "🙂",
]
plain = st.text(max_size=12)  # any character but lone surrogates
names = st.one_of(st.sampled_from(AWKWARD), plain).filter(lambda text: text.strip())


@st.composite
def reports(draw) -> Report:
    keys = draw(st.lists(names.map(str.strip), max_size=5, unique=True))
    entities = [Entity(name=key, type=draw(names), summary=draw(plain)) for key in keys]
    ends = st.sampled_from(keys) if keys else st.nothing()
    links = draw(st.lists(st.builds(Relationship, source=ends, target=ends, type=names), max_size=5)) if keys else []
    return Report(entities=entities, relationships=list({link.key: link for link in links}.values()))


BRIEF = Brief(
    client="a desk",
    purpose="to know",
    summaries="short",
    entities=[
        Kind(type="organisation", description="a company", example="Korvex"),
        Kind(type="handle", description="an account", example="@bo", wanted=False),
    ],
    relationships=[Kind(type="makes", description="sells", example="Korvex makes the Loopa")],
)


def kinds(parsed: Parsed) -> list[str]:
    return [defect.kind for defect in parsed.defects]


# -- round trips --------------------------------------------------------------------------------------------------


@given(reports())
@settings(max_examples=200, deadline=None)
def test_both_forms_give_back_any_report_without_defects(report: Report) -> None:
    assert parse_json(to_json(report)) == (report, ())
    assert parse_compact(to_compact(report)) == (report, ())


@given(reports())
@settings(max_examples=100, deadline=None)
def test_json_is_also_plain_pydantic_and_one_line(report: Report) -> None:
    text = to_json(report)
    assert "\n" not in text
    assert Report.model_validate_json(text) == report


@given(reports())
@settings(max_examples=100, deadline=None)
def test_compact_has_a_line_an_item_and_no_blank_line_so_that_one_can_end_it(report: Report) -> None:
    lines = to_compact(report).split("\n")
    assert len(lines) == max(1, len(report.entities) + len(report.relationships))
    assert all(line.strip() for line in lines)


def test_the_compact_form_reads_as_documented() -> None:
    report = Report(
        entities=[
            Entity(name="Korvex", type="organisation", summary="85 staff; loss-making"),
            Entity(name="Loopa", type="product"),
        ],
        relationships=[Relationship(source="Korvex", target="Loopa", type="makes")],
    )
    assert to_compact(report) == "Korvex|organisation|85 staff; loss-making\n>makes|Loopa\nLoopa|product"
    assert len(to_compact(report)) < len(to_json(report)) / 2
    assert to_compact(Report()) == "none"


# -- total parsers ------------------------------------------------------------------------------------------------

anything = st.text(alphabet=st.characters(exclude_categories=[]), max_size=80)  # with lone surrogates
fragments = st.lists(
    st.sampled_from(
        [
            '{"entities": [',
            '"relationships": [',
            '{"name": "A", "type": "x"}',
            '"summary": null',
            ",",
            "]",
            "}",
            "NaN",
            "[[[",
            "none",
        ]
        + ["A|x|s", ">", ">r|A", "\n", "|", "\\", "\ud800", '"\\ud800"', "1e999", "\u2028"]
    ),
    max_size=14,
).map("".join)


@given(st.one_of(anything, fragments))
@example('{"ENTITIES":0]0\\uD800"0')  # half a character in what was repaired
@settings(max_examples=250, deadline=None)
def test_any_text_gives_a_report_that_survives_both_forms_and_defects_that_can_be_saved(text: str) -> None:
    for parse in (parse_json, parse_compact):
        parsed = parse(text, brief=BRIEF, document=text)
        assert parse_json(to_json(parsed.report)).report == parsed.report
        assert parse_compact(to_compact(parsed.report)).report == parsed.report
        json.dumps(parsed.defects, ensure_ascii=False).encode()


@given(reports(), st.data())
@settings(max_examples=150, deadline=None)
def test_what_was_complete_is_read_from_output_cut_off_anywhere(report: Report, data: st.DataObject) -> None:
    text = to_json(report)
    cut = data.draw(st.integers(0, len(text) - 1))
    parsed = parse_json(text[:cut])
    assert not parsed.valid
    assert parsed.report.entities == report.entities[: len(parsed.report.entities)]
    assert set(parsed.report.relationships) <= set(report.relationships)


def test_truncated_json_keeps_the_complete_items() -> None:
    text = (
        '{"entities": [{"name": "A", "type": "x"}, {"name": "B", "type": "x"}], "relationships": [{"source": "A", "ta'
    )
    parsed = parse_json(text)
    assert [entity.name for entity in parsed.report.entities] == ["A", "B"]
    assert parsed.defects == (Defect("unparsable", text),)


@pytest.mark.parametrize("parse", [parse_json, parse_compact])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "I cannot help with that.",
        "{}",
        "[]",
        "null",
        '{"entities": null}',
        '{"entities": NaN}',
        '{"entities": [], "entities": []}',
        '{"relationships": []}',
        '{"entities": [{"name": "\\ud800", "type": "x"}]}',
        '{"entities": [{"name": 5, "type": "x"}]}',
        '{"entities": ' + "[" * 100_000,
        '{"entities": ' * 100_000,
        '{"entities": [{"name": ' + "[" * 900 + "]" * 900 + ', "type": "x"}]}',
        '{"entities": [' + "9" * 10_000 + "]}",
        "x" * 1_000_000,
    ],
    ids=lambda text: repr(text[:40]) if isinstance(text, str) else "",
)
def test_what_is_no_report_is_unparsable_and_never_an_exception(parse, text: str) -> None:
    parsed = parse(text)
    assert not parsed.valid
    assert parsed.report == Report()
    assert all(len(defect.detail) <= 500 or "\\ud" in defect.detail for defect in parsed.defects)


def test_json_may_stand_in_a_code_fence_with_chatter_around_it() -> None:
    text = 'Sure {here}:\n```json\n{"entities": [{"name": "A", "type": "x", "summary": ""}], "relationships": []}\n```'
    assert parse_json(text) == (Report(entities=[Entity(name="A", type="x")]), ())


def test_an_unwritten_list_of_relationships_is_an_empty_one() -> None:
    assert parse_json('{"entities": []}') == (Report(), ())


def test_relationships_below_an_unreadable_entity_do_not_go_to_the_one_before() -> None:
    parsed = parse_compact("A|x\nno fields\n>r|A")
    assert parsed.report == Report(entities=[Entity(name="A", type="x")])
    assert kinds(parsed) == ["unparsable", "unparsable"]


def test_spaces_around_compact_fields_are_forgiven() -> None:
    parsed = parse_compact(" A | x | s \n > r | A \n\n")
    assert parsed.defects == ()
    assert parsed.report.relationships == (Relationship(source="A", target="A", type="r"),)


# -- defects ------------------------------------------------------------------------------------------------------


def test_each_defect_is_listed_and_only_what_cannot_stand_is_left_out() -> None:
    text = "\n".join(
        [
            "Korvex|organisation",
            ">makes|Loopa",
            ">sings|Korvex",
            ">sings|Korvex",
            "Korvex|handle|again",
            "@bo|handle",
            "Nowhere|organisation",
            "Korv|gadget",
            "just words",
        ]
    )
    parsed = parse_compact(text, brief=BRIEF, document="Korvex of @bo")
    assert sorted(parsed.defects) == [
        ("duplicate", "Korvex"),
        ("duplicate", "Korvex sings Korvex"),
        ("missing_entity", "Loopa"),
        ("ungrounded", "Nowhere"),
        ("unknown_type", "gadget"),
        ("unknown_type", "sings"),
        ("unparsable", "just words"),
    ]
    assert [entity.name for entity in parsed.report.entities] == ["Korvex", "@bo", "Nowhere", "Korv"]
    assert [link.type for link in parsed.report.relationships] == ["sings"]
    assert not parsed.valid


def test_without_brief_and_document_types_and_names_are_not_judged() -> None:
    assert parse_compact("Nowhere|gadget").defects == ()
