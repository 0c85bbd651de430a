"""Annotation of a round: what annotators are told, how they are trained, who drives them, and the labels at the end.

`store` keeps the judgements and the rules; this module lays samples out as pairs, makes training pairs with gold
judgements, runs any `judge` callable through the store, measures rate and cost, and writes what later phases train on.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from erlib.judgements import agreement
from erlib.judgements.store import Choice, Item, Judgement, State, Store, choice
from erlib.task import evaluation, jsonl, metrics, utility
from erlib.task.forms import short_prompt, to_compact
from erlib.task.jsonl import write_jsonl
from erlib.task.schema import ASPECTS, Brief, Exemplar, Name, Report

if TYPE_CHECKING:
    from erlib.judgements.sampling import Pair, Sampled

CLEAR = 2.0  # difference in summed utility from which nobody careful disagrees: two of two items missed, and more
Judge = Callable[..., Mapping[str, int]]  # judge(annotator, document, a, b, position=...) -> {aspect: -2..2}


class Preference(BaseModel):
    """The label of one pair: the sign of the mean summed score of its annotators, with all that it comes from.

    `a` and `b` are the texts that were judged, `a_ids` and `b_ids` the token ids that were sampled: rewards are trained
    on them and given to them, and nothing is tokenised again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    pair_id: Name
    document_id: Name
    split: str
    checkpoint: str
    prompt: str
    a: str
    b: str
    a_ids: tuple[int, ...]
    b_ids: tuple[int, ...]
    preference: Choice
    score: float
    votes: tuple[Choice, ...]
    aspects: dict[str, float]


# -- what is judged -----------------------------------------------------------------------------------------------


def guidelines(brief: Brief) -> pd.DataFrame:
    """What annotators are told, drawn from the brief: columns aspect, question, what counts."""
    kinds = (("entities", brief.entities), ("relationships", brief.relationships))
    listed = {
        (name, wanted): "; ".join(f"{kind.type}: {kind.description}" for kind in every if kind.wanted == wanted)
        for name, every in kinds
        for wanted in (True, False)
    }
    questions = {
        "entities": "Which report names what the client wants more completely and more accurately?",
        "relationships": "Which report infers the key relationships better, stated or implied?",
        "summaries": "Which report's summaries are more concise and more accurate?",
    }
    counts = {name: f"Wanted: {listed[name, True]}\nTo be left out: {listed[name, False]}" for name, _ in kinds}
    counts["summaries"] = brief.summaries
    scale = (
        "Choose for each aspect: A or B much better (2), A or B better (1), a tie (0). The sum decides the preference."
    )
    rows = [(aspect, questions[aspect], counts[aspect]) for aspect in ASPECTS]
    return pd.DataFrame([*rows, ("all", brief.purpose, scale)], columns=["aspect", "question", "what counts"])


def items(samples: "Iterable[Sampled]", pairs: "Iterable[Pair]") -> list[Item]:
    """Lay the pairs of `sampling` out for annotators; KeyError for a pair of a document that was not sampled."""
    by_document = {sampled.document.id: sampled for sampled in samples}
    laid = []
    for pair in pairs:
        sampled = by_document[pair.document_id]
        a, b = (sampled.completions[index].text for index in (pair.a, pair.b))
        document = sampled.document
        laid.append(Item(pair_id=pair.id, document_id=document.id, split=pair.split, document=document.text, a=a, b=b))
    return laid


def read_reports(files: Mapping[str, Path]) -> dict[str, dict[str, Report]]:
    """Read the predictions of several systems, a file each: system → document id → report."""
    reports = {}
    for name, file in files.items():
        documents, predicted = evaluation.read_predictions(file)
        reports[name] = {document.id: found.report for document, found in zip(documents, predicted, strict=True)}
    return reports


def training_items(
    exemplars: Iterable[Exemplar], reports: Mapping[str, Mapping[str, Report]], *, brief: Brief, n: int, seed: int
) -> list[Item]:
    """Make `n` training pairs from hand-corrected exemplars: two systems' reports of one, the better one known.

    `reports` holds the reports by system and document id. The gold judgement is the sign of the difference in summed
    utility beside the exemplar's own report. Used are pairs that differ by more than `CLEAR`, and of those the ones
    that differ least, because blatant ones teach and test nothing; fewer than `n` where there are no more.
    """
    rng = np.random.default_rng(seed)
    made: list[tuple[float, Item]] = []
    for exemplar in exemplars:
        document = exemplar.document
        known = {name: to_compact(found[document.id]) for name, found in reports.items() if document.id in found}
        for one, other in combinations(sorted(known), 2):
            a, b = (one, other) if rng.random() < 0.5 else (other, one)
            worth = [
                sum(utility.by_aspect(document.text, exemplar.report, known[name], brief=brief).values())
                for name in (a, b)
            ]
            gap = worth[0] - worth[1]
            if abs(gap) > CLEAR:
                fields = {"pair_id": f"training {document.id}#{a}-{b}", "document_id": document.id, "split": "training"}
                texts = {"document": document.text, "a": known[a], "b": known[b]}
                made.append((abs(gap), Item(**fields, **texts, gold=choice(gap))))
    return [item for _, item in sorted(made, key=lambda one: one[0])[:n]]


# -- who judges ---------------------------------------------------------------------------------------------------


def drive(
    store: Store,
    judge: Judge,
    *,
    seconds: Callable[[str, str, str, str], float],
    started: datetime,
    rest: timedelta | None = None,
) -> State:
    """Let a `judge` callable do all that is assigned, batch after batch, until the store is done or stops.

    Every annotator has a clock that begins at `started` and goes on by `seconds(annotator, document, a, b)`. All that
    is assigned at one time is written in one transaction: a judge that is a program can be asked again after a kill.
    With `rest`, a halt sends everybody home for as long: the work goes on, and `position`, by which a judge tires,
    counts from 0 again. Without, a halt ends it.
    """
    before = store.frame()
    position = Counter(before["annotator"])
    clocks = {
        name: started + timedelta(seconds=taken) for name, taken in before.groupby("annotator")["seconds"].sum().items()
    }
    while True:
        now = max(clocks.values(), default=started)
        state = store.advance(at=now)
        if state == "halted" and rest:
            clocks = dict.fromkeys(clocks, now + rest)
            position.clear()
            store.resume(note=f"everybody rested for {rest.total_seconds() / 3600:g} hours", at=now + rest)
            continue
        tasks = store.tasks()
        if not tasks:
            return state
        judgements = []
        for name, item in tasks:
            scores = judge(name, item.document, item.a, item.b, position=position[name])
            taken = seconds(name, item.document, item.a, item.b)
            position[name] += 1
            clocks[name] = clocks.get(name, started) + timedelta(seconds=taken)
            key = {"annotator": name, "pair_id": item.pair_id, "seconds": taken, "at": clocks[name]}
            judgements.append(Judgement(**key, **scores))
        store.record(judgements)


def proceed(store: Store, *, resume_note: str, at: datetime) -> State:
    """Move people's work on; a halt is lifted by a `resume_note` that was not given before."""
    state = store.advance(at=at)
    if state == "halted" and resume_note and resume_note not in set(store.table("events")["detail"]):
        store.resume(note=resume_note, at=at)
        state = store.advance(at=at)
    return state


def write_tasks(store: Store, path: Path) -> None:
    """Write what is assigned and not judged as JSONL, for people who judge without the app."""
    rows = ({"annotator": name, **item.model_dump(exclude={"gold", "split"})} for name, item in store.tasks())
    write_jsonl(path, rows)


# -- how it goes --------------------------------------------------------------------------------------------------


def training(store: Store) -> pd.DataFrame:
    """How training went: annotator, status, gold judgements met, their share with its interval, pass mark, ties."""
    frame, rows = store.frame(kind="training"), []
    for name, status in store.table("annotators").itertuples(index=False):
        mine = frame[frame["annotator"] == name]
        met = int((mine["preference"].map(choice) == mine["gold"]).sum())
        ties = float((mine["preference"] == 0).mean()) if len(mine) else float("nan")
        rows.append((name, status, met, len(mine), *metrics.wilson(met, len(mine)), store.setting("pass_mark"), ties))
    return pd.DataFrame(
        rows, columns=["annotator", "status", "met", "pairs", "share", "low", "high", "pass mark", "tie rate"]
    )


def annotators(store: Store, *, hourly_wage: float) -> pd.DataFrame:
    """What each annotator did with label pairs: judgements, how many per hour, ties, share of A, hours, cost.

    `first` is the share of A among its decided judgements with its interval: away from .5 it is a position bias, for
    which report stands first is drawn by lot.
    """
    rows = []
    for name, mine in store.frame(kind="label").groupby("annotator"):
        first, decided = int((mine["preference"] > 0).sum()), int((mine["preference"] != 0).sum())
        hours = mine["seconds"].sum() / 3600
        rate, ties = len(mine) / hours if hours else float("nan"), 1 - decided / len(mine)
        rows.append((name, len(mine), rate, ties, *metrics.wilson(first, decided), hours, hours * hourly_wage))
    columns = ["annotator", "judgements", "per hour", "tie rate", "first", "low", "high", "hours", "cost"]
    return pd.DataFrame(rows, columns=columns)


def forecast(store: Store, *, hourly_wage: float) -> dict[str, float]:
    """Where the work stands: judgements made and missing, judgements per annotator-hour, hours and cost so far and to
    the end (all who passed at work), training and trial included.

    The rate is that of label pairs, or of all while there are none; nan before the first judgement.
    """
    frame, missing = store.frame(), store.missing()
    labels = frame[frame["kind"] == "label"]
    paced = (labels if len(labels) else frame)["seconds"]
    mean = float(paced.mean())
    workers = int((store.table("annotators")["status"] != "failed").sum())
    spent, left = frame["seconds"].sum() / 3600, missing * mean / 3600 if missing else 0.0
    return {
        "judgements": len(frame),
        "missing": missing,
        "per annotator-hour": 3600 / mean if mean else float("nan"),
        "hours so far": spent,
        "hours to the end": left / max(1, workers),
        "cost so far": spent * hourly_wage,
        "cost at the end": (spent + left) * hourly_wage,
    }


def disputed(store: Store, *, kind: str, n: int) -> pd.DataFrame:
    """The `n` pairs of a kind on which annotators differ most: document, both reports, and each one's scores."""
    frame = store.frame(kind=kind)
    spread = frame.groupby("pair_id")["total"].agg(lambda totals: totals.max() - totals.min())
    by_id = {item.pair_id: item for item in store.items(kind=kind)}
    rows = []
    for pair_id in spread.sort_values(ascending=False, kind="stable").index[:n]:
        item, mine = by_id[pair_id], frame[frame["pair_id"] == pair_id]
        scores = [
            f"{row.annotator}: {', '.join(f'{a} {getattr(row, a):+d}' for a in ASPECTS)}" for row in mine.itertuples()
        ]
        rows.append((item.document, item.a, item.b, "\n".join(scores)))
    return pd.DataFrame(rows, columns=["document", "A", "B", "judgements"])


# -- labels -------------------------------------------------------------------------------------------------------


def labelled(store: Store, samples: "Iterable[Sampled]", pairs: "Iterable[Pair]") -> list[Preference]:
    """The preferences of all pairs of finished batches, in the order of the store, with what was sampled for them.

    `samples` and `pairs` are those that `items` laid out; KeyError for a judged pair that is not among them.
    """
    by_document = {sampled.document.id: sampled for sampled in samples}
    by_id = {pair.id: pair for pair in pairs}
    batches = store.table("batches")
    frame = store.frame(kind="label")
    frame = frame[frame["batch"].isin(batches.loc[batches["status"] == "done", "batch"])]
    judged = dict(tuple(frame.groupby("pair_id")))
    return [
        _preference(by_id[item.pair_id], by_document[item.document_id], judged[item.pair_id])
        for item in store.items(kind="label")
        if item.pair_id in judged
    ]


def _preference(pair: "Pair", sampled: "Sampled", judged: pd.DataFrame) -> Preference:
    """The label that the judgements of one pair (rows of `Store.frame`) give."""
    a, b = sampled.completions[pair.a], sampled.completions[pair.b]
    score = float(judged["total"].mean())
    return Preference(
        pair_id=pair.id,
        document_id=pair.document_id,
        split=pair.split,
        checkpoint=pair.checkpoint,
        prompt=short_prompt(sampled.document.text),
        a=a.text,
        b=b.text,
        a_ids=a.ids,
        b_ids=b.ids,
        preference=choice(score),
        score=score,
        votes=tuple(choice(total) for total in judged["total"]),
        aspects={aspect: float(judged[aspect].mean()) for aspect in ASPECTS},
    )


def read_preferences(path: str | Path, *, checkpoint: str | None) -> list[Preference]:
    """Read what phase 05 wrote; ValueError with file and line for a bad record, or one of another checkpoint.

    `checkpoint` None takes those of any checkpoint, as of an earlier round.
    """
    found = []
    for number, fields, reason, _ in jsonl.rows(path):
        try:
            preference = Preference.model_validate(fields) if fields is not None else None
        except ValidationError as error:
            fault = error.errors()[0]
            reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            preference = None
        if preference is None:
            raise ValueError(f"{path}:{number}: {reason}; run phase 05 again")
        if checkpoint is not None and preference.checkpoint != checkpoint:
            raise ValueError(
                f"{path}:{number}: the pair was drawn from checkpoint {preference.checkpoint[:12]}, but the round "
                f"starts from {checkpoint[:12]}: run phases 04 and 05 again from this one, or start from that one"
            )
        found.append(preference)
    return found


def export(
    store: Store, folder: Path, *, samples: "Iterable[Sampled]", pairs: "Iterable[Pair]", seed: int
) -> pd.DataFrame:
    """Write everything: store.sqlite (plain), judgements.jsonl (all revisions), preferences.jsonl, agreement.csv.

    Gives the table of agreement on label pairs, overall and per aspect, as `agreement.csv` has it.
    """
    store.copy(folder / "store.sqlite")
    kinds = {item.pair_id: kind for kind in ("trial", "training", "label") for item in store.items(kind=kind)}
    history = store.table("judgements").to_dict("records")
    write_jsonl(folder / "judgements.jsonl", ({**row, "kind": kinds[row["pair_id"]]} for row in history))
    write_jsonl(folder / "preferences.jsonl", labelled(store, samples, pairs))
    table = agreement.table(store.frame(kind="label"), aspects=ASPECTS, seed=seed)
    table.to_csv(folder / "agreement.csv", index=False)
    return table
