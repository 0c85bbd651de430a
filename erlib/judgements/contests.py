"""Contests: several systems' reports of the same documents, two systems at a time, by the rules of the blind test.

1. `plan`     what each contest asks, and which of it every annotator answers, in which order;
2. `write`    the record of what is compared, and the tasks that people are sent, which name no system;
3. `collect`  the votes of a judge, asked at once; those of people come through `kept.ask`;
4. `results`  what came of each contest; `request` says what people are asked for while votes are missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from erlib.judgements import blindtest
from erlib.judgements.blindtest import Comparison, Judge, Questions, Result, Vote
from erlib.task.jsonl import write_jsonl
from erlib.task.schema import Document, Report

Contest = tuple[str, str]  # the names of two systems; results are the first one's


class Plan(NamedTuple):
    """What each contest asks, and the queue of each annotator: its comparisons in order, contest after contest."""

    asked: dict[Contest, Questions]
    queued: dict[str, list[Comparison]]

    @property
    def comparisons(self) -> list[Comparison]:
        """The comparisons of all contests."""
        return [comparison for questions in self.asked.values() for comparison in questions.comparisons]

    @property
    def wanted(self) -> int:
        """Judgements to give: every comparison as often as it stands in a queue."""
        return sum(map(len, self.queued.values()))


def plan(
    documents: Sequence[Document],
    reports: Mapping[str, Sequence[Report]],
    contests: Sequence[Contest],
    annotators: Sequence[str],
    *,
    each: int,
    both_orders: float,
    seed: int,
) -> Plan:
    """Set systems against each other on the same documents; `reports` holds one report per document of every system.

    Every document of a contest goes to `each` of the annotators; see `blindtest.questions` and `blindtest.queues`.
    """
    asked = {}
    queued: dict[str, list[Comparison]] = {name: [] for name in annotators}
    for contest in contests:
        two = {name: reports[name] for name in contest}
        asked[contest] = blindtest.questions(documents, two, both_orders=both_orders, seed=seed)
        queues = blindtest.queues(asked[contest].comparisons, annotators, each=each, seed=seed)
        for name, queue in queues.items():
            queued[name] += queue
    return Plan(asked, queued)


def write(planned: Plan, *, comparisons: Path, tasks: Path) -> None:
    """Write the record of what is compared, systems named, and the tasks for people, without them (both JSONL)."""
    write_jsonl(comparisons, planned.comparisons)
    write_jsonl(tasks, blindtest.tasks(planned.queued))


def collect(planned: Plan, judge: Judge) -> list[Vote]:
    """The votes of `judge`, asked now."""
    return blindtest.ask(planned.queued, judge)


def request(tasks: str | Path, *, phase: str) -> str:
    """Tell people how to give the judgements that are missing."""
    return (
        f"answer each row of {tasks} with a row of JSONL that has annotator, pair_id, entities, relationships and "
        "summaries (-2 to 2, above 0: A is better), seconds and at (time, with its zone); "
        f"then set `judgements` to the path of that file and run {phase} again"
    )


def votes_of(votes: Sequence[Vote], contest: Contest) -> list[Vote]:
    """The votes of one contest."""
    return [vote for vote in votes if {vote.a_system, vote.b_system} == set(contest)]


def results(planned: Plan, votes: Sequence[Vote], *, aspect: str | None = None) -> dict[Contest, Result]:
    """What came of each contest for its first system, by all aspects or one; see `blindtest.result`."""
    return {
        contest: blindtest.result(
            votes_of(votes, contest), contest[0], identical=questions.identical, aspect=aspect
        )
        for contest, questions in planned.asked.items()
    }  # fmt: skip


def named(found: Mapping[Contest, Result]) -> dict[str, Result]:
    """Results by "one against other", as `blindtest.table` and `blindtest.readable` take them."""
    return {" against ".join(contest): result for contest, result in found.items()}
