"""The simulated frontier: deterministic, better with better prompts, and wrong in ways that can be learned."""

from collections import Counter
from pathlib import Path

import pytest

from erlib.documents import corpus, files
from erlib.reports import extraction, prompts, teacher
from erlib.task import metrics
from erlib.task.answers import parse_json
from erlib.world import stream
from erlib.world.frontier import LABEL, Frontier, connect_frontier

BARE = "Extract the entities and relationships as JSON."


@pytest.fixture(scope="module")
def brief():
    return files.read_brief(Path(__file__).parents[2] / "params" / "brief.yml")


@pytest.fixture(scope="module")
def samples(brief):
    return stream.World(seed=7, brief=brief).stream(300)


@pytest.fixture(scope="module")
def frontier(samples, brief):
    return Frontier(samples, brief)


@pytest.fixture(scope="module")
def full(brief):
    kinds = [f"- {k.type}: {k.description} (for example: {k.example})" for k in (*brief.entities, *brief.relationships)]
    return "\n".join([BARE, *kinds, "Summaries hold salient facts. Infer what is implied."])


def entity_f1(frontier, samples, system, turns=()):
    reading = frontier._read(system, turns)
    texts = [corpus.clean(s.document.text) for s in samples]
    predicted = [parse_json(frontier.answer(text, reading)).report for text in texts]
    gold = [s.truth.report for s in samples]
    return metrics.score(gold, predicted, None), predicted


def test_the_same_prompt_gets_the_same_answer(frontier, samples, full):
    assert entity_f1(frontier, samples, full)[1] == entity_f1(frontier, samples, full)[1]


def test_a_prompt_that_states_the_brief_is_answered_better(frontier, samples, full):
    bare, full_score = entity_f1(frontier, samples, BARE)[0], entity_f1(frontier, samples, full)[0]
    assert full_score.entity_f1 > bare.entity_f1 + 0.08
    assert full_score.relationship_f1 > bare.relationship_f1 + 0.05


def test_exemplars_help_and_five_varied_ones_help_more_than_one(frontier, samples, full):
    def turns(chosen):
        return tuple(
            turn
            for s in chosen
            for turn in (
                ("user", f"Document:\n{corpus.clean(s.document.text)}\nReport:"),
                ("assistant", s.truth.report.model_dump_json()),
            )
        )

    rich = sorted(samples, key=lambda s: -len({link.type for link in s.truth.links}))
    none, one, five = (entity_f1(frontier, samples, full, turns(rich[:n]))[0] for n in (0, 1, 5))
    assert none.relationship_f1 < five.relationship_f1
    assert none.entity_f1 < one.entity_f1 <= five.entity_f1 + 0.01


def test_faults_crowd_in_blind_spots_that_belong_to_phrasings(frontier, samples, full):
    missed, seen = Counter(), Counter()
    predicted = entity_f1(frontier, samples, full)[1]
    for sample, report in zip(samples, predicted, strict=True):
        names = {entity.name for entity in report.entities}
        for mention in sample.truth.mentions:
            if not mention.wanted:
                seen[mention.cue] += 1
                missed[mention.cue] += mention.name in names
    shares = [missed[cue] / n for cue, n in seen.items() if n >= 4]
    assert sum(share > 0.5 for share in shares) and sum(share < 0.25 for share in shares)


def test_it_answers_through_dspy_and_refuses_unknown_documents(frontier, samples, full):
    from dspy.lm15 import Message, Request

    text = corpus.clean(samples[0].document.text)
    response = frontier.complete(
        Request(model="simulated", messages=(Message.user(f"Document:\n{text}\nReport:"),), system=full)
    )
    assert parse_json(response.text).valid
    assert response.model == LABEL
    with pytest.raises(LookupError, match="embedded world and labelled documents"):
        frontier.complete(
            Request(model="simulated", messages=(Message.user("Document:\nnever seen\nReport:"),), system=full)
        )


def test_connected_by_name_it_answers_as_an_endpoint_would_and_needs_no_cache(samples, brief, tmp_path):
    priced = teacher.Connection(budget=teacher.Budget(1.0, price_in=1.0, price_out=1.0))
    lm = connect_frontier("simulated", samples, brief, cache_dir=tmp_path / "cache", connection=priced)
    documents = [sample.document.model_copy(update={"text": corpus.clean(sample.document.text)}) for sample in samples]
    template = prompts.templates(brief)[-1]
    parsed = extraction.extract(lm, documents[:5], template=template, threads=2, brief=brief)
    assert all(answer.valid for answer in parsed)
    assert not (tmp_path / "cache").exists()
    assert teacher.usage(lm).usd == 0
    other = connect_frontier("some-model", [], brief, cache_dir=tmp_path / "cache", connection=priced)
    assert other.engine.engine.model == "some-model" and (tmp_path / "cache").exists()
