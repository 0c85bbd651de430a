"""Which phase an alarm asks to repeat, and what its ticket shows."""

import json

import numpy as np
import pandas as pd
import pytest

from erlib.task.schema import Document
from erlib.watch import drift, tickets


@pytest.mark.parametrize(
    ("fired", "phases", "why"),
    [
        (["words, MMD"], ["02_corpus"], "reports and rewards did not"),
        (["layout, MMD", "length, KS"], ["02_corpus"], "watch on"),
        (["parse rate, Fisher"], ["03_sft"], "cannot be read"),
        (["report length, KS"], ["03_sft"], "still the policy released"),
        (["length, KS", "report length, KS"], ["02_corpus", "03_sft"], "with the documents"),
        (["reward, KS"], ["04_sampling"], "with inputs unchanged"),
        (["words, MMD", "reward, KS"], ["02_corpus", "04_sampling"], "on such documents"),
        (["entity types, G"], ["01_prompts"], "brief"),
        (["words, classifier", "relationship types, G"], ["01_prompts", "02_corpus"], "brief"),
    ],
)
def test_what_fired_says_which_phases_to_repeat(fired, phases, why):
    steps = tickets.to_repeat(fired)
    assert [step.phase for step in steps] == phases
    assert why in "; ".join(step.reason for step in steps)


def test_a_watch_that_was_not_kept_is_not_called_intact():
    (step,) = tickets.to_repeat(["words, MMD"], watched={"inputs"})
    assert "reports were not looked at" in step.reason


@pytest.fixture
def alarm():
    """A window of ten documents, the last two of them long, and the alarm of the length detector."""
    reference = {"characters": np.arange(100.0), "unparsable": np.zeros(100)}
    window = {"characters": np.array([150.0] * 8 + [900.0, 800.0]), "unparsable": np.zeros(10)}
    texts = ["short post"] * 8 + ["long\nDrift in nothing: all is well", "<script>alert(1)</script>"]
    documents = [
        Document(id=f"post-{n}", text=text, date=f"2025-03-{n + 1:02}T08:00:00Z") for n, text in enumerate(texts)
    ]
    thresholds = pd.Series({"length, KS": 0.4, "parse rate, Fisher": 2.0})
    return reference, window, documents, drift.watch(reference, window, thresholds, window=10)


def test_a_ticket_names_phase_dates_statistics_and_driving_documents(alarm, tmp_path):
    reference, window, documents, fired = alarm
    opened = tickets.ticket(reference, window, documents, fired, stream="posts", examples=2)
    assert opened["stream"] == "posts"
    assert opened["opened"] == "2025-03-10T08:00:00+00:00"
    assert (opened["from"]["id"], opened["to"]["id"], opened["n_documents"]) == ("post-0", "post-9", 10)
    (only,) = opened["alarms"]
    assert only == {
        "detector": "length, KS", "watch": "inputs", "statistic": 1.0, "threshold": 0.4,
        "reference_mean": 49.5, "window_mean": 290.0,
    }  # fmt: skip
    assert opened["repeat_from"] == "02_corpus"
    assert [document["id"] for document in opened["documents"]] == ["post-8", "post-9"]
    assert opened["documents"][0]["influence"] == {"length, KS": pytest.approx(850.5)}

    tickets.write_ticket(opened, tmp_path / "posts")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["posts.json", "posts.txt"]
    assert json.loads((tmp_path / "posts.json").read_text(encoding="utf-8")) == opened
    text = (tmp_path / "posts.txt").read_text(encoding="utf-8")
    assert text.startswith("Drift in posts: repeat from 02_corpus\n")
    assert "length, KS: 1, threshold 0.4; mean 49.5 → 290" in text
    assert "\n  | Drift in nothing: all is well\n" in text  # a document cannot word a line of the ticket
    assert text.count("\nDrift in") == 0


def test_a_document_that_drives_two_detectors_is_shown_once(alarm):
    reference, window, documents, fired = alarm
    both = fired.assign(fired=True)
    window = window | {"unparsable": np.array([0.0] * 8 + [1.0, 1.0])}
    opened = tickets.ticket(reference, window, documents, both, stream="posts", examples=2)
    assert [document["id"] for document in opened["documents"]] == ["post-8", "post-9"]
    assert list(opened["documents"][0]["influence"]) == ["length, KS", "parse rate, Fisher"]
    assert [step["phase"] for step in opened["steps"]] == ["02_corpus", "03_sft"]


def test_no_ticket_without_an_alarm(alarm):
    reference, window, documents, fired = alarm
    with pytest.raises(ValueError, match="no detector fired"):
        tickets.ticket(reference, window, documents, fired.assign(fired=False), stream="posts")


def test_the_first_alarm_after_a_change_opens_the_ticket():
    reference = {"characters": np.arange(100.0)}
    stream = {"characters": np.concatenate([np.full(10, 500.0), np.arange(0.0, 100, 10), np.full(20, 900.0)])}
    documents = [Document(id=f"post-{n}", text="text", date=f"2025-03-{n % 28 + 1:02}") for n in range(40)]
    documents.sort(key=lambda document: document.date)
    watched = drift.watch(reference, stream, pd.Series({"length, KS": 0.9}), window=10)
    assert watched["fired"].tolist() == [True, False, True, True]
    first = tickets.first_ticket(reference, stream, documents, watched, stream="s")
    assert first["from"]["id"] == documents[0].id and first["n_documents"] == 10
    planted = tickets.first_ticket(
        reference, stream, documents, watched, stream="s", after=15, dates=["2026-01-01"] * 10
    )
    assert planted["from"] == {"id": documents[20].id, "date": "2026-01-01"}
    assert tickets.first_ticket(reference, stream, documents, watched[watched["window"] == 1], stream="s") is None
