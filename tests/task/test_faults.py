"""Faults of teacher and students: rates by kind, and which of the teacher's own faults a student repeats."""

import numpy as np
import pytest

from erlib.task import evaluation, faults
from erlib.task.schema import Brief, Document, Entity, Exemplar, Kind, Parsed, Relationship, Report

BRIEF = Brief(
    client="Quay Desk",
    purpose="It watches firms.",
    summaries="Money first.",
    entities=(
        Kind(type="firm", description="A firm.", example="Ardox"),
        Kind(type="outlet", description="A newspaper.", example="Reed", wanted=False),
    ),
    relationships=(Kind(type="bought", description="Bought.", example="A bought B"),),
)
TEXT = "Ardox bought Belum, says Reed."


def report(*names, bought=False):
    entities = tuple(Entity(name=name, type="outlet" if name == "Reed" else "firm") for name in names)
    links = (Relationship(source="Ardox", target="Belum", type="bought"),) if bought else ()
    return Report(entities=entities, relationships=links)


GOLD = [
    Exemplar(document=Document(id=f"d{i}", text=TEXT), report=report("Ardox", "Belum", bought=True)) for i in (0, 1)
]
RIGHT = report("Ardox", "Belum", bought=True)
NO_LINK = report("Ardox", "Belum")
OUTLET = report("Ardox", "Belum", "Reed", bought=True)


def answered(*reports):
    return evaluation.evaluated(GOLD, [Parsed(each, ()) for each in reports], BRIEF)


@pytest.fixture
def systems():
    """The teacher misses the link in both documents; SFT does so in one and adds the outlet in the other."""
    return {
        "frontier": answered(NO_LINK, NO_LINK),
        "SFT": answered(NO_LINK, OUTLET),
        "policy": answered(RIGHT, RIGHT),
    }


def test_faults_are_named_by_what_is_wrong_with_what(systems):
    found = faults.found(systems["SFT"], BRIEF)
    assert found[["document", "fault"]].to_numpy().tolist() == [[0, "relationship, missed"], [1, "entity, irrelevant"]]


def test_faults_are_counted_per_document_by_kind(systems):
    table = faults.per_document(systems, brief=BRIEF)
    assert table.loc["missed"].to_dict() == {"frontier": 1.0, "SFT": 0.5, "policy": 0.0}
    assert table.loc["irrelevant"].to_dict() == {"frontier": 0.0, "SFT": 0.5, "policy": 0.0}


def test_rates_are_means_per_document_and_the_most_frequent_kind_comes_first(systems):
    table = faults.rates(systems, brief=BRIEF, seed=0)
    assert list(dict.fromkeys(table["measure"])) == ["relationship, missed", "entity, irrelevant"]
    value = table.set_index(["name", "measure"])["value"]
    assert value["frontier"].tolist() == [1.0, 0.0]
    assert value["SFT"].tolist() == [0.5, 0.5]
    assert value["policy"].tolist() == [0.0, 0.0]
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_a_student_repeats_the_same_fault_of_the_same_document(systems):
    table = faults.inherited(systems, teacher="frontier", students=["SFT", "policy"], brief=BRIEF, seed=0)
    missed = table.loc["relationship, missed"]
    assert missed["of the frontier"] == 2
    assert (missed["repeated by SFT"], missed["repeated by policy"]) == (0.5, 0.0)
    assert missed["policy minus SFT, per document"] == -0.5
    own = table.loc["entity, irrelevant"]
    assert own["of the frontier"] == 0
    assert np.isnan(own["repeated by SFT"])
    assert own["policy minus SFT, per document"] == -0.5


def test_the_same_kind_of_fault_on_another_item_is_not_inherited():
    systems = {"frontier": answered(report("Ardox"), RIGHT), "SFT": answered(report("Belum"), RIGHT)}
    table = faults.inherited(systems, teacher="frontier", students=["SFT"], brief=BRIEF, seed=0)
    assert table.loc["entity, missed", "of the frontier"] == 1
    assert table.loc["entity, missed", "repeated by SFT"] == 0.0
    assert table.loc["relationship, missed", "repeated by SFT"] == 1.0


def test_without_any_fault_the_tables_are_empty():
    perfect = {"frontier": answered(RIGHT, RIGHT), "SFT": answered(RIGHT, RIGHT)}
    assert faults.rates(perfect, brief=BRIEF, seed=0).empty
    assert faults.inherited(perfect, teacher="frontier", students=["SFT"], brief=BRIEF, seed=0).empty
