"""Contests: several at once ask what the blind test asks of two systems, and people's answers find their own."""

import json
from pathlib import Path

import pytest

from erlib.documents import files
from erlib.judgements import blindtest, contests, kept
from erlib.task.schema import ASPECTS, Document, Entity, Report

BRIEF = files.read_brief(Path(__file__).parents[2] / "params/brief.yml")
ANNOTATORS = ["anna", "ben"]
CONTESTS = [("PPO", "SFT"), ("DPO", "SFT"), ("PPO", "DPO")]


def documents(n):
    return [Document(id=f"d{i}", text=f"Korvex {i} bought Velia Labs.") for i in range(n)]


def reports(n, summary):
    return [Report(entities=(Entity(name=f"Korvex {i}", type="organisation", summary=summary),)) for i in range(n)]


def planned(n=6, *, dpo="sun", each=2, both_orders=0.0):
    by_system = {"PPO": reports(n, "grid"), "DPO": reports(n, dpo), "SFT": reports(n, "")}
    return contests.plan(
        documents(n), by_system, CONTESTS, ANNOTATORS, each=each, both_orders=both_orders, seed=0
    )  # fmt: skip


def prefers(*order):
    """A judge that prefers the report with the earlier of these summaries."""

    def judge(annotator, document, a, b, *, position):
        worth = [next((-place for place, word in enumerate(order) if word in text), -len(order)) for text in (a, b)]
        return dict.fromkeys(ASPECTS, int(worth[0] > worth[1]) - int(worth[0] < worth[1]))

    return judge


def test_a_contest_among_others_asks_what_the_blind_test_asks_of_two_systems():
    found = planned(both_orders=0.5)
    alone = blindtest.questions(
        documents(6), {"PPO": reports(6, "grid"), "SFT": reports(6, "")}, both_orders=0.5, seed=0
    )
    assert found.asked["PPO", "SFT"] == alone
    queues = blindtest.queues(alone.comparisons, ANNOTATORS, each=2, seed=0)
    assert {name: queue[: len(queues[name])] for name, queue in found.queued.items()} == queues


def test_every_contest_is_judged_by_each_annotator_in_turn():
    found = planned()
    assert list(found.asked) == CONTESTS
    assert len(found.comparisons) == 3 * 6
    assert found.wanted == 3 * 6 * 2
    assert planned(each=1).wanted == 3 * 6


def test_a_judge_s_votes_settle_each_contest_for_its_first_system():
    found = planned()
    votes = contests.collect(found, prefers("grid", "sun"))
    assert len(votes) == found.wanted
    results = contests.results(found, votes)
    assert {contest: (r.wins, r.ties, r.losses) for contest, r in results.items()} == dict.fromkeys(CONTESTS, (6, 0, 0))
    assert {len(contests.votes_of(votes, contest)) for contest in CONTESTS} == {12}
    assert contests.results(found, contests.collect(found, prefers("sun", "grid")))["PPO", "DPO"].losses == 6
    assert list(contests.named(results)) == ["PPO against SFT", "DPO against SFT", "PPO against DPO"]


def test_an_aspect_is_settled_on_its_own():
    def judge(annotator, document, a, b, *, position):
        return {"entities": 0, "relationships": 2 * ("grid" in a) - 1, "summaries": 2 * ("grid" in b) - 1}

    votes = contests.collect(planned(), judge)
    assert contests.results(planned(), votes)["PPO", "SFT"].ties == 6
    assert contests.results(planned(), votes, aspect="relationships")["PPO", "SFT"].wins == 6
    assert contests.results(planned(), votes, aspect="summaries")["PPO", "SFT"].losses == 6


def test_systems_that_write_the_same_tie_and_their_contests_stay_apart():
    found = planned(dpo="grid")
    assert found.asked["PPO", "DPO"].comparisons == []
    assert len({comparison.id for comparison in found.comparisons}) == len(found.comparisons) == 12
    results = contests.results(found, contests.collect(found, prefers("grid")))
    assert (results["PPO", "DPO"].ties, results["PPO", "SFT"].wins, results["DPO", "SFT"].wins) == (6, 6, 6)


# -- people -------------------------------------------------------------------------------------------------------


def answers(tasks):
    scores = {"entities": 1, "relationships": 0, "summaries": 1, "seconds": 9.0, "at": "2025-06-01T10:00:00Z"}
    return [{"annotator": task["annotator"], "pair_id": task["pair_id"], **scores} for task in tasks]


@pytest.mark.parametrize("dpo", ["sun", "grid"])
def test_people_answer_the_file_of_tasks_and_what_is_missing_is_known(tmp_path, dpo):
    found = planned(dpo=dpo)
    contests.write(found, comparisons=tmp_path / "comparisons.jsonl", tasks=tmp_path / "tasks.jsonl")
    record = [json.loads(line) for line in (tmp_path / "comparisons.jsonl").read_text().splitlines()]
    tasks = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert len(record) == len(found.comparisons)
    assert len(tasks) == found.wanted
    assert not any(name in json.dumps(task) for task in tasks for name in ("PPO", "DPO", "SFT"))

    asking = {"file": tmp_path / "kept.sqlite", "brief": BRIEF}
    nobody = kept.ask(found, **asking)
    assert nobody.votes == [] and nobody.missing == found.wanted
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in answers(tasks)[:-3]))
    gathered = kept.ask(found, answers=file, **asking)
    votes = gathered.votes
    assert gathered.missing + gathered.known == 3  # the same two texts in another contest are known
    again = kept.ask(found, **asking)
    assert (again.missing, again.known) == (gathered.missing, len(votes))
    assert str(again) == f"{len(votes)} of {found.wanted} judgements, {len(votes)} of them known from before"
    assert all(vote.preferred() == vote.a_system for vote in votes)
    places = {contest: len(contests.votes_of(votes, contest)) for contest in CONTESTS}
    assert sum(places.values()) == len(votes)


def test_the_request_names_the_tasks_the_fields_and_the_phase():
    said = contests.request("runs/mine/09_rounds/tasks.jsonl", phase="09")
    assert "runs/mine/09_rounds/tasks.jsonl" in said
    assert all(field in said for field in ("annotator", "pair_id", *ASPECTS, "seconds", "at", "`judgements`"))
    assert said.endswith("run 09 again")
