"""Records refuse what contradicts itself and keep one canonical order."""

import pytest
from pydantic import ValidationError

from erlib.task.schema import Brief, Document, Entity, Kind, Relationship, Report

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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entities": [{"name": "A", "type": "x"}] * 2}, "unique"),
        ({"relationships": [{"source": "A", "target": "A", "type": "r"}]}, "not an entity"),
        ({"entities": [{"name": " \x1c", "type": "x"}]}, "must not be empty"),
        ({"entities": [{"name": "\ud800", "type": "x"}]}, "lone surrogate"),
        ({"entities": [], "more": 1}, "Extra inputs"),
    ],
)
def test_reports_that_contradict_themselves_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Report.model_validate(fields)


def test_relationships_take_the_order_of_their_sources() -> None:
    a, b = Entity(name="A", type="x"), Entity(name="B", type="x")
    late, early = Relationship(source="B", target="A", type="r"), Relationship(source="A", target="B", type="r")
    assert Report(entities=[a, b], relationships=[late, early]).relationships == (early, late)


def test_facts_are_the_clauses_of_a_summary() -> None:
    assert Entity(name="A", type="x", summary="85 staff; ; loss-making;").facts == ("85 staff", "loss-making")


def test_a_document_keeps_its_text_as_it_is_but_no_lone_surrogates() -> None:
    assert Document(id="1", text=" a ").text == " a "
    with pytest.raises(ValidationError, match="lone surrogate"):
        Document(id="1", text="a\ud800")


def test_a_brief_states_each_wanted_type_once_and_may_refuse_it_in_another_role() -> None:
    person = Kind(type="person", description="acts for a company", example="Ada Bo")
    bystander = person.model_copy(update={"wanted": False})
    fields = BRIEF.model_dump() | {"entities": [person, bystander]}
    assert Brief.model_validate(fields).entity_types == {"person"}
    with pytest.raises(ValidationError, match="repeated: \\['person'\\]"):
        Brief.model_validate(fields | {"entities": [person, person]})
    with pytest.raises(ValidationError, match="at least one kind must be wanted"):
        Brief.model_validate(fields | {"entities": [bystander]})
    with pytest.raises(ValidationError, match="an end of 'makes' is no entity type: \\['gadget'\\]"):
        Brief.model_validate(
            fields | {"relationships": [BRIEF.relationships[0].model_copy(update={"target": "gadget"})]}
        )
