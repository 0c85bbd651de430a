"""How faithfully a reward model tells what annotators prefer: accuracy, baselines, calibration, biases, diagnosis.

Everything is counted over pairs and its uncertainty taken over documents. Pairs that annotators tie have no right
answer: they stay in the table and out of every accuracy. Accuracy against the *label* (the annotators' sum) is the
headline; accuracy against single *votes* is what agreement between annotators bounds.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from erlib.judgements import agreement
from erlib.task import metrics
from erlib.task.schema import ASPECTS

if TYPE_CHECKING:
    from erlib.judgements.annotation import Preference

Against = Literal["label", "vote"]


# -- pairs --------------------------------------------------------------------------------------------------------


def margins(preferences: "Sequence[Preference]", completions: pd.DataFrame, scores: np.ndarray) -> np.ndarray:
    """Scores of A minus scores of B of each preference, (P, A) by aspect.

    `completions` are rows of `sampling.table` and `scores` (N, A) theirs; sides are found by document and token ids.
    KeyError for one that is not among them.
    """
    of = dict(zip(_keys(completions), scores, strict=True))
    found = [of[pair.document_id, pair.a_ids] - of[pair.document_id, pair.b_ids] for pair in preferences]
    return np.array(found).reshape(-1, scores.shape[1])


def _keys(completions: pd.DataFrame) -> Iterator[tuple[str, tuple[int, ...]]]:
    return zip(completions["document_id"], completions["ids"], strict=True)


def pair_table(
    preferences: "Sequence[Preference]", margins: Sequence[float], *, completions: pd.DataFrame
) -> pd.DataFrame:
    """One row per pair, what annotators and predictors say of it, always as A minus B.

    `label` is 1 for A, 0 for a tie, -1 for B; `strength` the mean summed score of the annotators; `votes_a`, `votes_b`
    and `votes` how many said A, B, anything; `margin` the difference of the scores, `longer` of the characters,
    `likelier` of the log-probabilities in `completions`, rows of `sampling.table`. Beside them `pair_id`, `document_id`
    and `split`.
    """
    logprobs = dict(zip(_keys(completions), completions["logprob"], strict=True))
    rows = [
        {
            "pair_id": pair.pair_id,
            "document_id": pair.document_id,
            "split": pair.split,
            "label": {"A": 1, "tie": 0, "B": -1}[pair.preference],
            "strength": pair.score,
            "votes_a": pair.votes.count("A"),
            "votes_b": pair.votes.count("B"),
            "votes": len(pair.votes),
            "margin": float(margin),
            "longer": len(pair.a) - len(pair.b),
            "likelier": logprobs[pair.document_id, pair.a_ids] - logprobs[pair.document_id, pair.b_ids],
        }
        for pair, margin in zip(preferences, margins, strict=True)
    ]
    return pd.DataFrame(rows)


# -- accuracy -----------------------------------------------------------------------------------------------------


def accuracy(table: pd.DataFrame, *, by: str = "margin", against: Against = "label", seed: int = 0) -> metrics.Interval:
    """Share of decided labels, or of decided single votes, that the sign of column `by` gives; interval over documents.

    Votes are of pairs that at least two annotators decide, as in `vote_agreement`, with which their share compares.
    Ties of the annotators are left out; where the predictor ties, half is right. nan where nothing is decided.
    """
    right, decided = _right(table, by, against).T
    return metrics.bootstrap_ratio(right, decided, seed=seed)


def _right(table: pd.DataFrame, by: str, against: Against) -> np.ndarray:
    """What is right and what is decided in each document, (D, 2)."""
    if against == "label":
        a, b = (table["label"] > 0).astype(float), (table["label"] < 0).astype(float)
    else:
        two = table["votes_a"] + table["votes_b"] >= 2
        a, b = table["votes_a"].where(two, 0), table["votes_b"].where(two, 0)
    says_a = (np.sign(table[by]) + 1) / 2
    grouped = (says_a * a + (1 - says_a) * b).groupby(table["document_id"], sort=True)
    return np.column_stack([grouped.sum(), (a + b).groupby(table["document_id"], sort=True).sum()])


def baselines(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Accuracy of the reward model and of simple rules, and what the model adds to each rule on the same documents.

    Columns name, measure ("accuracy" or "model minus rule"), value, low, high.
    """

    def ratio(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / np.maximum(1, sums[..., 1])

    rows = [("reward model", "accuracy", *accuracy(table, seed=seed))]
    model = _right(table, "margin", "label")
    for name, by in (("prefer the likelier", "likelier"), ("prefer the longer", "longer")):
        rule = _right(table, by, "label")
        rows.append((name, "accuracy", *accuracy(table, by=by, seed=seed)))
        rows.append((name, "model minus rule", *metrics.paired_bootstrap(model, rule, ratio, seed=seed)))
    return pd.DataFrame(rows, columns=["name", "measure", "value", "low", "high"])


def accuracy_by(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Accuracy against labels in groups of pairs: columns by, group, pairs, value, low, high.

    Groups: quarters of the model's absolute margin; strength of the preference; whether all votes agree; and whether
    annotators preferred the longer or the shorter completion, which shows a bias of length from both sides.
    """
    decided = table[table["label"] != 0]
    longer = np.sign(decided["longer"]) * decided["label"]
    unanimous = decided[["votes_a", "votes_b"]].max(axis=1) == decided["votes"]
    quarter = np.ceil(4 * decided["margin"].abs().rank(method="first") / len(decided)).astype(int)
    groups = {
        "margin of the model": quarter.map({1: "smallest quarter", 2: "second", 3: "third", 4: "largest quarter"}),
        "strength of the preference": pd.cut(
            decided["strength"].abs(), [0, 1, 2, math.inf], labels=["to 1", "1 to 2", "above 2"]
        ).astype(str),
        "votes": unanimous.map({True: "all agree", False: "not all agree"}),
        "annotators preferred": longer.map({1.0: "the longer", -1.0: "the shorter", 0.0: "one as long"}),
    }
    orders = {"margin of the model": quarter, "strength of the preference": decided["strength"].abs()}
    rows = []
    for by, names in groups.items():
        order = orders.get(by, -names.map(names.value_counts()))
        for name in order.groupby(names).min().sort_values().index:
            part = decided[names == name]
            rows.append((by, name, len(part), *accuracy(part, seed=seed)))
    return pd.DataFrame(rows, columns=["by", "group", "pairs", "value", "low", "high"])


def accuracy_by_aspect(
    table: pd.DataFrame, preferences: "Sequence[Preference]", margins: np.ndarray, *, seed: int = 0
) -> pd.DataFrame:
    """Accuracy on what annotators prefer in each aspect, of its own margin and of the sum's (column `margin`).

    `preferences` and `margins` (P, A) belong to the rows of `table`. Columns name, measure (one an aspect), value,
    low, high; pairs that annotators tie in an aspect are left out of it.
    """
    rows = []
    for number, aspect in enumerate(ASPECTS):
        label = np.sign([pair.aspects[aspect] for pair in preferences])
        judged = table.assign(label=label, own=margins[:, number])
        for name, by in (("score of the aspect", "own"), ("summed score", "margin")):
            rows.append((name, f"accuracy in {aspect}", *accuracy(judged, by=by, seed=seed)))
    return pd.DataFrame(rows, columns=["name", "measure", "value", "low", "high"])


def length_correlation(table: pd.DataFrame) -> pd.Series:
    """Spearman correlation over pairs of the difference in length with the model's margin and annotators' strength."""
    correlations = table[["margin", "strength", "longer"]].corr(method="spearman")["longer"]
    return correlations[["margin", "strength"]].rename({"margin": "reward model", "strength": "annotators"})


def worst(preferences: "Sequence[Preference]", table: pd.DataFrame, *, n: int) -> pd.DataFrame:
    """The n decided pairs that the model gets most wrong, in full text, the widest margin first."""
    by_id = {pair.pair_id: pair for pair in preferences}
    errors = table[table["margin"] * table["label"] < 0]
    errors = errors.loc[errors["margin"].abs().sort_values(ascending=False, kind="stable").index[:n]]
    shown = errors[["pair_id", "margin", "strength"]].copy()
    for column in ("prompt", "a", "b", "preference"):
        shown[column] = [getattr(by_id[pair_id], column) for pair_id in errors["pair_id"]]
    return shown.drop(columns="pair_id").rename(columns={"a": "A", "b": "B", "preference": "annotators prefer"})


# -- calibration --------------------------------------------------------------------------------------------------


def reliability(table: pd.DataFrame, *, temperature: float = 1.0, bins: int = 8) -> pd.DataFrame:
    """Confidence sigmoid(|margin| / temperature) and share right, in `bins` equally filled bins of decided pairs.

    Columns pairs, confidence, right, low, high (Wilson: pairs of one document make them somewhat too narrow).
    """
    confidence, right = _confidence(table, temperature)
    rows = []
    for part in _bins(confidence, bins):
        interval = metrics.wilson(float(right[part].sum()), len(part))
        rows.append((len(part), float(confidence[part].mean()), *interval))
    return pd.DataFrame(rows, columns=["pairs", "confidence", "right", "low", "high"])


def calibration_error(table: pd.DataFrame, *, temperature: float = 1.0, bins: int = 8) -> float:
    """Expected calibration error: mean |share right - confidence| over the bins of `reliability`, weighted by pairs."""
    return _calibration_error(*_confidence(table, temperature), bins)


def calibration_interval(
    table: pd.DataFrame, *, bins: int = 8, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> metrics.Interval:
    """The calibration error with its interval over documents, by the basic bootstrap (Davison and Hinkley 1997, 5.2).

    Noise alone makes the error larger, in a resample of the pairs as in the pairs themselves: of fifty pairs a bin, a
    perfectly calibrated model has about .05. The basic bootstrap takes that off, so most of the interval lies below the
    value; it reaches the value at least.
    """
    confidence, right = _confidence(table, 1.0)
    value = _calibration_error(confidence, right, bins)
    of = table.loc[table["label"] != 0, "document_id"].to_numpy()
    rows_of = [rows.to_numpy() for _, rows in pd.Series(range(len(right))).groupby(of)]
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(samples):
        drawn = np.concatenate([rows_of[index] for index in rng.integers(len(rows_of), size=len(rows_of))])
        resampled.append(_calibration_error(confidence[drawn], right[drawn], bins))
    low, high = 2 * value - np.quantile(resampled, [(1 + level) / 2, (1 - level) / 2])
    return metrics.Interval(value, min(value, max(0.0, float(low))), max(value, float(high)))


def _confidence(table: pd.DataFrame, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each decided pair the model's confidence, and 1 where it is right, 0 where it is wrong, 1/2 at margin 0."""
    decided = table[table["label"] != 0]
    confidence = 1 / (1 + np.exp(-decided["margin"].abs().to_numpy() / temperature))
    return confidence, (np.sign(decided["margin"]) * decided["label"] + 1).to_numpy() / 2


def _bins(confidence: np.ndarray, bins: int) -> list[np.ndarray]:
    """Rows of equally filled bins by confidence."""
    return np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))


def _calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    gaps = [abs(right[part].sum() - confidence[part].sum()) for part in _bins(confidence, bins)]
    return float(sum(gaps) / len(right))


def fit_temperature(table: pd.DataFrame) -> float:
    """The temperature (0.05 to 20) that makes sigmoid(margin / temperature) likeliest on decided pairs (1706.04599).

    Raises ValueError where no pair is decided.
    """
    from scipy.optimize import minimize_scalar

    signed = (table["margin"] * table["label"])[table["label"] != 0].to_numpy()
    if not len(signed):
        raise ValueError(f"none of {len(table)} pairs has a preference to fit a temperature on: take more documents")
    found = minimize_scalar(
        lambda log: np.logaddexp(0, -signed / math.exp(log)).mean(),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
    )
    return float(math.exp(found.x))


def cross_fitted(table: pd.DataFrame, others: pd.DataFrame, *, folds: int = 5, seed: int = 0) -> pd.DataFrame:
    """The pairs of `table` with each margin divided by a temperature that was fitted without its document.

    A fold of documents gets the temperature of the other folds and of `others`: no confidence has seen its own label,
    and the temperature rests on most of the documents held out. Of 60 alone, one came out at twice what it should be.
    """
    documents = np.random.default_rng(seed).permutation(sorted(table["document_id"].unique()))
    parts = []
    for fold in np.array_split(documents, min(folds, len(documents))):
        inside = table["document_id"].isin(fold)
        temperature = fit_temperature(pd.concat([others, table[~inside]]))
        parts.append(table[inside].assign(margin=table["margin"] / temperature))
    return pd.concat(parts).loc[table.index]


# -- against the annotators -----------------------------------------------------------------------------------------


def vote_agreement(preferences: "Sequence[Preference]", *, seed: int = 0) -> metrics.Interval:
    """Agreement p of two annotators on a pair that both decide, with its interval over documents.

    nan where no pair has two decided votes. `agreement.ceiling` turns it into the band of the best accuracy.
    """
    width = max(len(pair.votes) for pair in preferences)
    ratings = np.full((len(preferences), width), np.nan)
    for row, pair in zip(ratings, preferences, strict=True):
        row[: len(pair.votes)] = [{"A": 1, "tie": np.nan, "B": -1}[vote] for vote in pair.votes]
    return agreement.raw(ratings, [pair.document_id for pair in preferences], seed=seed)


def diagnosis(
    *,
    train_accuracy: float,
    accuracy: float,
    agreement: float,
    tie_share: float,
    gain_over_rules: float,
    calibration_error: float,
    length_model: float,
    length_annotators: float,
) -> pd.DataFrame:
    """What the measured figures say of a reward model that is not good enough: sign, measured, seen, and what to do.

    `gain_over_rules` is the lower end of the model's gain over the best simple rule; the lengths are correlations.
    """
    gap, bias = train_accuracy - accuracy, abs(length_model) - abs(length_annotators)
    rows = [
        ("annotators disagree", agreement, agreement < 0.7, "fix brief and training in 05: no model can do better"),
        ("many ties", tie_share, tie_share > 0.4, "completions are too much alike: sample hotter in 04"),
        ("fits its own pairs badly", train_accuracy, train_accuracy < 0.8, "more epochs, higher rate or rank"),
        ("forgets them on new documents", gap, gap > 0.1, "it memorises: more documents in 04, fewer epochs"),
        ("adds little to a simple rule", gain_over_rules, gain_over_rules <= 0, "it has learnt that rule: more pairs"),
        ("leans on length more than people", bias, bias > 0.15, "look at the shorter ones preferred: add such pairs"),
        (
            "confidence is off",
            calibration_error,
            calibration_error > 0.1,
            "a temperature fixes it; so do fewer epochs",
        ),
    ]
    table = pd.DataFrame(rows, columns=["sign", "measured", "seen", "what to do"])
    return table.assign(seen=table["seen"].map({True: "YES", False: "no"})).set_index("sign")
