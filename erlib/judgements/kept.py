"""People's judgements, kept by what was judged: they outlive reruns, renamed runs and new versions of the code.

A judgement answers a question, and the question is the brief, the document's text and two reports: the same texts
under the same brief get the same answer wherever they come up again, in whatever order and under whatever id. Phases
that people work for (05, 08, 09, 10, 14) put what people have judged into one file beside the runs, and take from it
before they ask. What a program judges does not belong there: it can be asked again, and is not to pass for a person.

History is append-only, every write one transaction that is on disk when it returns, so that any number of phases may
share the file.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from erlib.judgements import annotation, blindtest, contests
from erlib.judgements.blindtest import Vote
from erlib.judgements.contests import Plan
from erlib.judgements.store import Judgement, State, Store
from erlib.task.schema import ASPECTS, Brief

_TABLE = """
CREATE TABLE IF NOT EXISTS judgements (
    id INTEGER PRIMARY KEY, content TEXT NOT NULL, annotator TEXT NOT NULL,
    entities INTEGER NOT NULL, relationships INTEGER NOT NULL, summaries INTEGER NOT NULL,
    seconds REAL NOT NULL, at TEXT NOT NULL,
    UNIQUE (content, annotator, entities, relationships, summaries, at)
)
"""


class Answer(NamedTuple):
    """What an annotator thinks of the reports of a question, as they were shown."""

    document: str
    a: str
    b: str
    judgement: Judgement  # its `pair_id` is the run's own
    turn: int = 1  # 2 where it was asked again, in the other order, to see whether the order matters


class Kept:
    """The open file of judgements; made where there is none."""

    def __init__(self, path: str | Path, brief: Brief):
        self.path, self._brief = Path(path), brief.model_dump_json()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", _TABLE):
            self._db.execute(statement)

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def add(self, answers: Iterable[Answer]) -> int:
        """Keep answers, all or none; gives how many are new. The same answer again changes nothing."""
        rows = []
        for document, a, b, judgement, turn in answers:
            content, sign = self._question(document, a, b, turn)
            scores = [sign * getattr(judgement, aspect) for aspect in ASPECTS]
            rows.append((content, judgement.annotator, *scores, judgement.seconds, judgement.at.isoformat()))
        before = self._db.total_changes
        self._db.execute("BEGIN IMMEDIATE")
        try:
            columns = f"content, annotator, {', '.join(ASPECTS)}, seconds, at"
            self._db.executemany(f"INSERT OR IGNORE INTO judgements ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        return self._db.total_changes - before

    def known(self, pair_id: str, document: str, a: str, b: str, *, turn: int = 1) -> dict[str, Judgement]:
        """The latest answer of each annotator to a question, as a judgement of the pair in the order shown."""
        content, sign = self._question(document, a, b, turn)
        query = f"SELECT annotator, seconds, at, {', '.join(ASPECTS)} FROM judgements WHERE content = ? ORDER BY at, id"
        found = {}
        for annotator, seconds, at, *scores in self._db.execute(query, (content,)):
            by_aspect = {aspect: sign * score for aspect, score in zip(ASPECTS, scores, strict=True)}
            found[annotator] = Judgement(annotator=annotator, pair_id=pair_id, seconds=seconds, at=at, **by_aspect)
        return found

    def _question(self, document: str, a: str, b: str, turn: int) -> tuple[str, int]:
        """The hash of a question, the same in both orders, and 1 for the order it is kept in, else -1."""
        first, second = sorted((a, b))
        text = json.dumps([self._brief, ASPECTS, document, first, second, turn])
        return hashlib.sha256(text.encode()).hexdigest(), 1 if (a, b) == (first, second) else -1


def of_store(book: Store) -> list[Answer]:
    """Everything that annotators have judged in a store."""
    items = {item.pair_id: item for kind in ("trial", "training", "label") for item in book.items(kind=kind)}
    rows = book.table("judgements").drop(columns=["id", "revision"]).to_dict("records")
    judged = [Judgement(**row) for row in rows]
    return [Answer(items[j.pair_id].document, items[j.pair_id].a, items[j.pair_id].b, j) for j in judged]


def move_on(book: Store, kept: Kept, *, resume_note: str, at: datetime) -> tuple[State, int]:
    """Move people's work on as far as their answers and those known from before allow: state, how many were known."""
    taken = 0
    while True:
        kept.add(of_store(book))
        state = annotation.proceed(book, resume_note=resume_note, at=at)
        found = _fill(book, kept)
        taken += found
        if not found:
            return state, taken


def _fill(book: Store, kept: Kept) -> int:
    """Record what is known of the pairs that wait for a judgement; gives how many judgements.

    A pair that another annotator of the store has judged before goes over to that one, who need not be asked.
    """
    found = []
    for name, item in book.tasks():
        known = kept.known(item.pair_id, item.document, item.a, item.b)
        others = (other for other in known if book.hand_over(item.pair_id, name, other))
        if owner := name if name in known else next(others, ""):
            found.append(known[owner])
    book.record(found)
    return len(found)


class Gathered(NamedTuple):
    """Votes in contests, how many were wanted, how many of people's were known from before, and rows of their file that
    answer other questions."""

    votes: list[Vote]
    wanted: int
    known: int = 0
    elsewhere: int = 0

    @property
    def missing(self) -> int:
        """Judgements that are still to be given."""
        return self.wanted - len(self.votes)

    def __str__(self) -> str:
        said = f"{len(self.votes):,} of {self.wanted:,} judgements"
        said += f", {self.known:,} of them known from before" if self.known else ""
        return said + (f"; {self.elsewhere:,} rows of the file answer other questions" if self.elsewhere else "")


def ask(
    planned: Plan, *, judge: blindtest.Judge | None = None, answers: str | Path = "", file: str | Path, brief: Brief
) -> Gathered:
    """The votes of contests: of `judge`, asked now, or without one people's, from their `answers` and the kept `file`.

    Raises ValueError for answers that do not fit; see `blindtest.read_answers`.
    """
    if judge is not None:
        return Gathered(contests.collect(planned, judge), planned.wanted)
    return gather(planned, Kept(file, brief), answers=answers)


def gather(planned: Plan, kept: Kept, *, answers: str | Path = "") -> Gathered:
    """The votes in people's file of answers, which are kept, and those known from before of what is still open.

    Whoever of the annotators has judged a comparison before stands in for the one that it was given to.
    """
    read = blindtest.read_answers(Path(answers), planned.queued) if answers else blindtest.Answers([], [], 0)
    by_id = {comparison.id: comparison for comparison in planned.comparisons}
    shown = [(by_id[each.pair_id], each) for each in read.judgements]
    kept.add(Answer(one.document, one.a, one.b, each, one.order) for one, each in shown)
    votes, given = list(read.votes), {(each.annotator, each.comparison_id) for each in read.votes}
    for name, queue in planned.queued.items():
        for place, comparison in enumerate(queue):
            if (name, comparison.id) in given:
                continue
            known = kept.known(comparison.id, comparison.document, comparison.a, comparison.b, turn=comparison.order)
            free = [other for other in known if other in planned.queued and (other, comparison.id) not in given]
            if owner := name if name in free else next(iter(free), ""):
                given.add((owner, comparison.id))
                votes.append(blindtest.vote(comparison, owner, place, known[owner].model_dump()))
    return Gathered(votes, planned.wanted, len(votes) - len(read.votes), read.elsewhere)
