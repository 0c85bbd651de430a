"""Evaluation of answers: scores and failure modes on exemplars, systems against each other, files of predictions."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from erlib.task import metrics
from erlib.task.forms import to_compact
from erlib.task.jsonl import read_jsonl, write_jsonl
from erlib.task.schema import Brief, Defect, Document, Exemplar, Parsed, Report

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


class Evaluation(NamedTuple):
    """What an LM with one prompt answered on a set of exemplars, and its scores there."""

    exemplars: tuple[Exemplar, ...]
    predicted: list[Parsed]
    scores: metrics.Scores

    @property
    def headline(self) -> float:
        """What the selector maximises: see `objective`."""
        return objective(self.scores)


def evaluated(exemplars: Sequence[Exemplar], predicted: Sequence[Parsed], brief: Brief) -> Evaluation:
    """Score answers on the exemplars that they answer, in the same order."""
    gold = [exemplar.report for exemplar in exemplars]
    return Evaluation(tuple(exemplars), list(predicted), score(gold, predicted, brief))


def objective(scores: metrics.Scores) -> float:
    """Mean of exact-match entity F1 and relationship F1; entity F1 alone where no exemplar has a relationship."""
    both = scores.entity_f1, scores.relationship_f1
    return sum(both) / 2 if _has_gold(scores.relationship_counts) else both[0]


def _has_gold(counts: "np.ndarray") -> bool:
    """Whether the exemplars of counts (D, 3) hold any such item: true positives or misses."""
    return bool(counts[:, [0, 2]].any())


def score(gold: Sequence[Report], predicted: Sequence[Parsed], brief: Brief) -> metrics.Scores:
    """Exact-match counts of answers against gold reports under the brief."""
    return metrics.score(gold, [parsed.report for parsed in predicted], brief)


def refuse_overlap(demos: Sequence[Exemplar], scored: Sequence[Exemplar]) -> None:
    """Raise ValueError where a demo is scored on itself, by id or by text."""
    texts = {normal_text(exemplar.document.text) for exemplar in scored}
    ids = {exemplar.document.id for exemplar in scored}
    for demo in demos:
        if demo.document.id in ids or normal_text(demo.document.text) in texts:
            raise ValueError(f"exemplar {demo.document.id} is both shown and scored: split the gold file again")


def normal_text(text: str) -> str:
    """Text without differences of case and spacing, to tell copies."""
    return " ".join(text.casefold().split())


# -- tables -------------------------------------------------------------------------------------------------------


def compare(evaluations: Mapping[str, Evaluation], *, seed: int) -> "pd.DataFrame":
    """Entity and relationship F1 of each evaluation, 95 % intervals over documents: name, measure, value, low, high.

    Relationships are left out where no exemplar has one, as in a corpus of entities.
    """
    import pandas as pd

    rows = []
    for name, evaluation in evaluations.items():
        scores = evaluation.scores
        for measure, counts in (("entity F1", scores.entity_counts), ("relationship F1", scores.relationship_counts)):
            if measure == "entity F1" or _has_gold(counts):
                rows.append((name, measure, *metrics.bootstrap_f1(counts, seed=seed)))
    return pd.DataFrame(rows, columns=["name", "measure", "value", "low", "high"])


def failure_modes(evaluations: Mapping[str, Evaluation], *, brief: Brief, seed: int) -> "pd.DataFrame":
    """The two failure modes apart, with 95 % intervals over documents (name, measure, value, low, high).

    Salient fact recall is a share of the facts of the gold summaries, and left out where they have none; missed and
    irrelevant items are means per document.
    """
    import numpy as np
    import pandas as pd

    rows = []
    for name, evaluation in evaluations.items():
        documents = [exemplar.document.text for exemplar in evaluation.exemplars]
        gold = [exemplar.report for exemplar in evaluation.exemplars]
        found, total, _ = metrics.fact_recall(gold, [parsed.report for parsed in evaluation.predicted])
        if total.any():
            rows.append((name, "salient fact recall", *metrics.bootstrap_ratio(found, total, seed=seed)))
        faults = metrics.taxonomy(documents, gold, evaluation.predicted, brief)
        for kind in ("missed", "irrelevant"):
            found = faults.loc[faults["kind"] == kind, "document"].to_numpy(dtype=int)
            interval = metrics.bootstrap_mean(np.bincount(found, minlength=len(documents)), seed=seed)
            rows.append((name, f"{kind} items per document", interval.value, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["name", "measure", "value", "low", "high"])


def differences(
    evaluations: Mapping[str, Evaluation], pairs: Sequence[tuple[str, str]], *, seed: int
) -> "pd.DataFrame":
    """F1 of the first of each pair of names minus F1 of the second, with paired 95 % intervals over documents.

    Columns difference, measure, value, low, high; both evaluations of a pair are of the same exemplars.
    """
    import pandas as pd

    rows = []
    for first, second in pairs:
        a, b = evaluations[first].scores, evaluations[second].scores
        for measure, counts_a, counts_b in (
            ("entity F1", a.entity_counts, b.entity_counts),
            ("relationship F1", a.relationship_counts, b.relationship_counts),
        ):
            if measure == "entity F1" or _has_gold(counts_a):
                interval = metrics.paired_bootstrap_f1(counts_a, counts_b, seed=seed)
                rows.append((f"{first} minus {second}", measure, *interval))
    return pd.DataFrame(rows, columns=["difference", "measure", "value", "low", "high"])


def same_reports(a: Sequence[Parsed], b: Sequence[Parsed]) -> metrics.Interval:
    """Share of documents for which two lists of answers hold the same report, with its Wilson interval."""
    same = sum(one.report == other.report for one, other in zip(a, b, strict=True))
    return metrics.wilson(same, len(a))


def item_counts(predicted: Sequence[Parsed]) -> "pd.DataFrame":
    """Number of entities, relationships and defects in each answer: one row per answer, in order."""
    import pandas as pd

    faults = [sum(defect.kind != "repaired" for defect in p.defects) for p in predicted]
    rows = [(len(p.report.entities), len(p.report.relationships), n) for p, n in zip(predicted, faults, strict=True)]
    return pd.DataFrame(rows, columns=["entities", "relationships", "defects"])


def ranked(
    documents: Sequence[Document],
    predicted: Sequence[Parsed],
    *,
    truths: Mapping[str, Report] | None = None,
    brief: Brief,
) -> "pd.DataFrame":
    """Documents and their reports, the best first: fewest faults, then most relationships.

    A fault is a defect of the text and, where the true reports are known (`truths`, by document id), an entity or
    relationship missed or too many. Columns document, report, true report (if known), faults (their number), defects.
    """
    import pandas as pd

    items = item_counts(predicted)
    table = pd.DataFrame({"document": [document.text for document in documents]})
    table["report"] = [to_compact(parsed.report) for parsed in predicted]
    table["faults"] = items["defects"]
    if truths is not None:
        gold = [truths[document.id] for document in documents]
        scores = score(gold, predicted, brief)
        wrong = scores.entity_counts[:, 1:].sum(axis=1) + scores.relationship_counts[:, 1:].sum(axis=1)
        table["faults"] += wrong  # false positives and false negatives
        table.insert(2, "true report", [to_compact(report) for report in gold])
    table["defects"] = ["\n".join(f"{kind}: {detail}" for kind, detail in parsed.defects) for parsed in predicted]
    table["relationships"] = items["relationships"]
    table = table.sort_values(["faults", "relationships"], ascending=[True, False], kind="stable", ignore_index=True)
    return table.drop(columns="relationships")


def beside(evaluation: Evaluation, *, brief: Brief) -> "pd.DataFrame":
    """Document, true report, predicted report and faults side by side (compact form), most faults first."""
    import pandas as pd

    documents = [exemplar.document.text for exemplar in evaluation.exemplars]
    gold = [exemplar.report for exemplar in evaluation.exemplars]
    faults = metrics.taxonomy(documents, gold, evaluation.predicted, brief)
    rows = []
    for index, (text, report, parsed) in enumerate(zip(documents, gold, evaluation.predicted, strict=True)):
        of_document = faults[faults["document"] == index]
        listed = [f"{row.kind}: {row.detail}" for row in of_document.itertuples()]
        rows.append((text, to_compact(report), to_compact(parsed.report), len(listed), "\n".join(listed)))
    table = pd.DataFrame(rows, columns=["document", "gold", "predicted", "faults", "listed"])
    return table.sort_values("faults", ascending=False, kind="stable", ignore_index=True)


def advantage(chosen: Evaluation, others: Sequence[Evaluation], *, seed: int) -> metrics.Interval:
    """Headline of one prompt minus that of several others pooled, with its paired interval over the same documents."""
    import numpy as np

    def both(sums: np.ndarray) -> np.ndarray:  # (..., 6) summed counts of entities and relationships to (...)
        tp, fp, fn = np.moveaxis(sums.reshape(*sums.shape[:-1], 2, 3), -1, 0)
        return (2 * tp / np.maximum(1, 2 * tp + fp + fn))[..., :measured].mean(axis=-1)

    def rows(scores: metrics.Scores) -> np.ndarray:
        return np.hstack([scores.entity_counts, scores.relationship_counts])

    measured = 2 if _has_gold(chosen.scores.relationship_counts) else 1
    pooled = np.sum([rows(other.scores) for other in others], axis=0)
    return metrics.paired_bootstrap(rows(chosen.scores), pooled, both, seed=seed)


# -- files --------------------------------------------------------------------------------------------------------


def write_predictions(path: Path, documents: Iterable[Document], predicted: Iterable[Parsed]) -> None:
    """Write what an LM answered as JSONL: document, report and defects of each."""
    rows = (
        {
            "document": document.model_dump(),
            "report": parsed.report.model_dump(),
            "defects": [defect._asdict() for defect in parsed.defects],
        }
        for document, parsed in zip(documents, predicted, strict=True)
    )
    write_jsonl(path, rows)


def read_predictions(path: Path) -> tuple[list[Document], list[Parsed]]:
    """Read what `write_predictions` wrote."""
    documents, predicted = [], []
    for row in read_jsonl(path):
        documents.append(Document.model_validate(row["document"]))
        defects = tuple(Defect(**defect) for defect in row["defects"])
        predicted.append(Parsed(Report.model_validate(row["report"]), defects))
    return documents, predicted


def read_by_id(path: Path) -> dict[str, Parsed]:
    """Read what `write_predictions` wrote, by the document's id."""
    documents, predicted = read_predictions(path)
    return dict(zip([document.id for document in documents], predicted, strict=True))
