"""The embedded world: reproducible, varied, and true to its own reports."""

import json
from collections import Counter

import pytest

from erlib.documents import corpus, files
from erlib.task.schema import Brief, Kind
from erlib.world.stream import OUT_OF_DISTRIBUTION_KIND, World, write_documents


@pytest.fixture(scope="module")
def world():
    return World(seed=3)


@pytest.fixture(scope="module")
def stream(world):
    return world.stream(3000)


def test_same_seed_same_documents_and_other_seed_other_documents(stream):
    again = World(seed=3).stream(50)
    assert [s.document for s in again] == [s.document for s in stream[:50]]
    assert [s.truth.mentions for s in again] == [s.truth.mentions for s in stream[:50]]
    other = World(seed=4).stream(50)
    assert not {s.document.text for s in other} & {s.document.text for s in again}


def test_any_stretch_of_the_stream_can_be_made_by_itself(world, stream):
    assert [s.document for s in world.stream(20, start=400)] == [s.document for s in stream[400:420]]


@pytest.mark.parametrize("part", ["stream", "gold", "fresh", "out_of_distribution"])
def test_every_name_and_every_fact_stands_in_the_cleaned_text(world, part):
    for document, truth in getattr(world, part)(400):
        text = corpus.clean(document.text)
        for mention in truth.mentions:
            assert mention.name in text, (mention, text)
            for fact in mention.facts:
                assert fact.text in text, (fact, text)


def test_reports_hold_what_is_wanted_and_nothing_else(stream):
    for _, truth in stream:
        wanted = {m.name for m in truth.mentions if m.wanted}
        assert {entity.name for entity in truth.report.entities} == wanted
        assert {entity.name for entity in truth.generic_report.entities} == {m.name for m in truth.mentions}
        assert {r.type for r in truth.report.relationships}.isdisjoint({"knows", "visited", "reported_by"})


def test_a_narrower_brief_gives_narrower_reports():
    kind = {"description": "a firm", "example": "Acme"}
    brief = Brief(
        client="c",
        purpose="p",
        summaries="s",
        entities=[Kind(type="organisation", **kind)],
        relationships=[Kind(type="acquired", **kind)],
    )
    for sample in World(seed=3, brief=brief).stream(200):
        assert {e.type for e in sample.truth.report.entities} <= {"organisation"}
        assert {r.type for r in sample.truth.report.relationships} <= {"acquired"}


def test_the_stream_is_rich(stream):
    kinds = Counter(truth.kind for _, truth in stream)
    types = Counter(link.type for _, truth in stream for link in truth.links if link.wanted)
    cues = {link.cue for _, truth in stream for link in truth.links}
    implied = [link.implied for _, truth in stream for link in truth.links if link.wanted]
    empty = sum(not truth.report.entities for _, truth in stream) / len(stream)
    unwanted = sum(not m.wanted for _, truth in stream for m in truth.mentions)
    assert len(kinds) >= 6 and min(kinds.values()) > 80
    assert len(types) >= 12 and min(types.values()) > 30
    assert len(cues) >= 300
    assert 0.15 < sum(implied) / len(implied) < 0.45
    assert 0.01 < empty < 0.1
    assert 0.2 < unwanted / sum(len(truth.mentions) for _, truth in stream) < 0.6


def test_reposts_are_near_copies_of_earlier_posts(stream):
    seen: set[str] = set()
    reposts = 0
    for document, _ in stream:
        body = document.text.removeprefix("RT ").split(": ", 1)[-1]
        reposts += document.text.startswith("RT @") and body in seen
        seen.add(document.text)
    assert 20 < reposts < 300


def test_topics_drift_with_the_date_unless_told_not_to():
    def topics(drift, start):
        return Counter(s.truth.topic for s in World(seed=5, drift=drift).stream(1500, start=start))

    def distance(a, b):
        return sum(abs(a[t] - b[t]) for t in a | b) / 3000

    half_a_year = 17_500
    drifting = distance(topics(1.0, 0), topics(1.0, half_a_year))
    stationary = distance(topics(0.0, 0), topics(0.0, half_a_year))
    assert drifting > 0.35 and stationary < 0.6 * drifting


def test_out_of_distribution_posts_share_neither_kind_nor_phrasings_with_the_stream(world, stream):
    odd = world.out_of_distribution(200)
    common = {link.cue for _, truth in stream for link in truth.links if link.wanted}
    held_back = [link.cue not in common for _, truth in odd for link in truth.links if link.wanted]
    assert {truth.kind for _, truth in odd} == {OUT_OF_DISTRIBUTION_KIND}
    assert OUT_OF_DISTRIBUTION_KIND not in {truth.kind for _, truth in stream}
    assert sum(held_back) / len(held_back) > 0.6


def test_written_crawl_reads_back_with_its_broken_lines_rejected(world, tmp_path):
    samples = world.stream(1500)
    broken = write_documents(samples, tmp_path / "crawl.jsonl", seed=1)
    documents = files.read_documents(tmp_path / "crawl.jsonl", rejects=tmp_path / "rejects.jsonl")
    rejects = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert 0 < broken == len(rejects)
    assert all({"line", "reason"} <= json.loads(line).keys() for line in rejects)
    assert [d.id for d in documents] == [s.document.id for s in samples]
