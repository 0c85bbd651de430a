"""Agreement between annotators: raw agreement, Krippendorff's alpha, kappas as a check, the best accuracy that follows.

Ratings are an array (U, R): one row per unit (a pair of reports), one column per annotator, nan where there is none.
Units of one document are not independent, so intervals are taken over groups of units: documents.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from erlib.task import metrics
from erlib.task.metrics import Interval

Level = Literal["nominal", "ordinal", "interval"]


def matrix(frame: pd.DataFrame, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Turn rows of judgements (`pair_id`, `document_id`, `annotator`, `value`) into ratings (U, R) and groups (U,)."""
    table = frame.pivot(index=["pair_id", "document_id"], columns="annotator", values=value)
    return table.to_numpy(dtype=float), table.index.get_level_values("document_id").to_numpy()


class Fall(NamedTuple):
    """Raw agreement at the level and now, where it has fallen."""

    level: float
    now: float


# -- raw agreement ------------------------------------------------------------------------------------------------


def raw(ratings: np.ndarray, groups: Sequence[Hashable], *, seed: int = 0, level: float = 0.95) -> Interval:
    """Share of equal ratings among all pairs of ratings of one unit, with its bootstrap interval over groups.

    nan where no unit has two ratings.
    """
    equal, total = _pairs(ratings)
    sums = pd.DataFrame({"equal": equal, "total": total}).groupby(np.asarray(groups), sort=True).sum()
    if not sums["total"].sum():
        return Interval(math.nan, math.nan, math.nan)
    return metrics.bootstrap_ratio(sums["equal"], sums["total"], seed=seed, level=level)


def decided(ratings: np.ndarray) -> np.ndarray:
    """The ratings without ties (0): what an accuracy over decided labels is to be compared with."""
    return np.where(ratings == 0, np.nan, ratings)


def fall(
    level: tuple[np.ndarray, Sequence[Hashable]], now: tuple[np.ndarray, Sequence[Hashable]], *, error: float
) -> Fall | None:
    """Whether raw agreement `now` lies below the `level`, ratings and groups each, by more than chance explains.

    One-sided z-test of the difference at the given `error`, with the bootstrap's standard errors over groups; None
    where it has not fallen, or where either is undefined.
    """
    (before, error_before), (after, error_after) = (_with_error(*ratings) for ratings in (level, now))
    fallen = before - after > NormalDist().inv_cdf(1 - error) * math.hypot(
        error_before, error_after
    )  # nan: not known to have fallen
    return Fall(before, after) if fallen else None


def _with_error(ratings: np.ndarray, groups: Sequence[Hashable]) -> tuple[float, float]:
    """Raw agreement and its standard error, at least what one half of a disagreement more would make."""
    interval = raw(ratings, groups)
    return interval.value, max((interval.high - interval.low) / (2 * 1.96), 0.5 / max(1.0, _pairs(ratings)[1].sum()))


def ceiling(agreement: float) -> tuple[float, float]:
    """The best possible accuracy against one annotator's two-way labels, at pairwise agreement p: p to (1+√(2p-1))/2.

    The lower end holds where annotators differ by what they value, the upper one where all err independently around
    one truth. At or below an agreement of .5 labels say nothing: the upper end is .5.
    """
    return agreement, max(agreement, (1 + math.sqrt(max(0.0, 2 * agreement - 1))) / 2)


def _pairs(ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal pairs of ratings and all pairs of ratings of each unit, (U,) each."""
    counts, _ = _counts(ratings)
    rated = counts.sum(axis=1)
    return (counts * (counts - 1)).sum(axis=1) / 2, rated * (rated - 1) / 2


def _counts(ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each unit got each value (U, V), and the values (V,) in order."""
    values = np.unique(ratings[~np.isnan(ratings)])
    return (ratings[:, :, None] == values).sum(axis=1).astype(float), values


# -- Krippendorff's alpha -----------------------------------------------------------------------------------------


def alpha(ratings: np.ndarray, *, level: Level) -> float:
    """Krippendorff's alpha (Content Analysis, ch. 12): 1 - observed / expected disagreement, chance gives 0.

    nan where it is undefined: no unit with two ratings, or all ratings equal.
    """
    per_unit, values = _coincidences(ratings)
    return float(_alpha(per_unit.sum(axis=0)[None], values, level)[0])


def alpha_interval(
    ratings: np.ndarray, groups: Sequence[Hashable], *, level: Level, confidence: float = 0.95
) -> Interval:
    """Krippendorff's alpha with its jackknife interval over groups: Student's t with G - 1 degrees of freedom.

    The ends are nan where fewer than two groups can be left out without making alpha undefined.
    """
    from scipy.special import stdtrit

    per_unit, values = _coincidences(ratings)
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    per_group = np.zeros((len(names), *per_unit.shape[1:]))
    np.add.at(per_group, index, per_unit)
    total = per_group.sum(axis=0)
    value = float(_alpha(total[None], values, level)[0])
    without = _alpha((total - per_group)[per_group.sum(axis=(1, 2)) > 0], values, level)
    without = without[~np.isnan(without)]
    n = len(without)
    if n < 2:
        return Interval(value, math.nan, math.nan)
    error = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    return Interval(value, value - half, min(1.0, value + half))


def _coincidences(ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coincidence matrix of each unit (U, V, V), zero where it has fewer than two ratings, and the values (V,)."""
    counts, values = _counts(ratings)
    rated = counts.sum(axis=1)
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs -= np.eye(len(values)) * counts[:, None, :]  # a rating is not paired with itself
    return np.where(rated > 1, 1 / np.maximum(rated - 1, 1), 0.0)[:, None, None] * pairs, values


def _alpha(coincidences: np.ndarray, values: np.ndarray, level: Level) -> np.ndarray:
    """Alpha of coincidence matrices (N, V, V): (N,), nan where nothing can disagree."""
    margins = coincidences.sum(axis=2)  # (N, V)
    total = margins.sum(axis=1)
    distance = _distances(margins, values, level)
    observed = (coincidences * distance).sum(axis=(1, 2)) * (total - 1)
    expected = np.einsum("ni,nij,nj->n", margins, distance, margins)
    return np.where(expected > 1e-12, 1 - observed / np.where(expected > 1e-12, expected, 1), np.nan)


def _distances(margins: np.ndarray, values: np.ndarray, level: Level) -> np.ndarray:
    """Squared differences between values (N, V, V); ordinal ones depend on how often the values between occur."""
    if level == "ordinal":
        # The ratings from c to k, each end counted half, is the difference of the mid-ranks of k and c.
        ranks = np.cumsum(margins, axis=1) - margins / 2
        return (ranks[:, :, None] - ranks[:, None, :]) ** 2
    if level == "nominal":
        distance = 1.0 - np.eye(len(values))
    elif level == "interval":
        distance = (values[:, None] - values[None, :]) ** 2
    else:
        raise ValueError(f"level must be nominal, ordinal or interval, not {level!r}")
    return np.broadcast_to(distance, (len(margins), *distance.shape))


# -- kappas, as a check -------------------------------------------------------------------------------------------


def cohen(ratings: np.ndarray) -> float:
    """Mean of Cohen's kappa over pairs of annotators, weighted by the units that both rated; nan where undefined."""
    from sklearn.metrics import cohen_kappa_score

    kappas, weights = [], []
    for one in range(ratings.shape[1]):
        for other in range(one + 1, ratings.shape[1]):
            both = ratings[:, [one, other]][~np.isnan(ratings[:, [one, other]]).any(axis=1)]
            if len(both) and len(np.unique(both)) > 1:
                kappas.append(cohen_kappa_score(both[:, 0].astype(str), both[:, 1].astype(str)))
                weights.append(len(both))
    return float(np.average(kappas, weights=weights)) if kappas else math.nan


def fleiss(ratings: np.ndarray) -> float:
    """Fleiss' kappa over the units with the most common number of ratings, at least two; nan where undefined."""
    from statsmodels.stats.inter_rater import fleiss_kappa

    counts, values = _counts(ratings)
    rated = counts.sum(axis=1).astype(int)
    usual = np.bincount(rated[rated > 1]).argmax() if (rated > 1).any() else 0
    kept = counts[rated == usual] if usual else counts[:0]
    if len(values) < 2 or not len(kept) or (kept.sum(axis=0) > 0).sum() < 2:
        return math.nan
    return float(fleiss_kappa(kept))


# -- tables -------------------------------------------------------------------------------------------------------


def table(frame: pd.DataFrame, *, aspects: Sequence[str], seed: int) -> pd.DataFrame:
    """Every measure of agreement on judgements: columns subject, measure, value, low, high, pairs (of ratings).

    `frame` has one row per judgement: `pair_id`, `document_id`, `annotator`, the aspects (-2..2), `total` (their sum)
    and `preference` (its sign). Aspects are compared by sign as the preference is.
    """
    nan, rows = math.nan, []
    signs = frame.assign(**{aspect: np.sign(frame[aspect]) for aspect in aspects})
    for subject in ("preference", "preference, decided", *aspects):
        ratings, groups = matrix(signs, subject.removesuffix(", decided"))
        ratings = decided(ratings) if subject.endswith("decided") else ratings
        pairs = int(_pairs(ratings)[1].sum())
        rows.append((subject, "raw agreement", *raw(ratings, groups, seed=seed), pairs))
        rows.append((subject, "alpha, nominal", *alpha_interval(ratings, groups, level="nominal"), pairs))
        if subject == "preference":
            rows.append((subject, "Cohen's kappa", cohen(ratings), nan, nan, pairs))
            rows.append((subject, "Fleiss' kappa", fleiss(ratings), nan, nan, pairs))
    ratings, groups = matrix(frame, "total")
    for level in ("ordinal", "interval"):
        interval = alpha_interval(ratings, groups, level=level)
        rows.append(("summed score", f"alpha, {level}", *interval, int(_pairs(ratings)[1].sum())))
    return pd.DataFrame(rows, columns=["subject", "measure", "value", "low", "high", "pairs"])


def by_window(frame: pd.DataFrame, window: str, *, seed: int) -> pd.DataFrame:
    """Raw agreement and nominal alpha on the preference in each window, a column of `frame` such as the batch.

    Columns: the window, measure, value, low, high, pairs (of ratings).
    """
    rows = []
    for name, part in frame.groupby(window, sort=True):
        ratings, groups = matrix(part, "preference")
        pairs = int(_pairs(ratings)[1].sum())
        rows.append((name, "raw agreement", *raw(ratings, groups, seed=seed), pairs))
        rows.append((name, "alpha, nominal", *alpha_interval(ratings, groups, level="nominal"), pairs))
    return pd.DataFrame(rows, columns=[window, "measure", "value", "low", "high", "pairs"])
