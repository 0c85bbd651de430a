"""The annotation store and its rules: who judges what, history, halts, imports, many writers, and a kill."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib.documents.files import read_brief
from erlib.judgements import annotation, sampling, store
from erlib.task.forms import to_compact
from erlib.task.jsonl import read_jsonl, write_jsonl
from erlib.task.schema import ASPECTS, Document, Entity, Exemplar, Report

START = datetime(2026, 1, 1, 9, tzinfo=UTC)
NAMES = ("ann", "bob", "cem", "dea")


def item(number: int, *, gold: str | None = None, kind: str = "pair") -> store.Item:
    return store.Item(
        pair_id=f"{kind}-{number}",
        document_id=f"document-{number // 3}",
        split="train",
        document=f"post {number}",
        a="Korvex|organisation",
        b="none",
        gold=gold,
    )


def make(path: Path, *, pairs: int = 40, **changes: object) -> store.Store:
    values = {
        "checkpoint": "c0ffee",
        "labels": [item(n) for n in range(pairs)],
        "training": [item(n, gold="A", kind="training") for n in range(10)],
        "annotators": NAMES,
    }
    rules = {"trial_pairs": 4, "batch_pairs": 12, "overlap": 2, "pass_mark": 0.8, "seed": 1}
    rules |= {name: changes.pop(name) for name in rules if name in changes}
    return store.create(path, store.Rules(**rules), **(values | changes))


def drawn(pairs: int = 201) -> tuple[list[sampling.Sampled], list[sampling.Pair]]:
    """What the pairs of `make` were drawn as: six completions per document, two for each of its three pairs.

    The token ids of the pair n are (n, 0) for A and (n, 1) for B; in odd pairs B stands first among the completions.
    """
    samples, laid = [], []
    for first in range(0, pairs, 3):
        document, candidates = item(first).document_id, []
        for number in range(first, first + 3):
            one = item(number)
            a, b = (len(candidates) + side for side in ((1, 0) if number % 2 else (0, 1)))
            sides = [(one.a, (number, 0)), (one.b, (number, 1))]
            candidates += [candidate(*side) for side in (sides[::-1] if number % 2 else sides)]
            laid.append(
                sampling.Pair(id=one.pair_id, document_id=document, a=a, b=b, split="train", checkpoint="c0ffee")
            )
        samples.append(
            sampling.Sampled(
                document=Document(id=document, text=item(first).document),
                split="train",
                checkpoint="c0ffee",
                temperature=1.0,
                completions=tuple(candidates),
            )
        )
    return samples, laid


def candidate(text: str, ids: tuple[int, ...]) -> sampling.Candidate:
    return sampling.Candidate(text=text, ids=ids, logprob=0.0, token_logprobs=(), greedy=False, finished=True)


def judgement(annotator: str, pair_id: str, *scores: int, seconds: float = 5.0) -> store.Judgement:
    values = dict(zip(ASPECTS, scores or (1, 0, 0), strict=True))
    return store.Judgement(annotator=annotator, pair_id=pair_id, seconds=seconds, at=START, **values)


def likes_a(annotator: str, document: str, a: str, b: str, *, position: int) -> dict[str, int]:
    return {"entities": 2, "relationships": 0, "summaries": -1}


def five_seconds(annotator: str, document: str, a: str, b: str) -> float:
    return 5.0


def drive(book: store.Store, judge=likes_a) -> str:
    return annotation.drive(book, judge, seconds=five_seconds, started=START)


# -- assignment ---------------------------------------------------------------------------------------------------


@given(
    pairs=st.integers(0, 60),
    annotators=st.integers(2, 7),
    overlap=st.integers(1, 7),
    seed=st.integers(0, 99),
    before=st.integers(0, 9),
)
def test_assignment_is_balanced_without_repeats_and_follows_from_the_seed(pairs, annotators, overlap, seed, before):
    names, ids = [f"name-{n}" for n in range(annotators)], [f"pair-{n}" for n in range(pairs)]
    if overlap > annotators:
        with pytest.raises(ValueError, match="annotators"):
            store.assign(ids, names, overlap=overlap, seed=seed)
        return
    load = {names[0]: before}
    given_ = store.assign(ids, names, overlap=overlap, seed=seed, load=load)
    assert given_ == store.assign(ids, names[::-1], overlap=overlap, seed=seed, load=load)
    assert len(set(given_)) == len(given_)  # nobody sees a pair twice
    assert Counter(pair for pair, _ in given_) == Counter(dict.fromkeys(ids, overlap))
    total = Counter(load) + Counter(name for _, name in given_)
    loads = [total[name] for name in names]
    assert max(loads) - min(loads) <= max(1, before)


def test_a_round_gives_every_pair_its_judges_and_nobody_a_pair_twice(tmp_path):
    book = make(tmp_path / "s.sqlite")
    assert drive(book) == "done"
    frame = book.frame()
    assert not frame.duplicated(["annotator", "pair_id"]).any()
    per_pair = frame.groupby(["kind", "pair_id"]).size().reset_index(name="n")
    assert set(per_pair.loc[per_pair["kind"] != "label", "n"]) == {4}
    batches = frame[frame["kind"] == "label"].groupby(["batch", "pair_id"]).size()
    assert set(batches[1]) == {4} and {n for batch in (2, 3) for n in batches[batch]} == {2}
    loads = frame.groupby("annotator").size()
    assert loads.max() - loads.min() <= 1
    assert len(annotation.labelled(book, *drawn())) == 36 and book.missing() == 0


# -- training, halts ----------------------------------------------------------------------------------------------


def test_who_misses_the_pass_mark_gets_no_pairs(tmp_path):
    def judge(annotator, document, a, b, *, position):
        wrong = annotator == "bob" and position % 4 == 0
        return {"entities": -2 if wrong else 1, "relationships": 0, "summaries": 0}

    book = make(tmp_path / "s.sqlite")
    assert drive(book, judge) == "done"
    table = annotation.training(book).set_index("annotator")
    assert table.loc["bob", "status"] == "failed" and table.loc["bob", "met"] == 7
    assert set(table["status"].drop("bob")) == {"passed"}
    assert "bob" not in set(book.frame(kind="label")["annotator"])
    assert "failed" in set(book.table("events")["kind"])


def test_a_tie_misses_a_gold_judgement_and_too_few_annotators_stop_the_work(tmp_path):
    book = make(tmp_path / "s.sqlite")
    assert drive(book, lambda *_, position: dict.fromkeys(ASPECTS, 0)) == "short of annotators"
    assert book.frame(kind="label").empty and annotation.labelled(book, *drawn()) == []


def falling(annotator, document, a, b, *, position):
    """Everybody agrees until the 40th pair, then everybody has a mind of its own."""
    side = 1 if position < 40 or annotator in ("ann", "bob") else -1
    return {"entities": side, "relationships": 0, "summaries": 0}


def test_work_halts_where_agreement_falls_and_goes_on_after_a_note(tmp_path):
    settings_ = {"pairs": 200, "batch_pairs": 30, "trial_pairs": 0}
    book = make(tmp_path / "s.sqlite", **settings_)
    assert drive(book, falling) == "halted"
    done = int((book.table("batches")["status"] == "done").sum())
    assert 1 < done < 7 and not book.tasks()
    (halt,) = book.table("events").query("kind == 'halt'")["detail"]
    assert halt.startswith(f"batch {done}") and "1.000 after training" in halt
    assert book.advance(at=START) == "halted"  # and stays so
    assert annotation.proceed(book, resume_note="", at=START) == "halted"
    assert annotation.proceed(book, resume_note="the brief was unclear on places", at=START) == "labelling"
    assert drive(book, falling) == "halted"
    assert annotation.proceed(book, resume_note="the brief was unclear on places", at=START) == "halted"  # said before
    assert len(annotation.labelled(book, *drawn())) == 30 * (done + 1)


def test_a_program_that_tires_rests_at_a_halt_and_ends_the_work(tmp_path):
    book = make(tmp_path / "s.sqlite", pairs=200, batch_pairs=30, trial_pairs=0)
    seconds, rest = (lambda *_: 10.0), timedelta(hours=16)
    assert annotation.drive(book, falling, seconds=seconds, started=START, rest=rest) == "done"
    assert len(annotation.labelled(book, *drawn())) == 200
    events = book.table("events")
    halts, resumed = (events[events["kind"] == kind] for kind in ("halt", "resume"))
    assert len(halts) == len(resumed) >= 1
    waited = pd.to_datetime(resumed["at"]).to_numpy() - pd.to_datetime(halts["at"]).to_numpy()
    assert (waited == rest).all()
    halted = int(halts["detail"].iloc[0].removeprefix("batch ").split(":")[0])
    labels = book.frame(kind="label")
    alike = labels.groupby(["batch", "pair_id"])["preference"].nunique() == 1
    assert alike[halted].mean() < 1 and alike[halted + 1].all()  # rested, they agree again


def test_steady_agreement_does_not_halt(tmp_path):
    rng = np.random.default_rng(0)

    def judge(annotator, document, a, b, *, position):
        side = 1 if position < 10 or rng.random() < 0.85 else -1
        return {"entities": side, "relationships": 0, "summaries": 0}

    book = make(tmp_path / "s.sqlite", pairs=400, batch_pairs=50, trial_pairs=0)
    assert drive(book, judge) == "done"


# -- history ------------------------------------------------------------------------------------------------------


def test_a_second_thought_is_a_revision_and_nothing_is_lost(tmp_path):
    book = make(tmp_path / "s.sqlite")
    drive(book)
    pair, name = book.frame(kind="label")[["pair_id", "annotator"]].iloc[0]
    changed = judgement(name, pair, -2, -2, -2)
    assert book.record([changed]) == (0, 1, 0, 0)
    assert book.record([changed, changed]) == (0, 0, 2, 0)  # three clicks save once
    history = book.table("judgements").query("pair_id == @pair and annotator == @name")
    assert list(history["revision"]) == [1, 2] and list(history["entities"]) == [2, -2]
    now = book.frame().query("pair_id == @pair and annotator == @name")
    assert list(now["total"]) == [-6] and list(now["revision"]) == [2]


def test_the_database_itself_refuses_to_forget_or_to_take_nonsense(tmp_path):
    book = make(tmp_path / "s.sqlite")
    drive(book)
    book.close()
    db = sqlite3.connect(tmp_path / "s.sqlite")
    db.execute("PRAGMA foreign_keys=ON")
    columns = "pair_id, annotator, revision, entities, relationships, summaries, seconds, at"
    for statement in (
        "DELETE FROM judgements",
        "UPDATE judgements SET entities = 0",
        "DELETE FROM events",
        f"INSERT INTO judgements ({columns}) SELECT pair_id, annotator, 9, 3, 0, 0, 1, 'now' FROM assignments",
        f"INSERT INTO judgements ({columns}) SELECT pair_id, annotator, 1, 1, 0, 0, 1, 'now' FROM assignments",
        f"INSERT INTO judgements ({columns}) VALUES ('no such pair', 'ann', 1, 1, 0, 0, 1, 'now')",
        "INSERT INTO assignments (pair_id, annotator) SELECT pair_id, annotator FROM assignments",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            db.execute(statement)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_only_what_is_assigned_can_be_judged_and_training_only_until_it_is_graded(tmp_path):
    book = make(tmp_path / "s.sqlite")
    waiting = book.items(kind="label")[-1].pair_id
    first = judgement("ann", book.items(kind="trial")[0].pair_id)
    with pytest.raises(ValueError, match="not assigned to 'ann'"):
        book.record([first, judgement("ann", waiting)])
    assert book.frame().empty  # all or none
    drive(book)
    assert book.record([judgement("ann", "training-1", 2, 0, -1)]) == (0, 0, 1, 0)
    with pytest.raises(ValueError, match="is graded"):
        book.record([judgement("ann", "training-1", -1, 0, 0)])


def test_tasks_do_not_give_the_gold_judgement_away(tmp_path):
    book = make(tmp_path / "s.sqlite")
    tasks = book.tasks()
    assert len(tasks) == 4 * 14 and {task.gold for _, task in tasks} == {None}
    annotation.write_tasks(book, tmp_path / "tasks.jsonl")
    rows = read_jsonl(tmp_path / "tasks.jsonl")
    assert len(rows) == 56 and set(rows[0]) == {"annotator", "pair_id", "document_id", "document", "a", "b"}


# -- set-up -------------------------------------------------------------------------------------------------------


def test_the_same_set_up_opens_the_store_again_and_another_is_refused(tmp_path):
    book = make(tmp_path / "s.sqlite")
    book.record([judgement("ann", "training-0")])
    book.close()
    assert len(make(tmp_path / "s.sqlite").frame()) == 1
    for changes in ({"checkpoint": "other"}, {"labels": [item(n) for n in range(41)]}, {"overlap": 3}):
        with pytest.raises(ValueError, match="other pairs or settings: move it away"):
            make(tmp_path / "s.sqlite", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": 1}, "at least 2"),
        ({"annotators": ["ann"]}, "different annotators"),
        ({"annotators": ["ann", "ann"]}, "different annotators"),
        ({"trial_pairs": 40}, "leave nothing"),
        ({"training": []}, "gold judgement"),
        ({"training": [item(0, kind="training")]}, "gold judgement"),
        ({"labels": [item(0)] * 9}, "unique"),
    ],
)
def test_a_set_up_that_cannot_work_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "s.sqlite", **changes)
    assert not (tmp_path / "s.sqlite").exists()


def test_a_store_that_is_not_there_is_not_made_by_opening_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotation store"):
        store.Store(tmp_path / "s.sqlite")
    assert not list(tmp_path.iterdir())


# -- import -------------------------------------------------------------------------------------------------------


def rows_for(book: store.Store) -> list[dict]:
    return [judgement(name, task.pair_id).model_dump(mode="json") for name, task in book.tasks()]


def test_people_judge_through_files_until_all_is_done(tmp_path):
    book, path, rows = make(tmp_path / "s.sqlite"), tmp_path / "judgements.jsonl", []
    missing = [book.missing()]
    while annotation.proceed(book, resume_note="", at=START) != "done":
        rows += rows_for(book)
        write_jsonl(path, rows)
        recorded = book.read(path)
        assert recorded.new + recorded.unchanged == len(rows) and recorded.new > 0
        missing.append(book.missing())
    assert missing[0] == 56 + 36 * 2 and missing[-1] == 0
    assert len(annotation.labelled(book, *drawn())) == 36


def test_bad_lines_are_named_with_their_reason_and_nothing_is_imported(tmp_path):
    book = make(tmp_path / "s.sqlite")
    good = rows_for(book)
    bad = {
        2: good[1] | {"entities": 3},
        3: good[2] | {"pair_id": "nowhere"},
        5: good[0],
        6: {key: value for key, value in good[5].items() if key != "summaries"},
        7: good[6] | {"annotator": "zoe"},
        8: good[7] | {"seconds": -1},
        9: good[8] | {"at": "yesterday"},
        10: good[9] | {"entities": 0.5},
        11: good[10] | {"mood": "good"},
        12: good[11] | {"relationships": True},
    }
    lines = [json.dumps(bad.get(number, good[number - 1])) for number in range(1, 13)]
    lines[3] = "{not json"
    path = tmp_path / "judgements.jsonl"
    path.write_text("\n".join([*lines, "", ""]))
    with pytest.raises(ValueError, match="Nothing was imported") as error:
        book.read(path)
    named = [line.split(":")[1] for line in str(error.value).split("\n")[:-1]]
    assert named == [str(number) for number in (2, 4, 5, 6, 7, 8, 9, 10, 11, 12)]  # 3 is of another round
    assert "not assigned to" in str(error.value) and "in line 1 already" in str(error.value)
    assert book.frame().empty


# -- many writers, kills ------------------------------------------------------------------------------------------

_WRITER = """
import sys
from erlib.judgements import store
from erlib.task.schema import ASPECTS
path, name, mode = sys.argv[1:]
book = store.Store(path)
print("ready", flush=True)
sys.stdin.readline()
for who, task in book.tasks():
    if who == name:
        scores = dict(zip(ASPECTS, (1, 0, -2)))
        made = store.Judgement(annotator=name, pair_id=task.pair_id, seconds=1, at="2026-01-01T09:00:00Z", **scores)
        book.record([made])
        if mode == "told":
            print(task.pair_id, flush=True)
"""


def writer(path: Path, name: str, mode: str = "quiet") -> subprocess.Popen:
    command = [sys.executable, "-c", _WRITER, str(path), name, mode]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "s.sqlite"
    book = make(path, training=[item(n, gold="A", kind="training") for n in range(60)])
    processes = [writer(path, name) for name in NAMES[:2] for _ in range(2)]  # two windows each, both save everything
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert len(book.frame()) == 2 * 64 == len(book.table("judgements"))  # once each, whoever was first
    assert {name for name, _ in book.tasks()} == set(NAMES[2:])


def test_what_was_said_to_be_saved_survives_kill_9(tmp_path):
    path = tmp_path / "s.sqlite"
    make(path, training=[item(n, gold="A", kind="training") for n in range(400)]).close()
    process = writer(path, "ann", "told")
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    told = [process.stdout.readline().strip() for _ in range(25)]
    os.kill(process.pid, signal.SIGKILL)
    told += [line for line in process.stdout.read().split("\n")[:-1]]
    process.wait()
    book = store.Store(path)
    assert book._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    saved = set(book.frame()["pair_id"])
    assert set(told) <= saved and len(saved) <= len(told) + 1
    assert drive(book) == "done"  # and the work goes on


def test_a_kill_in_the_middle_of_a_transaction_leaves_none_of_it(tmp_path):
    path = tmp_path / "s.sqlite"
    make(path, training=[item(n, gold="A", kind="training") for n in range(300)]).close()
    source = _WRITER.replace(
        "book.record([made])",
        "book._db.in_transaction or book._db.execute('BEGIN IMMEDIATE'); store._record(book._db, made)",
    )
    command = [sys.executable, "-c", source, str(path), "ann", "told"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdin.write("go\n")
    process.stdin.flush()
    for _ in range(200):
        process.stdout.readline()
    process.kill()
    process.wait()
    assert store.Store(path).frame().empty


# -- what comes out -----------------------------------------------------------------------------------------------


def test_preferences_are_signs_of_mean_sums_and_read_back(tmp_path):
    votes = {"ann": (2, 2, 0), "bob": (1, -2, 0), "cem": (-1, -2, 0), "dea": (0, 0, 0)}

    def judge(annotator, document, a, b, *, position):
        return dict(zip(ASPECTS, (1, 0, 0) if position < 14 else votes[annotator], strict=True))

    book = make(tmp_path / "s.sqlite", pairs=12, trial_pairs=4)
    assert drive(book, judge) == "done"
    samples, pairs = drawn()
    table = annotation.export(book, tmp_path, samples=samples, pairs=pairs, seed=0)
    found = annotation.read_preferences(tmp_path / "preferences.jsonl", checkpoint="c0ffee")
    assert found == annotation.labelled(book, *drawn()) and len(found) == 8
    assert found[0].prompt.endswith("\nReport:\n") and found[0].score == 0 and found[0].preference == "tie"
    assert sorted(found[0].votes) == ["A", "B", "B", "tie"]
    assert found[0].aspects == {"entities": 0.5, "relationships": -0.5, "summaries": 0.0}
    value = table.set_index(["subject", "measure"])["value"]["preference", "raw agreement"]
    assert value == pytest.approx(1 / 6)  # of six pairs of votes one is equal, B and B
    with pytest.raises(ValueError, match=r"preferences.jsonl:1: .*checkpoint c0ffee.*bead"):
        annotation.read_preferences(tmp_path / "preferences.jsonl", checkpoint="bead")
    with open(tmp_path / "preferences.jsonl", "a") as file:
        file.write('{"pair_id": "x"}\n')
    with pytest.raises(ValueError, match=r"preferences.jsonl:9: "):
        annotation.read_preferences(tmp_path / "preferences.jsonl", checkpoint="c0ffee")


def test_a_preference_has_the_token_ids_that_were_sampled_for_its_sides(tmp_path):
    book = make(tmp_path / "s.sqlite")
    drive(book)
    samples, pairs = drawn()
    for found in annotation.labelled(book, samples, pairs):
        number = int(found.pair_id.removeprefix("pair-"))
        assert (found.a_ids, found.b_ids) == ((number, 0), (number, 1))
        assert (found.a, found.b) == (item(number).a, item(number).b)
    laid = annotation.items(samples, pairs)
    assert [(one.a, one.b) for one in laid[:6]] == [("Korvex|organisation", "none")] * 6
    with pytest.raises(KeyError):
        annotation.labelled(book, samples, pairs[:3])


def test_the_export_holds_everything_and_the_same_work_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        book = make(tmp_path / f"{name}.sqlite")
        drive(book)
        samples, pairs = drawn()
        annotation.export(book, tmp_path / name, samples=samples, pairs=pairs, seed=0)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["agreement.csv", "judgements.jsonl", "preferences.jsonl", "store.sqlite"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    rows = read_jsonl(tmp_path / "one" / "judgements.jsonl")
    assert len(rows) == len(book.frame()) and {row["kind"] for row in rows} == {"trial", "training", "label"}
    assert len(store.Store(tmp_path / "one" / "store.sqlite").frame()) == len(rows)


def test_driving_on_after_a_stop_gives_the_same_as_driving_through(tmp_path):
    def judge(annotator, document, a, b, *, position):
        return {"entities": 1 if position < 14 else (position % 5) - 2, "relationships": 0, "summaries": 0}

    class Killed(Exception):
        pass

    def stops(annotator, document, a, b, *, position):
        if position == 25:
            raise Killed
        return judge(annotator, document, a, b, position=position)

    through, stopped = make(tmp_path / "a.sqlite"), make(tmp_path / "b.sqlite")
    drive(through, judge)
    with pytest.raises(Killed):
        drive(stopped, stops)
    assert drive(stopped, judge) == "done"
    assert through.frame().equals(stopped.frame())


def test_forecast_and_cost_add_up(tmp_path):
    book = make(tmp_path / "s.sqlite")
    before = annotation.forecast(book, hourly_wage=20.0)
    assert before["missing"] == 56 + 72 and before["cost so far"] == 0 and np.isnan(before["per annotator-hour"])
    rows = [judgement(name, task.pair_id, seconds=36) for name, task in book.tasks()]
    book.record(rows)
    now = annotation.forecast(book, hourly_wage=20.0)
    assert now["per annotator-hour"] == 100 and now["hours so far"] == pytest.approx(0.56)
    assert now["cost at the end"] == pytest.approx((0.56 + 0.72) * 20) and now["hours to the end"] == pytest.approx(
        0.18
    )


def test_the_position_bias_of_an_annotator_shows(tmp_path):
    def judge(annotator, document, a, b, *, position):
        even = int(document.split()[1]) % 2
        return dict.fromkeys(ASPECTS, 1 if position < 14 or annotator == "ann" else 2 * even - 1)

    book = make(tmp_path / "s.sqlite", pairs=120, batch_pairs=116)
    drive(book, judge)
    table = annotation.annotators(book, hourly_wage=20.0).set_index("annotator")
    assert table.loc["ann", "low"] > 0.5 and (table["low"].drop("ann") < 0.5).all()


def test_training_pairs_differ_clearly_and_name_the_better_report():
    names = ("Korvex", "Tamulia", "Ostidyne", "Velmont")
    entities = [Entity(name=name, type="organisation") for name in names]
    document = {"id": "gold-1", "text": f"{', '.join(names)} are named here."}
    exemplar = Exemplar.model_validate({"document": document, "report": Report(entities=entities).model_dump()})
    brief = read_brief(Path(__file__).parents[2] / "params" / "brief.yml")
    kept = {"all": 4, "most": 3, "little": 0}
    reports = {name: {"gold-1": Report(entities=entities[:n])} for name, n in kept.items()}
    made = annotation.training_items([exemplar], reports, brief=brief, n=10, seed=0)
    assert len({one.pair_id for one in made}) == len(made) <= 2  # all against most differs by one entity: left out
    for one in made:
        assert (one.gold == "A") == (len(one.a) > len(one.b))
        assert {one.a, one.b} <= {to_compact(Report(entities=entities[:n])) for n in kept.values()}


def test_guidelines_name_every_kind_of_the_brief():
    brief = read_brief(Path(__file__).parents[2] / "params" / "brief.yml")
    text = annotation.guidelines(brief)["what counts"].str.cat(sep="\n")
    assert all(kind.description in text for kind in (*brief.entities, *brief.relationships))
    assert brief.summaries in text


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=30))
def test_a_choice_is_the_sign_of_the_sum(scores):
    for score in scores:
        total = sum(score)
        assert store.choice(total) == ("A" if total > 0 else "B" if total < 0 else "tie")
