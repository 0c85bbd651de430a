"""Tickets: what an alarm of `drift` asks people to repeat, why, and which documents drive it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from erlib.chain.manifest import write_text
from erlib.task.schema import Document
from erlib.watch.drift import DETECTORS, Features, rows
from erlib.watch.stretches import require_dated


class Step(NamedTuple):
    """A phase to repeat, and why."""

    phase: str
    reason: str


def to_repeat(fired: Iterable[str], *, watched: Iterable[str] = ("inputs", "outputs", "rewards")) -> list[Step]:
    """Say which phases to repeat, first things first, from the detectors that fired and the watches that were kept."""
    names = set(fired)
    watches = {DETECTORS[name].watch for name in names}
    moved, steps = "inputs" in watches, []
    if names & {"entity types, G", "relationship types, G"}:
        steps.append(Step("01_prompts", "kinds of item come in other shares: does the brief still name what matters?"))
    if moved and watches - {"inputs"}:
        steps.append(Step("02_corpus", "documents are unlike those trained on: have the frontier report on new ones"))
    if "parse rate, Fisher" in names:
        fix = "SFT on such documents" if moved else "is it the policy released, served as it was? If so, repeat SFT"
        steps.append(Step("03_sft", f"more reports cannot be read: {fix}"))
    elif names & {"relationships a report, KS", "report length, KS"}:
        because = "with the documents" if moved else "though the documents did not: is it still the policy released?"
        steps.append(Step("03_sft", f"reports changed in size, {because}"))
    if "rewards" in watches:
        cause = "on such documents" if moved else "with inputs unchanged"
        steps.append(Step("04_sampling", f"rewards moved {cause}: a preference round (04 to 07) on new samples"))
    if watches == {"inputs"}:
        intact = (
            "reports and rewards did not" if {"outputs", "rewards"} <= set(watched) else "reports were not looked at"
        )
        steps.append(Step("02_corpus", f"documents changed, {intact}: watch on, and add such documents to the corpus"))
    return steps


def ticket(
    reference: Features,
    window: Features,
    documents: Sequence[Document],
    fired: pd.DataFrame,
    *,
    stream: str,
    examples: int = 3,
) -> dict[str, Any]:
    """Open a ticket for a window of documents: detectors (rows of `watch`), dates, phases to repeat, and the
    documents that drive each detector.

    Raises ValueError where no detector of `fired` did fire.
    """
    fired = fired[fired["fired"]]
    if fired.empty:
        raise ValueError("no detector fired: there is nothing to open a ticket for")
    alarms: list[dict[str, Any]] = []
    driving: dict[str, dict[str, Any]] = {}
    for row in fired.itertuples():
        group, feature, _, influence = DETECTORS[row.detector]
        alarm = {"detector": row.detector, "watch": group}
        alarm |= {"statistic": float(row.statistic), "threshold": float(row.threshold)}
        if reference[feature].ndim == 1:
            alarm |= {"reference_mean": float(reference[feature].mean()), "window_mean": float(window[feature].mean())}
        alarms.append(alarm)
        weights = influence(reference[feature], window[feature])
        for place in np.argsort(-weights, kind="stable")[:examples]:
            shown = documents[place].model_dump(include={"id", "date", "text"})
            shared = driving.setdefault(documents[place].id, shown | {"influence": {}})
            shared["influence"][row.detector] = float(weights[place])
    watched = {detector.watch for detector in DETECTORS.values() if detector.feature in window}
    steps = to_repeat(fired["detector"], watched=watched)
    dates = require_dated(documents)
    return {
        "stream": stream,
        "opened": dates[-1].isoformat(),
        "from": {"id": documents[0].id, "date": documents[0].date},
        "to": {"id": documents[-1].id, "date": documents[-1].date},
        "n_documents": len(documents),
        "alarms": alarms,
        "repeat_from": min(step.phase for step in steps),
        "steps": [step._asdict() for step in steps],
        "documents": list(driving.values()),
    }


def first_ticket(
    reference: Features,
    features: Features,
    documents: Sequence[Document],
    watched: pd.DataFrame,
    *,
    stream: str,
    after: int = 0,
    dates: Sequence[str | None] = (),
) -> dict[str, Any] | None:
    """Open a ticket for the first window of a stream with an alarm that ends after place `after`; None without one.

    `watched` are the rows of `drift.watch`. Planted documents come from another time: with `dates`, the documents of
    the window take these, in their order.
    """
    late = watched[watched["fired"] & (watched["end"] > after)]
    if late.empty:
        return None
    now = watched[watched["window"] == late["window"].min()]
    span = slice(now["first"].iloc[0], now["end"].iloc[0])
    shown = list(documents[span])
    if dates:
        shown = [each.model_copy(update={"date": date}) for each, date in zip(shown, dates, strict=False)]
    return ticket(reference, rows(features, span), shown, now, stream=stream)


def ticket_text(opened: Mapping[str, Any]) -> str:
    """Word a ticket for people; every line of a document is marked, so that it cannot pass for the ticket's own."""
    lines = [f"Drift in {opened['stream']}: repeat from {opened['repeat_from']}", ""]
    lines += [f"opened {opened['opened']} on {opened['n_documents']} documents,"]
    lines += [f"{opened['from']['id']} to {opened['to']['id']}", "", "What to repeat, and why"]
    lines += [f"  {step['phase']}: {step['reason']}" for step in opened["steps"]]
    lines += ["", "What fired"]
    for alarm in opened["alarms"]:
        means = f"; mean {alarm['reference_mean']:.4g} → {alarm['window_mean']:.4g}" if "window_mean" in alarm else ""
        lines.append(f"  {alarm['detector']}: {alarm['statistic']:.4g}, threshold {alarm['threshold']:.4g}{means}")
    lines += ["", "Documents that drive it"]
    for document in opened["documents"]:
        lines.append(f"  {document['id']}, {document['date']} ({'; '.join(document['influence'])})")
        lines += [f"  | {line}" for line in document["text"].splitlines()]
    return "\n".join(lines) + "\n"


def write_ticket(opened: Mapping[str, Any], path: Path) -> None:
    """Write a ticket as `<path>.json` and, for people, `<path>.txt`; each file appears complete or not at all."""
    written = {".json": json.dumps(opened, indent=1, ensure_ascii=False, allow_nan=False) + "\n"}
    written[".txt"] = ticket_text(opened)
    for suffix, text in written.items():
        write_text(path.with_name(path.name + suffix), text)
