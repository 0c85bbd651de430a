"""Confirmation: which run is confirmed, what it has read, and the results of each run and of all."""

import json

import pytest

from erlib.chain.manifest import RunError
from erlib.judgements import confirmation, contests
from erlib.task.schema import Document, Entity, Exemplar, Report


def exemplar(name, text="Korvex bought Velia."):
    return Exemplar(document=Document(id=name, text=text), report=Report(entities=(), relationships=()))


@pytest.fixture
def runs(tmp_path):
    """Two finished runs of one name in two places, with a corpus of two documents and one gold exemplar each."""
    for place in ("one", "two"):
        root = tmp_path / place / "tiny"
        params = {
            "01_prompts": {},
            "02_corpus": {"seed": 7, "frontier": "simulated"},
            "03_sft": {"local_model": "embedded"},
            "round-3/07_ppo": {f"{x}_dir": str(root / y) for x, y in (
                ("prompts", "01_prompts"), ("corpus", "02_corpus"), ("sft", "03_sft"))},
        }  # fmt: skip
        for label, values in params.items():
            (root / label).mkdir(parents=True)
            (root / label / "manifest.json").write_text(json.dumps({"params": values}))
        known = [Document(id="a", text="A first post."), Document(id="b", text="A second post.")]
        lines = "".join(document.model_dump_json() + "\n" for document in known)
        (root / "02_corpus/documents.jsonl").write_text(lines)
        (root / "01_prompts/gold.jsonl").write_text(exemplar("g", "Gold text.").model_dump_json() + "\n")
    return [tmp_path / place / "tiny/round-3/07_ppo" for place in ("one", "two")]


def test_a_run_is_found_through_its_last_policy_and_two_of_one_name_are_told_apart(runs):
    first = confirmation.finished(runs[0])
    second = confirmation.finished(runs[1], used=[first.name])
    assert (first.name, second.name) == ("tiny", "tiny 2")
    assert (first.base, first.seed, first.policy) == ("embedded", 7, runs[0] / "merged")
    assert first.sft == runs[0].parents[1] / "03_sft/merged"


def test_an_unfinished_run_is_refused_by_name(runs):
    (runs[0].parents[1] / "03_sft/manifest.json").unlink()
    with pytest.raises(RunError, match="03_sft holds no complete phase"):
        confirmation.finished(runs[0])


def test_texts_of_corpus_and_gold_count_as_read_whatever_their_case(runs):
    run = confirmation.finished(runs[0])
    texts = {"x": "a FIRST post.", "y": "gold TEXT.", "z": "A third post."}
    unread = [Document(id=name, text=text) for name, text in texts.items()]
    assert confirmation.read_before(run, unread) == ["x", "y"]


def test_results_are_counted_for_each_run_and_for_all_of_them(runs):
    first = confirmation.finished(runs[0])
    second = confirmation.finished(runs[1], used=[first.name])
    finished = [first, second]
    documents = [e.document for run in finished for e in confirmation.labelled([exemplar("d1"), exemplar("d2")], run)]
    assert [document.id for document in documents] == ["tiny/d1", "tiny/d2", "tiny 2/d1", "tiny 2/d2"]
    full = Report(entities=(Entity(name="Korvex", type="organisation"),), relationships=())
    empty = Report(entities=(), relationships=())
    # The policy is right on the first run's documents; on the second's it is right once and writes the same once.
    reports = {"policy": [full, full, full, empty], "frontier": [empty, empty, empty, empty]}
    contest = ("policy", "frontier")
    planned = contests.plan(documents, reports, [contest], ["anna"], each=1, both_orders=1.0, seed=0)

    class Longer:
        def __call__(self, annotator, document, a, b, *, position=0):
            return {"entities": 2 if len(a) > len(b) else -2, "relationships": 0, "summaries": 0}

    votes = contests.collect(planned, Longer())
    found = confirmation.by_run(planned, votes, contest, finished)
    assert {name: (r.wins, r.ties, r.losses) for name, r in found.items()} == {
        "tiny": (2, 0, 0), "tiny 2": (1, 1, 0), "all runs": (3, 1, 0),
    }  # fmt: skip
