"""The annotation store: one SQLite file with the pairs of a round, who judges them, and every judgement ever made.

1. `create` sets it up: annotators, a trial round for all, training pairs with gold judgements, batches of label pairs.
2. An annotator judges the pairs assigned to it by three aspects, -2 to 2 each; the sign of the sum is its preference.
3. `Store.advance` moves the work on by fixed rules: grade the training, release a batch when the one before is done.
   Who does not pass gets no pairs. The first batch goes to all who passed, and its agreement is *the level after
   training*; every later pair goes to `overlap` of them. When a batch's agreement falls below the level, work halts.

History is append-only: no judgement is changed or deleted, a second thought is a new revision. Every write is one
transaction that takes the lock first (`BEGIN IMMEDIATE`), so that many writers lose nothing, and that is on disk when
it returns (write-ahead log, `synchronous=FULL`).
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from erlib.judgements import agreement
from erlib.task import jsonl
from erlib.task.schema import ASPECTS, Name

Choice = Literal["A", "tie", "B"]  # what is preferred of two reports: the one definition of it
Score = Annotated[int, Field(ge=-2, le=2, strict=True)]
State = Literal["training", "short of annotators", "labelling", "halted", "done"]
HALT_ERROR = 0.01  # chance of a false halt in the whole of a round, shared among its batches
CHOICES: tuple[Choice, ...] = ("B", "tie", "A")  # of the signs -1, 0, 1

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE batches (
    batch INTEGER PRIMARY KEY, status TEXT NOT NULL CHECK (status IN ('waiting', 'released', 'done'))
);
CREATE TABLE annotators (
    name TEXT PRIMARY KEY, status TEXT NOT NULL CHECK (status IN ('training', 'passed', 'failed'))
);
CREATE TABLE items (
    pair_id TEXT PRIMARY KEY, place INTEGER NOT NULL UNIQUE, document_id TEXT NOT NULL, split TEXT NOT NULL,
    document TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL, gold TEXT CHECK (gold IN ('A', 'tie', 'B')),
    kind TEXT NOT NULL CHECK (kind IN ('trial', 'training', 'label')), batch INTEGER REFERENCES batches,
    CHECK ((kind = 'label') = (batch IS NOT NULL)), CHECK (kind <> 'training' OR gold IS NOT NULL)
);
CREATE TABLE assignments (
    turn INTEGER PRIMARY KEY AUTOINCREMENT, pair_id TEXT NOT NULL REFERENCES items,
    annotator TEXT NOT NULL REFERENCES annotators, UNIQUE (pair_id, annotator)
);
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY AUTOINCREMENT, pair_id TEXT NOT NULL, annotator TEXT NOT NULL,
    revision INTEGER NOT NULL CHECK (revision >= 1),
    entities INTEGER NOT NULL CHECK (entities IN (-2, -1, 0, 1, 2)),
    relationships INTEGER NOT NULL CHECK (relationships IN (-2, -1, 0, 1, 2)),
    summaries INTEGER NOT NULL CHECK (summaries IN (-2, -1, 0, 1, 2)),
    seconds REAL NOT NULL CHECK (seconds >= 0), at TEXT NOT NULL,
    UNIQUE (pair_id, annotator, revision), FOREIGN KEY (pair_id, annotator) REFERENCES assignments (pair_id, annotator)
);
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TRIGGER judgements_are_kept BEFORE DELETE ON judgements BEGIN SELECT RAISE (ABORT, 'history is kept'); END;
CREATE TRIGGER judgements_stand BEFORE UPDATE ON judgements BEGIN SELECT RAISE (ABORT, 'history is kept'); END;
CREATE TRIGGER events_are_kept BEFORE DELETE ON events BEGIN SELECT RAISE (ABORT, 'history is kept'); END;
CREATE TRIGGER events_stand BEFORE UPDATE ON events BEGIN SELECT RAISE (ABORT, 'history is kept'); END;
CREATE VIEW current AS SELECT *, max(revision) AS latest FROM judgements GROUP BY pair_id, annotator;
CREATE VIEW outstanding AS SELECT turn, pair_id, annotator, kind, batch FROM assignments JOIN items USING (pair_id)
    WHERE NOT EXISTS (SELECT 1 FROM judgements AS made
                      WHERE made.pair_id = assignments.pair_id AND made.annotator = assignments.annotator);
"""


class Item(BaseModel):
    """A pair of reports of one document, as an annotator sees it; `gold` is the known answer of a training pair."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    pair_id: Name
    document_id: Name
    split: str
    document: str
    a: str
    b: str
    gold: Choice | None = None


class Judgement(BaseModel):
    """What one annotator thinks of one pair: positive scores where A is better, 0 for a tie, 2 for "much better"."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    annotator: Name
    pair_id: Name
    entities: Score
    relationships: Score
    summaries: Score
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    at: AwareDatetime


class Recorded(NamedTuple):
    """What a write did: judgements that are new, that revise one, that say what the store says already, of others."""

    new: int
    revised: int
    unchanged: int
    elsewhere: int = 0  # of pairs that are not in this store: another round's, in a file for all rounds


def choice(total: float) -> Choice:
    """The preference that a summed score stands for: its sign."""
    return CHOICES[int(np.sign(total)) + 1]


def assign(
    pair_ids: Sequence[str],
    annotators: Sequence[str],
    *,
    overlap: int,
    seed: int,
    load: Mapping[str, int] | None = None,
) -> list[tuple[str, str]]:
    """Give each pair to `overlap` different annotators: those with the least to do so far, ties settled by `seed`.

    `load` is what each was given before. Afterwards no two differ by more than one pair, or by more than they did.
    Raises ValueError where there are fewer annotators than `overlap`.
    """
    names = sorted(set(annotators))
    if not 1 <= overlap <= len(names):
        raise ValueError(f"an overlap of {overlap} needs that many annotators, there are {len(names)}")
    rng = np.random.default_rng(seed)
    loads = np.array([(load or {}).get(name, 0) for name in names])
    given = []
    for pair_id in pair_ids:
        chosen = np.lexsort((rng.random(len(names)), loads))[:overlap]
        loads[chosen] += 1
        given += [(pair_id, names[index]) for index in sorted(chosen)]
    return given


class Store:
    """An open annotation store; raises `FileNotFoundError` where there is none (`create` makes one)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no annotation store; phase 05 makes one")
        self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._db.execute(f"PRAGMA {pragma}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One write, all of it or nothing. The lock is taken at once: two readers that both turn writer would fail."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the connection; the last one to close empties the write-ahead log."""
        self._db.close()

    def setting(self, name: str) -> Any:
        """A value that `create` was given: `checkpoint`, `overlap`, `pass_mark`, `seed`, `trial_pairs`, …"""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise KeyError(f"{self.path} has no setting {name!r}")
        return json.loads(row[0])

    # -- writing --

    def record(self, judgements: Iterable[Judgement]) -> Recorded:
        """Write judgements, all or none; ValueError for a pair that is not the annotator's, or is graded already.

        The same scores again change nothing, other scores become a new revision.
        """
        counts: Counter[str] = Counter()
        with self._transaction() as db:
            for judgement in judgements:
                counts[_record(db, judgement)] += 1
        return Recorded(counts["new"], counts["revised"], counts["unchanged"])

    def read(self, path: str | Path) -> Recorded:
        """Import judgements from JSONL, all or none; ValueError names line and reason of every bad line.

        Rows about pairs of other rounds are counted and passed over.
        """
        counts: Counter[str] = Counter()
        faults: list[str] = []
        seen: dict[tuple[str, str], int] = {}
        with self._transaction() as db:
            for number, fields, reason, _ in jsonl.rows(path):
                try:
                    judgement = Judgement.model_validate(_sound(fields, reason))
                    first = seen.setdefault((judgement.annotator, judgement.pair_id), number)
                    if first != number:
                        raise _Refused(f"{judgement.annotator} judges {judgement.pair_id} in line {first} already")
                    here = db.execute("SELECT 1 FROM items WHERE pair_id = ?", (judgement.pair_id,)).fetchone()
                    counts[_record(db, judgement) if here else "elsewhere"] += 1
                except ValidationError as error:
                    found = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
                    faults += [f"{path}:{number}: {key}: {message}" for key, message in found]
                except _Refused as error:
                    faults.append(f"{path}:{number}: {error}")
            if faults:
                more = f"\n… and {len(faults) - 20} more" if len(faults) > 20 else ""
                raise ValueError("\n".join(faults[:20]) + more + "\nNothing was imported: fix these lines first.")
        return Recorded(counts["new"], counts["revised"], counts["unchanged"], counts["elsewhere"])

    def hand_over(self, pair_id: str, owner: str, other: str) -> bool:
        """Give a label pair that waits for `owner` to another annotator who has passed; False where that cannot be."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE assignments SET annotator = :other WHERE pair_id = :pair_id AND annotator = :owner "
                "AND EXISTS (SELECT 1 FROM outstanding AS waiting WHERE kind = 'label' "
                "            AND waiting.pair_id = :pair_id AND waiting.annotator = :owner) "
                "AND EXISTS (SELECT 1 FROM annotators WHERE name = :other AND status = 'passed') "
                "AND NOT EXISTS (SELECT 1 FROM assignments WHERE pair_id = :pair_id AND annotator = :other)",
                {"pair_id": pair_id, "owner": owner, "other": other},
            )
            return done.rowcount == 1

    def resume(self, *, note: str, at: AwareDatetime) -> None:
        """Go on after a halt; `note` says what was found and changed. ValueError where nothing is halted."""
        with self._transaction() as db:
            if not _halted(db):
                raise ValueError("the work is not halted")
            _log(db, "resume", note, at)

    def advance(self, *, at: AwareDatetime) -> State:
        """Move the work on as far as the judgements allow, in one transaction; says what it waits for."""
        with self._transaction() as db:
            _grade(db, self.setting("pass_mark"), at)
            status = Counter(name for (name,) in db.execute("SELECT status FROM annotators"))
            if status["training"]:
                return "training"
            if status["passed"] < self.setting("overlap"):
                return "short of annotators"
            released = db.execute("SELECT batch FROM batches WHERE status = 'released'").fetchone()
            if released and db.execute("SELECT 1 FROM outstanding WHERE batch = ?", released).fetchone():
                return "labelling"
            if released:
                db.execute("UPDATE batches SET status = 'done' WHERE batch = ?", released)
                self._compare(db, released[0], at)
            if _halted(db):
                return "halted"
            (waiting,) = db.execute("SELECT min(batch) FROM batches WHERE status = 'waiting'").fetchone()
            if waiting is None:
                return "done"
            self._release(db, waiting, at)
            return "labelling"

    def _release(self, db: sqlite3.Connection, batch: int, at: AwareDatetime) -> None:
        """Assign a batch: the first to all who passed, so that the level after training is well known."""
        names = [name for (name,) in db.execute("SELECT name FROM annotators WHERE status = 'passed'")]
        pairs = [pair for (pair,) in db.execute("SELECT pair_id FROM items WHERE batch = ? ORDER BY place", (batch,))]
        load = dict(db.execute("SELECT annotator, count(*) FROM assignments GROUP BY annotator"))
        overlap = len(names) if batch == 1 else self.setting("overlap")
        given = assign(pairs, names, overlap=overlap, seed=self.setting("seed") + batch, load=load)
        db.executemany("INSERT INTO assignments (pair_id, annotator) VALUES (?, ?)", given)
        db.execute("UPDATE batches SET status = 'released' WHERE batch = ?", (batch,))
        _log(db, "release", f"batch {batch}: {len(pairs)} pairs, {len(given)} judgements", at)

    def _compare(self, db: sqlite3.Connection, batch: int, at: AwareDatetime) -> None:
        """Halt where a batch's agreement has fallen below that of the first batch, the level after training."""
        labels = self.frame(kind="label")
        level, now = (agreement.matrix(labels[labels["batch"] == number], "preference") for number in (1, batch))
        (batches,) = db.execute("SELECT count(*) FROM batches").fetchone()
        if batch > 1 and (fall := agreement.fall(level, now, error=HALT_ERROR / (batches - 1))):
            _log(db, "halt", f"batch {batch}: raw agreement {fall.now:.3f}, {fall.level:.3f} after training", at)

    # -- reading --

    def tasks(self) -> list[tuple[str, Item]]:
        """What is assigned and not judged, in turn: (annotator, pair), without the gold judgement."""
        fields = ("pair_id", "document_id", "split", "document", "a", "b")
        query = f"SELECT annotator, {', '.join(fields)} FROM outstanding JOIN items USING (pair_id) ORDER BY turn"
        rows = self._db.execute(query).fetchall()
        return [(name, Item(**dict(zip(fields, values, strict=True)))) for name, *values in rows]

    def missing(self) -> int:
        """Judgements that are missing to the end: those assigned, and `overlap` per pair of the batches that wait."""
        (assigned,) = self._db.execute("SELECT count(*) FROM outstanding").fetchone()
        query = "SELECT count(*) FROM items JOIN batches USING (batch) WHERE status = 'waiting'"
        (waiting,) = self._db.execute(query).fetchone()
        return assigned + waiting * self.setting("overlap")

    def frame(self, *, kind: str | None = None) -> pd.DataFrame:
        """All judgements as they stand, one row each: scores, `total`, `preference` (its sign), pair, time."""
        columns = ("turn", "annotator", "pair_id", "document_id", "split", "kind", "batch", "gold", *ASPECTS)
        columns = (*columns, "seconds", "at", "revision")
        rows = self._db.execute(
            f"SELECT {', '.join(columns)} FROM current JOIN assignments USING (pair_id, annotator) "
            "JOIN items USING (pair_id) WHERE kind = :kind OR :kind IS NULL ORDER BY turn",
            {"kind": kind},
        )
        frame = pd.DataFrame(rows.fetchall(), columns=columns)
        total = frame[list(ASPECTS)].sum(axis=1).astype(int)
        return frame.assign(total=total, preference=np.sign(total))

    def items(self, *, kind: str) -> list[Item]:
        """All pairs of a kind (`trial`, `training`, `label`), with the gold judgements of training pairs."""
        fields = tuple(Item.model_fields)
        query = f"SELECT {', '.join(fields)} FROM items WHERE kind = ? ORDER BY place"
        return [Item(**dict(zip(fields, row, strict=True))) for row in self._db.execute(query, (kind,))]

    def table(self, name: Literal["annotators", "batches", "events", "judgements"]) -> pd.DataFrame:
        """A table of the store as it is; `judgements` holds every revision."""
        if name not in ("annotators", "batches", "events", "judgements"):
            raise ValueError(f"no table {name!r}")
        return pd.read_sql(f"SELECT * FROM {name} ORDER BY 1", self._db)

    def copy(self, path: str | Path) -> None:
        """Write the whole store as one plain file without a write-ahead log."""
        Path(path).unlink(missing_ok=True)
        self._db.execute("VACUUM INTO ?", (str(path),))


@dataclass(frozen=True)
class Rules:
    """How the work of a round is laid out: a store keeps them, and refuses to be opened with others."""

    trial_pairs: int = 20  # judged by everybody before training, to be talked over; they become no labels
    batch_pairs: int = 300  # released at a time: agreement is compared by batch, and smaller ones tell little
    overlap: int = 2  # annotators per pair, of the batches after the first: the fewest that show agreement
    pass_mark: float = 0.85  # share of gold judgements to meet in training: a careless annotator stays below it
    seed: int = 0  # of the order of pairs, and of who gets which


def create(
    path: str | Path,
    rules: Rules,
    *,
    checkpoint: str,
    labels: Sequence[Item],
    training: Sequence[Item],
    annotators: Sequence[str],
) -> Store:
    """Set a store up for one round, or open the one at `path` if it was set up with the very same values.

    `rules.trial_pairs` of the label pairs, drawn at random, go to everybody before training and become no labels; the
    others are shuffled into batches. Raises ValueError for values that cannot work, or where `path` holds another
    set-up.
    """
    _refuse_unworkable(labels, training, annotators, rules)
    rows = _laid_out(labels, training, rules)
    setup = asdict(rules) | {"checkpoint": checkpoint, "annotators": sorted(annotators)}
    meta = sorted((name, json.dumps(value)) for name, value in setup.items())
    Path(path).touch()
    store = Store(path)
    with store._transaction() as db:
        if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            _fill(db, rows, meta, annotators=annotators, seed=rules.seed)
        elif _kept(db) != (rows, meta):
            raise ValueError(f"{path} was set up with other pairs or settings: move it away to begin afresh")
    return store


def _laid_out(labels: Sequence[Item], training: Sequence[Item], rules: Rules) -> list[tuple]:
    """The rows of the table of items, in order: place, kind, batch, fields of the item."""
    order = [labels[index] for index in np.random.default_rng(rules.seed).permutation(len(labels))]
    laid = [("trial", None, item) for item in order[: rules.trial_pairs]]
    laid += [("training", None, item) for item in training]
    for place, item in enumerate(order[rules.trial_pairs :]):
        laid.append(("label", 1 + place // rules.batch_pairs, item))
    return [(place, kind, batch, *item.model_dump().values()) for place, (kind, batch, item) in enumerate(laid)]


def _kept(db: sqlite3.Connection) -> tuple[list[tuple], list[tuple]]:
    """The rows of items and settings of a store that is set up."""
    items = db.execute(f"SELECT place, kind, batch, {', '.join(Item.model_fields)} FROM items ORDER BY place")
    return items.fetchall(), db.execute("SELECT * FROM meta ORDER BY name").fetchall()


def _fill(
    db: sqlite3.Connection, rows: list[tuple], meta: list[tuple], *, annotators: Sequence[str], seed: int
) -> None:
    """Set the tables up; trial and training pairs are given to everybody at once."""
    for statement in _statements(_TABLES):
        db.execute(statement)
    db.executemany("INSERT INTO meta VALUES (?, ?)", meta)
    db.executemany("INSERT INTO annotators VALUES (?, 'training')", [(name,) for name in sorted(annotators)])
    last = max(batch for _, _, batch, *_ in rows if batch)
    db.executemany("INSERT INTO batches VALUES (?, 'waiting')", [(batch,) for batch in range(1, last + 1)])
    columns, marks = ", ".join(Item.model_fields), ", ".join("?" * len(rows[0]))
    db.executemany(f"INSERT INTO items (place, kind, batch, {columns}) VALUES ({marks})", rows)
    first = [pair_id for _, kind, _, pair_id, *_ in rows if kind != "label"]
    given = assign(first, annotators, overlap=len(annotators), seed=seed)
    db.executemany("INSERT INTO assignments (pair_id, annotator) VALUES (?, ?)", given)


def _refuse_unworkable(
    labels: Sequence[Item], training: Sequence[Item], annotators: Sequence[str], rules: Rules
) -> None:
    if rules.overlap < 2:
        raise ValueError(f"overlap = {rules.overlap}: at least 2 must judge a pair, or agreement cannot be known")
    if len(set(annotators)) != len(annotators) or len(annotators) < rules.overlap:
        raise ValueError(f"an overlap of {rules.overlap} needs that many different annotators, not {list(annotators)}")
    if rules.trial_pairs >= len(labels):
        raise ValueError(f"{rules.trial_pairs} trial pairs leave nothing of {len(labels)} pairs to label")
    if not training or any(item.gold is None for item in training):
        raise ValueError("training needs pairs, and each of them a gold judgement")
    counted = Counter(item.pair_id for item in (*labels, *training))
    if repeated := [pair for pair, n in counted.items() if n > 1]:
        raise ValueError(f"pair ids must be unique; repeated: {repeated[:5]}")


# -- inside a transaction -----------------------------------------------------------------------------------------


class _Refused(ValueError):
    """Why a judgement cannot be written."""


def _sound(fields: Mapping[str, Any] | None, reason: str) -> Mapping[str, Any]:
    if fields is None:
        raise _Refused(reason)
    return fields


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; `executescript` would commit the transaction it runs in."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _record(db: sqlite3.Connection, judgement: Judgement) -> Literal["new", "revised", "unchanged"]:
    key = (judgement.pair_id, judgement.annotator)
    row = db.execute(
        "SELECT kind, status FROM assignments JOIN items USING (pair_id) JOIN annotators ON name = annotator "
        "WHERE pair_id = ? AND annotator = ?",
        key,
    ).fetchone()
    if row is None:
        raise _Refused(f"the pair {judgement.pair_id!r} is not assigned to {judgement.annotator!r}")
    scores = tuple(getattr(judgement, aspect) for aspect in ASPECTS)
    query = f"SELECT revision, {', '.join(ASPECTS)} FROM judgements WHERE pair_id = ? AND annotator = ?"
    revision, *before = db.execute(f"{query} ORDER BY revision DESC", key).fetchone() or (0,)
    if tuple(before) == scores:
        return "unchanged"
    if row[0] == "training" and row[1] != "training":
        raise _Refused(
            f"the training of {judgement.annotator!r} is graded, {judgement.pair_id!r} cannot be judged again"
        )
    at = judgement.at.isoformat(timespec="seconds")
    values = (*key, revision + 1, *scores, judgement.seconds, at)
    columns = f"pair_id, annotator, revision, {', '.join(ASPECTS)}, seconds, at"
    db.execute(f"INSERT INTO judgements ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    return "revised" if revision else "new"


def _grade(db: sqlite3.Connection, pass_mark: float, at: AwareDatetime) -> None:
    """Pass or fail everybody who has judged all of trial and training: by the share of gold preferences met."""
    query = "SELECT name FROM annotators WHERE status = 'training' AND name NOT IN (SELECT annotator FROM outstanding)"
    for (name,) in db.execute(query).fetchall():
        rows = db.execute(
            f"SELECT gold, {' + '.join(ASPECTS)} FROM current JOIN items USING (pair_id) "
            "WHERE kind = 'training' AND annotator = ?",
            (name,),
        ).fetchall()
        met = sum(choice(total) == gold for gold, total in rows)
        status = "passed" if met >= pass_mark * len(rows) else "failed"
        db.execute("UPDATE annotators SET status = ? WHERE name = ?", (status, name))
        _log(db, status, f"{name}: {met} of {len(rows)} gold judgements met", at)


def _halted(db: sqlite3.Connection) -> bool:
    row = db.execute("SELECT kind FROM events WHERE kind IN ('halt', 'resume') ORDER BY id DESC").fetchone()
    return row == ("halt",)


def _log(db: sqlite3.Connection, kind: str, detail: str, at: AwareDatetime) -> None:
    db.execute(
        "INSERT INTO events (at, kind, detail) VALUES (?, ?, ?)", (at.isoformat(timespec="seconds"), kind, detail)
    )
