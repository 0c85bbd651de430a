"""Extraction scores, error taxonomy, intervals and tests.

Every score is kept as counts per document, so that uncertainty is always over documents, never over triples. Names are
compared as exact strings and each entity (name, type) or relationship (source, type, target) counts once per document;
relationships are directed, except for the types that the brief states as symmetric.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from erlib.task.schema import Brief, Parsed, Relationship, Report

Key = tuple[str, str, str]
Statistic = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    """A value with the ends of its confidence interval; `f"{interval:.3f}"` reads `0.500 (0.400 to 0.600)`."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})" if spec else str(self)


# -- headline: exact match ----------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Exact-match counts: (D, 3) ints each, columns true positive, false positive, false negative."""

    entity_counts: np.ndarray
    relationship_counts: np.ndarray

    @property
    def entity_precision(self) -> float:
        return precision(self.entity_counts)

    @property
    def entity_recall(self) -> float:
        return recall(self.entity_counts)

    @property
    def entity_f1(self) -> float:
        return f1(self.entity_counts)

    @property
    def relationship_precision(self) -> float:
        return precision(self.relationship_counts)

    @property
    def relationship_recall(self) -> float:
        return recall(self.relationship_counts)

    @property
    def relationship_f1(self) -> float:
        return f1(self.relationship_counts)


def score(gold: Sequence[Report], predicted: Sequence[Report], brief: Brief | None) -> Scores:
    """Count exact matches of entities (name, type) and relationships (source, type, target) in D documents.

    The ends of a relationship whose type the brief states as symmetric have no order; without a brief all have one.
    Documents with nothing to find stay in.
    """
    symmetric = brief.symmetric_types if brief else frozenset()
    entities, relationships = [], []
    for truth, guess in zip(gold, predicted, strict=True):
        entities.append(_counts({(e.name, e.type) for e in truth.entities}, {(e.name, e.type) for e in guess.entities}))
        relationships.append(_counts(_keys(truth, symmetric), _keys(guess, symmetric)))
    shape = (len(entities), 3)
    return Scores(np.array(entities, dtype=int).reshape(shape), np.array(relationships, dtype=int).reshape(shape))


def _counts(truth: set, guess: set) -> tuple[int, int, int]:
    return len(truth & guess), len(guess - truth), len(truth - guess)


def _keys(report: Report, symmetric: frozenset[str]) -> set[Key]:
    return {_key(relationship, symmetric) for relationship in report.relationships}


def _key(relationship: Relationship, symmetric: frozenset[str]) -> Key:
    source, kind, target = relationship.key
    return (target, kind, source) if kind in symmetric and target < source else (source, kind, target)


def precision(counts: np.ndarray) -> float:
    """Micro precision tp / (tp + fp) of (D, 3) counts; 1 where there is nothing to find and nothing was found."""
    tp, fp, fn = counts.sum(axis=0)
    return float(tp / (tp + fp)) if tp + fp else float(fn == 0)


def recall(counts: np.ndarray) -> float:
    """Micro recall tp / (tp + fn) of (D, 3) counts; 1 where there is nothing to find and nothing was found."""
    tp, fp, fn = counts.sum(axis=0)
    return float(tp / (tp + fn)) if tp + fn else float(fp == 0)


def f1(counts: np.ndarray) -> float:
    """Micro F1 = 2 tp / (2 tp + fp + fn) of (D, 3) counts; 1 where there is nothing to find and nothing was found."""
    return float(_f1_of_sums(counts.sum(axis=0)))


def _f1_of_sums(sums: np.ndarray) -> np.ndarray:
    """F1 of summed counts (..., 3)."""
    tp, errors = 2 * sums[..., 0], sums[..., 1] + sums[..., 2]
    total = tp + errors
    return np.where(total > 0, tp / np.where(total > 0, total, 1), 1.0)


# -- intervals and tests ------------------------------------------------------------------------------------------


def bootstrap(
    rows: np.ndarray, statistic: Statistic, *, seed: int, samples: int = 2000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap over the rows (D, k) of a statistic of their sums, (..., k) to (...).

    One row is one document: where several people judge a document, add their rows up first.
    """
    draws = statistic(_resamples(len(rows), samples, seed) @ rows)
    return _percentiles(float(statistic(rows.sum(axis=0))), draws, level)


def paired_bootstrap(
    rows_a: np.ndarray,
    rows_b: np.ndarray,
    statistic: Statistic,
    *,
    seed: int,
    samples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of statistic(a) - statistic(b) over the same D documents; see `bootstrap`."""
    if rows_a.shape != rows_b.shape:
        raise ValueError(f"paired rows must describe the same documents, got shapes {rows_a.shape} and {rows_b.shape}")
    weights = _resamples(len(rows_a), samples, seed)
    draws = statistic(weights @ rows_a) - statistic(weights @ rows_b)
    return _percentiles(float(statistic(rows_a.sum(axis=0)) - statistic(rows_b.sum(axis=0))), draws, level)


def bootstrap_f1(counts: np.ndarray, *, seed: int, samples: int = 2000, level: float = 0.95) -> Interval:
    """Micro F1 of (D, 3) counts with its bootstrap interval over documents."""
    return bootstrap(counts, _f1_of_sums, seed=seed, samples=samples, level=level)


def paired_bootstrap_f1(
    counts_a: np.ndarray, counts_b: np.ndarray, *, seed: int, samples: int = 2000, level: float = 0.95
) -> Interval:
    """F1(a) - F1(b) of two systems on the same documents with its paired bootstrap interval."""
    return paired_bootstrap(counts_a, counts_b, _f1_of_sums, seed=seed, samples=samples, level=level)


def bootstrap_mean(values: Sequence[float], *, seed: int, samples: int = 2000, level: float = 0.95) -> Interval:
    """Mean of one value per document, with its bootstrap interval."""
    return bootstrap_ratio(values, np.ones(len(values)), seed=seed, samples=samples, level=level)


def paired_bootstrap_mean(
    values_a: Sequence[float], values_b: Sequence[float], *, seed: int, samples: int = 2000, level: float = 0.95
) -> Interval:
    """mean(a) - mean(b) of two values per document, with its paired bootstrap interval."""
    differences = np.asarray(values_a, dtype=float) - np.asarray(values_b, dtype=float)
    return bootstrap_mean(differences, seed=seed, samples=samples, level=level)


def bootstrap_ratio(
    found: Sequence[float], total: Sequence[float], *, seed: int, samples: int = 2000, level: float = 0.95
) -> Interval:
    """sum(found) / sum(total) over documents, with its bootstrap interval; nan where every total is 0."""
    rows = np.column_stack([np.asarray(found, dtype=float), np.asarray(total, dtype=float)])
    return bootstrap(rows, _ratio_of_sums, seed=seed, samples=samples, level=level)


def _ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    found, total = sums[..., 0], sums[..., 1]
    return np.where(total > 0, found / np.where(total > 0, total, 1), np.nan)


def _resamples(n: int, samples: int, seed: int) -> np.ndarray:
    """How often each of n documents is drawn in each resample: (samples, n) floats, so that BLAS multiplies them."""
    if n == 0:
        raise ValueError("a bootstrap needs at least one document")
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples).astype(float)


def _percentiles(value: float, draws: np.ndarray, level: float) -> Interval:
    draws = draws[~np.isnan(draws)]  # a resample may hold none of the few documents that have anything to count
    if not len(draws):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """A proportion with its Wilson score interval; without trials nan and the whole range."""
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return Interval(float("nan"), 0.0, 1.0)
    share = successes / n
    low, high = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    return Interval(share, min(float(low), share), max(float(high), share))  # rounding puts 0 and 1 just outside


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact sign test; ties are left out beforehand, and 1 when nothing is left."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


# -- looser schemas, to see what kind of error costs the score ----------------------------------------------------


def entity_schemas(gold: Sequence[Report], predicted: Sequence[Report], documents: Sequence[str]) -> pd.DataFrame:
    """SemEval'13 scores of entities through nervaluate: one row each for strict, exact, partial and type.

    A name stands at its first occurrence in the document (on word borders where possible); one that does not occur
    is set behind the text, where it can only match itself.
    """
    from nervaluate import Evaluator

    true, pred = [], []
    for truth, guess, document in zip(gold, predicted, documents, strict=True):
        names = dict.fromkeys(entity.name for entity in (*truth.entities, *guess.entities))
        spans = _spans(list(names), document)
        wanted = [{"label": e.type, **spans[e.name]} for e in truth.entities]
        found = [{"label": e.type, **spans[e.name]} for e in guess.entities]
        # nervaluate lets a prediction take any gold span that it overlaps, in order: exact matches must come first.
        places = {(span["start"], span["end"]) for span in wanted}
        found.sort(key=lambda s, wanted=wanted, places=places: (s not in wanted, (s["start"], s["end"]) not in places))
        true.append(wanted)
        pred.append(found)
    tags = sorted({entity["label"] for spans_ in (*true, *pred) for entity in spans_})
    overall = Evaluator(true, pred, tags=tags, loader="dict").evaluate()["overall"]
    columns = ["correct", "incorrect", "partial", "missed", "spurious", "precision", "recall", "f1"]
    names = {"strict": "strict", "exact": "exact", "partial": "partial", "type": "ent_type"}
    rows = {name: [getattr(overall[key], column) for column in columns] for name, key in names.items() if overall}
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("schema").reset_index()


def _spans(names: list[str], document: str) -> dict[str, dict[str, int]]:
    """Offsets of each name, `end` inclusive as nervaluate wants it."""
    spans, behind = {}, len(document) + 1
    for name in names:
        whole = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", document)
        start = whole.start() if whole else document.find(name)
        if start < 0:
            start, behind = behind, behind + len(name) + 1
        spans[name] = {"start": start, "end": start + len(name) - 1}
    return spans


def _words(name: str) -> set[str]:
    return set(re.findall(r"\w+", name.casefold()))


def _share_word(name: str, other: str) -> bool:
    return not _words(name).isdisjoint(_words(other))


# -- error taxonomy -----------------------------------------------------------------------------------------------


def taxonomy(
    documents: Sequence[str], gold: Sequence[Report], predicted: Sequence[Parsed], brief: Brief
) -> pd.DataFrame:
    """One row per error: `document` (position), `kind`, `item` (entity, relationship or text) and `detail`.

    unparsable  text that could not be read                   ungrounded  a name that does not occur in the document
    type        right name or ends, wrong type                boundary    a name that shares a word with a missed one
    wrong_end   right type, one end wrong or ends swapped     irrelevant  of a type that the brief lists as unwanted
    spurious    any other false positive                      missed      what no prediction above accounts for
    """
    rows: list[tuple[int, str, str, str]] = []
    for index, (document, truth, parsed) in enumerate(zip(documents, gold, predicted, strict=True)):
        rows += [(index, "unparsable", "text", d.detail) for d in parsed.defects if d.kind == "unparsable"]
        rows += [(index, kind, "entity", detail) for kind, detail in _entity_errors(document, truth, parsed, brief)]
        rows += [(index, kind, "relationship", detail) for kind, detail in _relationship_errors(truth, parsed, brief)]
    return pd.DataFrame(rows, columns=["document", "kind", "item", "detail"])


def _entity_errors(document: str, truth: Report, parsed: Parsed, brief: Brief) -> list[tuple[str, str]]:
    unwanted = {kind.type for kind in brief.entities if not kind.wanted}
    missed = {entity.name: entity.type for entity in truth.entities}
    correct = [e for e in parsed.report.entities if missed.get(e.name) == e.type]
    wrong = [e for e in parsed.report.entities if missed.get(e.name) != e.type]
    for entity in correct:
        del missed[entity.name]
    errors = []
    # Same name first: a longer name that only shares a word must not take its place.
    for entity in sorted(wrong, key=lambda e: e.name not in missed):
        near = next((name for name in missed if _share_word(name, entity.name)), None)
        if entity.name in missed:
            errors.append(("type", f"{entity.name}: {entity.type} instead of {missed.pop(entity.name)}"))
        elif entity.name not in document:
            errors.append(("ungrounded", f"{entity.name}|{entity.type}"))
        elif near is not None:
            errors.append(("boundary", f"{entity.name} instead of {near}"))
            del missed[near]
        else:
            errors.append(("irrelevant" if entity.type in unwanted else "spurious", f"{entity.name}|{entity.type}"))
    return errors + [("missed", f"{name}|{kind}") for name, kind in missed.items()]


def _relationship_errors(truth: Report, parsed: Parsed, brief: Brief) -> list[tuple[str, str]]:
    unwanted = {kind.type for kind in brief.relationships if not kind.wanted}
    wanted, found = _keys(truth, brief.symmetric_types), _keys(parsed.report, brief.symmetric_types)
    missed = sorted(wanted - found)
    errors = []
    for key in sorted(found - wanted):
        kind, other = _nearest_miss(key, missed)
        if other is None:
            errors.append(("irrelevant" if key[1] in unwanted else "spurious", " ".join(key)))
        else:
            missed.remove(other)
            errors.append((kind, f"{' '.join(key)} instead of {' '.join(other)}"))
    return errors + [("missed", " ".join(key)) for key in missed]


def _nearest_miss(key: Key, missed: list[Key]) -> tuple[str, Key | None]:
    """The missed relationship that a false positive stands for, and what is wrong with it; None when there is none."""
    source, kind, target = key
    for other in missed:
        if {source, target} == {other[0], other[2]}:
            return ("wrong_end" if kind == other[1] else "type"), other
    for other in missed:
        if kind == other[1] and {source, target} & {other[0], other[2]}:
            return "wrong_end", other
    return "", None


# -- summaries and rates ------------------------------------------------------------------------------------------


class FactRecall(NamedTuple):
    """Per document, (D,) ints each: salient facts found, salient facts in gold, words in the predicted summaries."""

    found: np.ndarray
    total: np.ndarray
    words: np.ndarray

    @property
    def recall(self) -> float:
        """Found over total; nan when gold states no facts."""
        return float(_ratio_of_sums(np.array([self.found.sum(), self.total.sum()])))


def fact_recall(gold: Sequence[Report], predicted: Sequence[Report]) -> FactRecall:
    """Count the clauses of gold summaries that the predicted summary of the entity of that name contains.

    Case is folded and a clause must stand on word borders; the facts of missed entities count as not found.
    """
    rows = []
    for truth, guess in zip(gold, predicted, strict=True):
        summaries = {entity.name: entity.summary.casefold() for entity in guess.entities}
        facts = [(summaries.get(entity.name, ""), fact) for entity in truth.entities for fact in entity.facts]
        found = sum(_contains(summary, fact.casefold()) for summary, fact in facts)
        rows.append((found, len(facts), sum(len(summary.split()) for summary in summaries.values())))
    return FactRecall(*np.array(rows, dtype=int).reshape(-1, 3).T)


def _contains(summary: str, fact: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", summary) is not None


def parse_rate(parsed: Sequence[Parsed]) -> float:
    """Share of outputs in which nothing was unparsable; nan for none."""
    return _share([p.valid for p in parsed])


def grounded_rate(parsed: Sequence[Parsed]) -> float:
    """Share of outputs, parsed with their `document`, whose every name occurs in it; nan for none."""
    return _share([all(defect.kind != "ungrounded" for defect in p.defects) for p in parsed])


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")
