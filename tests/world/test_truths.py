"""Labelled documents of any corpus: simulated frontier and panel work on what their labels say."""

import json

import pytest

from erlib.documents import files
from erlib.reports.prompts import as_sent, templates
from erlib.task.answers import parse_json
from erlib.task.jsonl import write_jsonl
from erlib.task.schema import Brief, Document
from erlib.world import truths
from erlib.world.frontier import Frontier
from erlib.world.panel import Panel
from erlib.world.stream import World

NAMES = [f"{first} {last}" for first in ("Ada", "Ben", "Cleo", "Dora", "Emil") for last in ("Morn", "Quist", "Rudd")]
ROWS = [
    {
        "id": f"row{n}",
        "text": f"{name} , a critic , wrote on Monday that the paper Tide {n} moved to Ulver {n} .",
        "entities": [
            {"name": name, "type": "Peop"},
            {"name": f"Tide {n}", "type": "Org"},
            {"name": f"Ulver {n}", "type": "Loc"},
            {"name": "Monday", "type": "Weekday"},
        ],
        "relations": [{"source": f"Tide {n}", "target": f"Ulver {n}", "type": "OrgBased_In"}],
    }
    for n, name in enumerate(NAMES)
]


@pytest.fixture(scope="module")
def brief():
    return files.read_brief("params/brief-conll04.yml")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n", encoding="utf-8")
    return path


def labelled(path, tmp_path):
    documents = files.read_documents(path, rejects=tmp_path / "rejects.jsonl")
    return files.read_labels(path, documents)


def test_labels_are_read_whatever_a_benchmark_calls_its_relationships(corpus, tmp_path):
    labels = labelled(corpus, tmp_path)
    assert list(labels.exemplars) == [row["id"] for row in ROWS] and labels.left_out == {}
    report = labels.exemplars["row0"].report
    assert [entity.name for entity in report.entities] == ["Ada Morn", "Tide 0", "Ulver 0", "Monday"]
    assert report.relationships[0].key == ("Tide 0", "OrgBased_In", "Ulver 0")


def test_what_a_report_cannot_hold_is_left_out_and_counted(tmp_path):
    row = ROWS[0] | {
        "entities": [*ROWS[0]["entities"], {"name": "Ada Morn", "type": "Org"}, {"name": "Nobody", "type": "Peop"}],
        "relations": [{"source": "Nobody", "target": "Ulver 0", "type": "Live_In"}, *ROWS[0]["relations"] * 2],
    }
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    labels = labelled(path, tmp_path)
    assert labels.left_out == {"duplicate": 2, "ungrounded": 1, "missing_entity": 1}
    assert len(labels.exemplars["row0"].report.entities) == 4
    assert len(labels.exemplars["row0"].report.relationships) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "a", "text": "Ada Morn left."}, "documents.jsonl:1: no list 'entities'.*set `frontier` to an endpoint"),
        (
            {"id": "a", "text": "Ada.", "entities": [{"name": "Ada"}]},
            "documents.jsonl:1: an entity needs name and type",
        ),
        (
            {"id": "a", "text": "Ada.", "entities": [], "relations": ["x"]},
            "documents.jsonl:1: .*source, type and target",
        ),
    ],
)
def test_a_document_without_labels_is_an_error_that_names_the_line(tmp_path, row, said):
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        labelled(path, tmp_path)


def test_the_frontier_makes_faults_on_them_and_the_labels_none(corpus, tmp_path, brief):
    samples = truths.samples(list(labelled(corpus, tmp_path).exemplars.values()), brief=brief)
    template = as_sent(templates(brief)[-1], "json")
    wanted = [sample.truth.report for sample in samples]
    assert all("Monday" not in {entity.name for entity in report.entities} for report in wanted)  # no type of the brief

    def written(**how):
        frontier = Frontier(samples, brief, **how)
        reading = frontier._read_prompt(template, ())
        return [frontier.answer(sample.document.text, reading) for sample in samples]

    exact = [parse_json(text).report for text in written(faultless=True)]
    assert exact == wanted
    faulty = [parse_json(text).report for text in written()]
    assert written() == written()
    assert sum(report != truth for report, truth in zip(faulty, wanted, strict=True)) >= 2
    kinds = {entity.type for report in faulty for entity in report.entities}
    assert kinds <= {*brief.entity_types, "Weekday"}


def test_the_panel_prefers_the_labels(corpus, tmp_path, brief):
    samples = truths.samples(list(labelled(corpus, tmp_path).exemplars.values()), brief=brief)
    panel = Panel(samples, brief)
    text = samples[0].document.text
    whole = "Ada Morn|Peop\nTide 0|Org\n>OrgBased_In|Ulver 0\nUlver 0|Loc"
    assert panel.utility(text, whole) == {"entities": 0.0, "relationships": 0.0, "summaries": 0.0}
    part = panel.utility(text, "Ada Morn|Peop")
    assert part["entities"] < 0 and part["relationships"] < 0 and part["summaries"] == 0.0
    assert panel.judge("simulated-1", text, whole, "none")["entities"] > 0
    assert panel.judge("simulated-1", text, whole, "none")["summaries"] == 0  # there are none: nobody sees a difference


def test_truths_are_found_where_phase_02_left_them_else_in_the_embedded_world(corpus, tmp_path, brief):
    folder = tmp_path / "02_corpus"
    folder.mkdir()
    manifest = {"params": {"frontier": "simulated", "seed": 3, "documents": str(corpus)}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with open("params/brief.yml", encoding="utf-8"):
        own = files.read_brief("params/brief.yml")
    assert truths.find(folder, ["stream-000004"], brief=own) == World(seed=3, brief=own).find(["stream-000004"])
    write_jsonl(folder / truths.FILE, labelled(corpus, tmp_path).exemplars.values())
    found = truths.find(folder, ["row2", "row1"], brief=brief)
    assert [sample.document.id for sample in found] == ["row2", "row1"]
    with pytest.raises(LookupError, match="labels.jsonl has no labels of 'stream-000004'"):
        truths.find(folder, ["stream-000004"], brief=brief)
    (folder / "manifest.json").write_text(json.dumps({"params": {"frontier": "gpt-4o", "seed": 3}}))
    assert truths.find(folder, ["row1"], brief=brief) == []


def test_a_brief_may_want_no_relationships():
    kind = {"type": "location", "description": "A place.", "example": "Redondo Beach"}
    found = Brief(client="a", purpose="b", summaries="none", entities=[kind], relationships=[])
    assert found.relationship_types == frozenset()
    sample = truths.samples(
        [
            files.Exemplar(
                document=Document(id="a", text="Gardena , now ."),
                report={"entities": [{"name": "Gardena", "type": "location"}]},
            )
        ],
        brief=found,
    )[0]
    assert Panel([sample], found).utility(sample.document.text, "none")["entities"] < 0


def test_labels_of_rejected_rows_are_not_taken(tmp_path):
    rows = [
        {**ROWS[0], "id": 1.5},
        {**ROWS[0], "text": ""},
        {"id": "row0", "text": None},
        ROWS[0] | {"relations": None},
    ]
    path = tmp_path / "documents.JSONL"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    documents = files.read_documents(path, rejects=tmp_path / "rejects.jsonl", max_reject_share=1.0)
    labels = files.read_labels(path, documents)
    assert labels.left_out == {} and len(labels.exemplars["row0"].report.entities) == 4
