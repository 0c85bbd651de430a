"""People's judgements outlive the run that they were given in: they are known by what was judged."""

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from erlib.chain import manifest
from erlib.judgements import annotation, contests, kept, store
from erlib.task.schema import ASPECTS, Brief, Document, Entity, Kind, Report

START = datetime(2026, 1, 1, 9, tzinfo=UTC)
PEOPLE = ["anna", "ben", "carla"]
BRIEF = Brief(
    client="a desk",
    purpose="to know",
    summaries="short",
    entities=[Kind(type="firm", description="a company", example="Korvex")],
    relationships=[Kind(type="makes", description="sells", example="Korvex makes the Loopa")],
)


def judged(annotator="anna", score=2, *, at=START, pair_id="p"):
    return store.Judgement(annotator=annotator, pair_id=pair_id, seconds=5, at=at, **dict.fromkeys(ASPECTS, score))


@pytest.fixture
def known(tmp_path):
    return kept.Kept(tmp_path / "judgements.sqlite", BRIEF)


# -- the file -----------------------------------------------------------------------------------------------------


def test_the_same_texts_are_the_same_question_in_either_order_under_any_id(known):
    known.add([kept.Answer("text", "A|firm", "none", judged(score=2))])
    assert known.known("x", "text", "A|firm", "none")["anna"].entities == 2
    other = known.known("y", "text", "none", "A|firm")["anna"]
    assert (other.pair_id, other.entities, other.seconds, other.at) == ("y", -2, 5, START)
    assert known.known("x", "text!", "A|firm", "none") == {}
    assert known.known("x", "text", "A|firm", "B|firm") == {}
    assert known.known("x", "text", "A|firm", "none", turn=2) == {}  # asked again to see whether the order matters


def test_another_brief_is_another_question(known, tmp_path):
    known.add([kept.Answer("text", "A|firm", "none", judged())])
    other = kept.Kept(tmp_path / "judgements.sqlite", BRIEF.model_copy(update={"purpose": "to sell"}))
    assert other.known("x", "text", "A|firm", "none") == {}


def test_the_latest_answer_counts_and_the_same_again_changes_nothing(known):
    first, later = judged(score=2), judged(score=-1, at=START.replace(hour=10))
    assert known.add([kept.Answer("text", "a", "b", later), kept.Answer("text", "a", "b", first)]) == 2
    assert known.add([kept.Answer("text", "b", "a", first.model_copy(update=dict.fromkeys(ASPECTS, -2)))]) == 0
    assert known.known("x", "text", "a", "b")["anna"].entities == -1


def test_a_write_is_whole_or_not_at_all_also_where_it_is_killed(known, tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(sys.path[0])!r})
from erlib.judgements import kept
from test_kept import BRIEF, judged
def answers():
    for n in range(100):
        if n == 60: os.kill(os.getpid(), signal.SIGKILL)
        yield kept.Answer(f"text {{n}}", "a", "b", judged())
kept.Kept({str(known.path)!r}, BRIEF).add(answers())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=__file__.rpartition("/")[0], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert known.known("x", "text 0", "a", "b") == {}
    assert known.add(kept.Answer(f"text {n}", "a", "b", judged()) for n in range(100)) == 100


def test_two_phases_write_at_once_and_nothing_is_lost(known):
    script = f"""
import sys
from erlib.judgements import kept
from test_kept import BRIEF, judged
book, name = kept.Kept({str(known.path)!r}, BRIEF), sys.argv[1]
for n in range(50):
    book.add([kept.Answer(f"text {{n}}", "a", "b", judged(name))])
"""
    here = __file__.rpartition("/")[0]
    writers = [subprocess.Popen([sys.executable, "-c", script, name], cwd=here) for name in PEOPLE]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert all(sorted(known.known("x", f"text {n}", "a", "b")) == PEOPLE for n in range(50))


def test_what_is_kept_is_no_input_of_a_phase(known, tmp_path):
    found = manifest._inputs({manifest.KEPT: str(known.path), "judgements": str(known.path)})
    assert len(found) == 1


# -- a round ------------------------------------------------------------------------------------------------------


def label(number, text, *, swapped=False):
    a, b = (text, "none") if not swapped else ("none", text)
    fields = {"pair_id": f"{text}/{swapped}/{number}", "document_id": f"d{number}", "split": "train"}
    return store.Item(**fields, document=f"Korvex {number} sells.", a=a, b=b)


def training(n=4):
    fields = {"split": "training", "gold": "A", "b": "none", "a": "Korvex|firm"}
    return [store.Item(pair_id=f"t{i}", document_id=f"t{i}", document=f"Training {i}.", **fields) for i in range(n)]


def book(path, labels, *, seed=0):
    rules = store.Rules(trial_pairs=2, batch_pairs=6, overlap=2, pass_mark=0.5, seed=seed)
    made = {"checkpoint": "c", "labels": labels, "training": training(), "annotators": PEOPLE}
    return store.create(path, rules, **made)


def prefer_reports(waiting):
    """What people say who prefer any report to none."""
    return [judged(name, 1 if item.a != "none" else -1, pair_id=item.pair_id) for name, item in waiting]


def work(run, known, answer=prefer_reports):
    """People judge until all is done; gives how many judgements they were asked for, and how many were known."""
    asked = taken = 0
    while True:
        state, found = kept.move_on(run, known, resume_note="", at=START)
        taken += found
        waiting = run.tasks()
        if state == "done":
            return asked, taken
        asked += len(waiting)
        run.record(answer(waiting))


def test_a_rerun_in_which_half_of_the_completions_changed_asks_for_the_other_half_alone(known, tmp_path):
    before = [label(n, f"Korvex {n}|firm") for n in range(20)]
    first = book(tmp_path / "first.sqlite", before)
    asked, taken = work(first, known)
    assert taken == 0
    after = [label(n, f"Korvex {n}|firm{'|new' * (n % 2)}", swapped=n % 4 == 0) for n in range(20)]
    (tmp_path / "renamed run").mkdir()
    second = book(tmp_path / "renamed run/second.sqlite", after, seed=5)  # others get other pairs
    asked_again, taken = work(second, known)
    assert 0 < asked_again < 0.7 * asked
    assert taken + asked_again == len(second.frame())
    assert taken > 0.4 * asked
    unchanged = second.frame(kind="label").query("pair_id.str.contains('new') == False", engine="python")
    labels = {row.pair_id: row.preference for row in unchanged.itertuples()}
    assert labels and all(sign == (-1 if "/True/" in pair else 1) for pair, sign in labels.items())


def test_a_rerun_of_the_same_asks_nobody(known, tmp_path):
    labels = [label(n, f"Korvex {n}|firm") for n in range(20)]
    work(book(tmp_path / "first.sqlite", labels), known)
    second = book(tmp_path / "second.sqlite", labels)
    assert work(second, known) == (0, len(second.frame()))
    third = book(tmp_path / "third.sqlite", labels, seed=3)  # the trial and the first batch are others: all judge those
    asked, taken = work(third, known)
    assert 0 < asked < 0.25 * taken


def test_one_file_of_judgements_serves_all_rounds(known, tmp_path):
    rounds = [book(tmp_path / f"{r}.sqlite", [label(n, f"Round {r}|firm") for n in range(20)]) for r in (1, 2)]
    rows = [row for run in rounds for row in prefer_reports(run.tasks())]
    trial = [row for row in rows if row.pair_id.startswith("Round 1")]
    path = tmp_path / "judgements.jsonl"
    unique = {(row.annotator, row.pair_id): row for row in rows}
    path.write_text("".join(row.model_dump_json() + "\n" for row in unique.values()))
    read = rounds[0].read(path)
    assert read.elsewhere == len(unique) - read.new > 0
    assert read.new >= len(trial)


# -- contests -----------------------------------------------------------------------------------------------------


def planned(summaries, *, seed=0, systems=("PPO", "SFT"), both_orders=0.0):
    documents = [Document(id=f"d{i}", text=f"Korvex {i} bought Velia Labs.") for i in range(len(summaries))]
    names = [f"Korvex {i}" for i in range(len(summaries))]
    one = [Report(entities=(Entity(name=n, type="firm", summary=s),)) for n, s in zip(names, summaries, strict=True)]
    other = [Report(entities=(Entity(name=n, type="firm"),)) for n in names]
    reports = dict(zip(systems, (one, other), strict=True))
    return contests.plan(documents, reports, [systems], PEOPLE, each=2, both_orders=both_orders, seed=seed)


def answers_to(found, path):
    """A file of people's answers who prefer a report with a summary."""
    rows = [
        judged(name, 1 if len(one.a) > len(one.b) else -1, pair_id=one.id).model_dump(mode="json")
        for name, queue in found.queued.items()
        for one in queue
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_contests_of_a_rerun_ask_only_for_what_changed(known, tmp_path):
    first = planned(["grid"] * 8)
    kept.gather(first, known, answers=answers_to(first, tmp_path / "a.jsonl"))
    again = kept.gather(planned(["grid"] * 8, seed=7, systems=("DPO", "SFT")), known)
    assert (len(again.votes), again.known) == (16, 16)  # by lot in other orders, to other people, of another name
    assert all(vote.preferred() == "DPO" for vote in again.votes)
    half = planned(["grid", "sun"] * 4)
    assert len(kept.gather(half, known).votes) == 8


def test_the_second_time_in_the_other_order_is_asked_all_the_same(known, tmp_path):
    once = planned(["grid"] * 8)
    kept.gather(once, known, answers=answers_to(once, tmp_path / "a.jsonl"))
    twice = planned(["grid"] * 8, both_orders=1.0)
    assert len(kept.gather(twice, known).votes) == 16
    assert twice.wanted == 32


def test_what_a_program_judges_is_not_kept(tmp_path):
    """Only `ask` without a judge and `move_on` write, and 05 calls the latter for people alone."""
    found = planned(["grid"] * 4)
    asked = kept.ask(found, judge=equal, file=tmp_path / "kept.sqlite", brief=BRIEF)
    assert (asked.missing, asked.known) == (0, 0) and not (tmp_path / "kept.sqlite").exists()
    cells = manifest.code_cells(manifest.ROOT / "notebooks" / "05_annotation.ipynb")
    (cell,) = [cell for cell in cells if "kept.Kept(" in cell]
    assert cell.index("annotation.drive(") < cell.index("else:") < cell.index("kept.Kept(")
    assert annotation.drive.__module__ != kept.__name__


def equal(annotator, document, a, b, *, position):
    return dict.fromkeys(ASPECTS, 0)
