"""Faults of several systems on the same documents: how often each kind occurs, and what a student took over.

A student that imitates its teacher makes the teacher's own faults, those of the same item of the same document.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from erlib.task import metrics
from erlib.task.evaluation import Evaluation
from erlib.task.schema import Brief


def found(evaluation: Evaluation, brief: Brief) -> pd.DataFrame:
    """The faults of one system: rows of `metrics.taxonomy` with the column `fault`, such as "entity, missed"."""
    documents = [exemplar.document.text for exemplar in evaluation.exemplars]
    gold = [exemplar.report for exemplar in evaluation.exemplars]
    table = metrics.taxonomy(documents, gold, evaluation.predicted, brief)
    return table.assign(fault=table["item"] + ", " + table["kind"])


def per_document(evaluations: Mapping[str, Evaluation], *, brief: Brief) -> pd.DataFrame:
    """Mean number of faults per document by kind of `metrics.taxonomy`: one row per kind, one column per evaluation."""
    shares = {
        name: found(evaluation, brief)["kind"].value_counts() / len(evaluation.exemplars)
        for name, evaluation in evaluations.items()
    }
    return pd.DataFrame(shares).fillna(0)


def rates(evaluations: Mapping[str, Evaluation], *, brief: Brief, seed: int) -> pd.DataFrame:
    """Faults per document by kind, 95 % intervals over documents: columns name, measure (the kind), value, low, high.

    The kind that is the most frequent in all systems together comes first; kinds that none of them has are left out.
    """
    tables = {name: found(evaluation, brief) for name, evaluation in evaluations.items()}
    rows = []
    for name, table in tables.items():
        for fault in _by_frequency(tables):
            counts = _counts(table, fault, len(evaluations[name].exemplars))
            rows.append((name, fault, *metrics.bootstrap_mean(counts, seed=seed)))
    return pd.DataFrame(rows, columns=["name", "measure", "value", "low", "high"])


def inherited(
    evaluations: Mapping[str, Evaluation], *, teacher: str, students: Sequence[str], brief: Brief, seed: int
) -> pd.DataFrame:
    """What students took over from their teacher, one row per kind of fault, all systems on the same documents.

    Columns: the teacher's faults (a number); the share of these very faults that each student repeats (nan where the
    teacher has none); and the last student's faults per document minus the first one's, with a paired interval.
    """
    tables = {name: found(evaluations[name], brief) for name in (teacher, *students)}
    first, last = students[0], students[-1]
    n = len(evaluations[teacher].exemplars)
    rows = {}
    for fault in _by_frequency(tables):
        made = {name: _marks(table, fault) for name, table in tables.items()}
        row = {f"of the {teacher}": len(made[teacher])}
        for name in students:
            row[f"repeated by {name}"] = metrics.wilson(len(made[teacher] & made[name]), len(made[teacher])).value
        counts = {name: _counts(tables[name], fault, n) for name in (first, last)}
        change = metrics.paired_bootstrap_mean(counts[last], counts[first], seed=seed)
        row[f"{last} minus {first}, per document"] = change.value
        rows[fault] = row | {"low": change.low, "high": change.high}
    return pd.DataFrame.from_dict(rows, orient="index")


def _by_frequency(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Kinds of fault, the most frequent first."""
    return list(pd.concat(tables.values())["fault"].value_counts().index)


def _counts(table: pd.DataFrame, fault: str, n: int) -> np.ndarray:
    """How often each of n documents has a fault, (n,)."""
    return np.bincount(table.loc[table["fault"] == fault, "document"].astype(int), minlength=n)


def _marks(table: pd.DataFrame, fault: str) -> set[tuple[int, str]]:
    """The very faults of a kind: document and item."""
    rows = table[table["fault"] == fault]
    return set(zip(rows["document"], rows["detail"], strict=True))
