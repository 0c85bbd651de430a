"""Watch a dated stream of documents for drift: detectors, calibrated alarms, and how late they are.

A *window* of consecutive documents is compared with a *reference* by several detectors, each a two-sample statistic
that is larger the more they differ:

    inputs    words and layout of the documents (MMD; Gretton et al., JMLR 2012), a classifier that tells the two
              samples apart (Lopez-Paz and Oquab, 1610.06545), length (Kolmogorov-Smirnov)
    outputs   types, number of relationships, length and readability of the policy's reports
    rewards   what the reward model says of them (Kolmogorov-Smirnov)

Documents of a stream come in bursts: many posts tell one story. The p-values of tests that take documents for
independent are then too small, so no threshold comes from a table. `draws` permutes whole blocks of consecutive
documents of a stationary stretch, and `calibrate` sets all thresholds at once so that a window raises any alarm at
the rate that was asked for (min-p; Westfall and Young, 1993). A window of whole runs from all over a stretch, as for
reports of which few can be had, is calibrated the same way, with the runs as blocks.

The same bursts drown what a topic changes in the embeddings, as each story has names of its own: `burst_weights` counts
a direction the less, the more it varies from one stretch of a stationary stream to the next.

`Features` name arrays with one row for each document: `inputs` and `outputs` make them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from erlib.task.forms import parse_compact, short_prompt, to_compact
from erlib.task.metrics import Interval, wilson
from erlib.task.schema import Brief, Document, Parsed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Features = Mapping[str, np.ndarray]  # (N,) or (N, d) each
RIDGE = 1.0  # of the classifier, in units of the mean squared feature


# -- what is compared ---------------------------------------------------------------------------------------------


_MARKS = {  # what a post looks like, a count for each character of it
    "letters in upper case": r"[A-Z]",
    "digits": r"\d",
    "hashtags and handles": r"[#@]\w",
    "links": r"https?://",
    "full stops": r"[.!?](?:\s|$)",
    "other marks": r"[^\w\s.!?#@]",
}


def layout(texts: Sequence[str]) -> np.ndarray:
    """Describe the look of texts, (N, 8), whatever they say and however long they are: lines and marks a character."""
    rows = []
    for text in texts:
        lines = text.split("\n")
        rates = [len(re.findall(pattern, text)) / len(text) for pattern in _MARKS.values()]
        rows.append([len(lines) / len(text), np.log(max(map(len, lines)) / len(text)), *rates])
    return np.array(rows)


def burst_weights(embeddings: np.ndarray, *, block: int) -> np.ndarray:
    """Matrix (d, d) that gives means of `block` consecutive rows of a stationary stretch (N, d) unit covariance.

    The covariance is shrunk (Ledoit and Wolf, 2004). It is to be fitted on documents that nothing is calibrated on:
    their own means vary less after it than those of others.
    """
    from sklearn.covariance import LedoitWolf

    n = len(embeddings) // block
    if n < 10:
        raise ValueError(f"{len(embeddings)} documents hold {n} blocks of {block}, too few for a covariance: give more")
    means = embeddings[: n * block].reshape(n, block, -1).mean(axis=1)
    values, vectors = np.linalg.eigh(LedoitWolf().fit(means).covariance_.astype(float))
    return vectors / np.sqrt(values.clip(min=1e-12)) @ vectors.T


def open_encoder(name: str, texts: Sequence[str], *, dimensions: int, seed: int) -> "SentenceTransformer":
    """The encoder of documents that phase 02 names: "static", fitted on these texts, or a sentence-transformers model
    that is on this machine already; nothing is fetched."""
    from erlib.documents import diversity

    if name == "static":
        return diversity.fit_static(texts, dimensions=dimensions, seed=seed)
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(name, local_files_only=True)


def encode(encoder: "SentenceTransformer", texts: Sequence[str]) -> np.ndarray:
    """Embed texts as unit rows (N, d) in double precision."""
    settings = {"batch_size": 512, "normalize_embeddings": True, "show_progress_bar": False}
    return encoder.encode(list(texts), **settings).astype(float)


def inputs(texts: Sequence[str], embeddings: np.ndarray) -> dict[str, np.ndarray]:
    """Features of documents: `words` (N, d), their embeddings, `layout` (N, 8) and `characters` (N,)."""
    if len(texts) != len(embeddings):
        raise ValueError(f"{len(texts)} texts but {len(embeddings)} embeddings")
    return {"words": embeddings, "layout": layout(texts), "characters": np.array([float(len(text)) for text in texts])}


def outputs(parsed: Sequence[Parsed], rewards: Sequence[float], brief: Brief) -> dict[str, np.ndarray]:
    """Features of reports: `entity_types` and `relationship_types` (N, types of the brief and one for all others),
    `relationships`, `report_characters`, `unparsable` and `reward` (N,)."""
    reports = [each.report for each in parsed]
    return {
        "entity_types": _type_counts(([e.type for e in report.entities] for report in reports), brief.entity_types),
        "relationship_types": _type_counts(
            ([r.type for r in report.relationships] for report in reports), brief.relationship_types
        ),
        "relationships": np.array([float(len(report.relationships)) for report in reports]),
        "report_characters": np.array([float(len(to_compact(report))) for report in reports]),
        "unparsable": np.array([float(not each.valid) for each in parsed]),
        "reward": np.asarray(rewards, dtype=float),
    }


def fitting(
    tokenizer: "PreTrainedTokenizerBase", documents: Sequence[Document], *, max_tokens: int, max_new_tokens: int
) -> np.ndarray:
    """Places of the documents whose prompt leaves room for the longest report within `max_tokens`."""
    from erlib.lm import models

    lengths = [len(models.encode_prompt(tokenizer, short_prompt(document.text))) for document in documents]
    return np.flatnonzero(np.array(lengths, dtype=int) + max_new_tokens <= max_tokens)


def read(
    policy: "tuple[PreTrainedModel, PreTrainedTokenizerBase]",
    scorer: "tuple[PreTrainedModel, PreTrainedTokenizerBase]",
    documents: Sequence[Document],
    *,
    brief: Brief,
    max_new_tokens: int,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Let a policy write greedy reports and a reward model score them: the features of `outputs`.

    Raises ValueError where a document is too long for the policy's context.
    """
    from erlib.lm import models
    from erlib.rewards import reward_model

    prompts = [short_prompt(document.text) for document in documents]
    written = models.generate(*policy, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    texts = [completion.text for completion in written]
    parsed = [parse_compact(text, brief=brief, document=d.text) for text, d in zip(texts, documents, strict=True)]
    ids = [list(completion.ids) for completion in written]
    scores = reward_model.score(*scorer, prompts, ids, batch_size=batch_size)
    return outputs(parsed, scores, brief)


def _type_counts(named: Iterable[Sequence[str]], types: Iterable[str]) -> np.ndarray:
    column = {name: place for place, name in enumerate(sorted(types))}
    rows = [np.bincount([column.get(n, len(column)) for n in names], minlength=len(column) + 1) for names in named]
    return np.array(rows, dtype=float)


def rows(features: Features, places: np.ndarray | slice) -> dict[str, np.ndarray]:
    """Take the documents at these places."""
    return {name: values[places] for name, values in features.items()}


def joined(*parts: Features) -> dict[str, np.ndarray]:
    """Put the documents of several features behind each other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# -- two-sample statistics ----------------------------------------------------------------------------------------


def bandwidth(x: np.ndarray) -> float:
    """Median heuristic: the median distance between two rows of x (N, d); of about 150 rows, evenly taken."""
    from scipy.spatial.distance import pdist

    distance = float(np.median(pdist(x[:: -(-len(x) // 150)])))
    if not distance > 0:
        raise ValueError("more than half of the rows are equal: no kernel can tell them apart")
    return distance


def kernel(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """RBF kernel exp(-|x - y|² / (2 width²)) of all rows of x (n, d) and y (m, d): (n, m)."""
    squared = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * x @ y.T
    return np.exp(-squared.clip(min=0) / (2 * width * width))


def mmd(x: np.ndarray, y: np.ndarray, *, width: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy of two samples; may be below 0. Gretton et al., JMLR 2012, eq. 3.

    `width` is the kernel's; left out, it is the `bandwidth` of x.
    """
    reference = np.asarray(x, dtype=float).tobytes(), x.shape
    width = width or _width(*reference)
    return _within(*reference, width) + _mean_within(y, width) - float(2 * kernel(x, y, width).mean())


def _mean_within(x: np.ndarray, width: float) -> float:
    """Mean of the kernel over all pairs of different rows."""
    return float((kernel(x, x, width).sum() - len(x)) / (len(x) * (len(x) - 1)))


# What a watch needs of its reference is the same for every window: computed once for the bytes of an array.
_KEPT = 4


@lru_cache(_KEPT)
def _width(data: bytes, shape: tuple[int, ...]) -> float:
    return bandwidth(np.frombuffer(data).reshape(shape))


@lru_cache(_KEPT)
def _within(data: bytes, shape: tuple[int, ...], width: float) -> float:
    return _mean_within(np.frombuffer(data).reshape(shape), width)


class Tested(NamedTuple):
    """A statistic and the share of permutations that reach it, itself counted."""

    statistic: float
    p: float


def mmd_test(x: np.ndarray, y: np.ndarray, *, permutations: int = 199, block: int = 1, seed: int) -> Tested:
    """Permutation test of `mmd` between x (n, d) and y (m, d), the kernel's width being that of the pooled sample.

    Permuted are blocks of consecutive rows; `block=1` holds for independent rows only. Raises ValueError unless `block`
    divides both n and m.
    """
    n, m = len(x), len(y)
    if n % block or m % block:
        raise ValueError(f"blocks of {block} rows do not divide samples of {n} and {m} rows")
    pooled, rng = np.concatenate([x, y]), np.random.default_rng(seed)
    gram = kernel(pooled, pooled, bandwidth(pooled))
    np.fill_diagonal(gram, 0)
    first = np.arange(n + m) < n
    orders = [np.arange((n + m) // block), *(rng.permutation((n + m) // block) for _ in range(permutations))]
    labels = np.array([first.reshape(-1, block)[order].ravel() for order in orders], dtype=float)  # (1 + P, n + m)
    sums, total = labels @ gram, gram.sum()
    xx = (sums * labels).sum(axis=1)
    xy = sums.sum(axis=1) - xx
    found = xx / (n * (n - 1)) + (total - xx - 2 * xy) / (m * (m - 1)) - 2 * xy / (n * m)
    return Tested(float(found[0]), float(np.mean(found >= found[0] - 1e-12)))


def textbook_alarms(
    x: np.ndarray, stream: np.ndarray, *, window: int, rate: float, permutations: int, seed: int
) -> Interval:
    """Share of the windows of a stationary stream (N, d) whose `mmd_test` against x (n, d) is significant at `rate`.

    The test takes documents for independent. The interval is Wilson's.
    """
    found = []
    for first in range(0, len(stream) // window * window, window):
        tested = mmd_test(x, stream[first : first + window], permutations=permutations, seed=seed)
        found.append(tested.p <= rate)
    return wilson(sum(found), len(found))


def classifier(x: np.ndarray, y: np.ndarray, *, folds: int = 5) -> float:
    """Area under the ROC curve of a classifier that tells y from x, on rows held out: 0.5 is chance, 1 perfect.

    A ridge regression on the labels, which weighs both samples alike. Folds are runs of consecutive documents, so that
    a story is not recognised by its own posts. The area stands for the accuracy of Lopez-Paz and Oquab because samples
    of unequal size have no natural cut.
    """
    from scipy.stats import rankdata

    rows_ = np.concatenate([x, y])
    rows_ = np.column_stack([rows_ - rows_.mean(axis=0), np.ones(len(rows_))])
    is_y = np.arange(len(rows_)) >= len(x)
    weights, labels = np.where(is_y, 0.5 / len(y), 0.5 / len(x)), np.where(is_y, 1.0, -1.0)
    fold = np.concatenate([np.arange(len(z)) * folds // len(z) for z in (x, y)])
    penalty = RIDGE * np.average((rows_[:, :-1] ** 2).mean(axis=1), weights=weights) * np.eye(rows_.shape[1])
    penalty[-1, -1] = 1e-9  # the constant is free
    scores = np.empty(len(rows_))
    for number in range(folds):
        kept = fold != number
        weighted = rows_[kept] * weights[kept, None]
        scores[~kept] = rows_[~kept] @ np.linalg.solve(weighted.T @ rows_[kept] + penalty, weighted.T @ labels[kept])
    ranks = rankdata(scores)[is_y]
    return float((ranks.sum() - len(y) * (len(y) + 1) / 2) / (len(x) * len(y)))


def ks(x: np.ndarray, y: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov distance of numbers (n,) and (m,)."""
    both = np.concatenate([x, y])
    below = [np.searchsorted(np.sort(z), both, side="right") / len(z) for z in (x, y)]
    return float(np.abs(below[0] - below[1]).max())


def g_statistic(x: np.ndarray, y: np.ndarray) -> float:
    """G statistic of the counts by type, (n, t) and (m, t) by document; half a count is added to each."""
    from scipy.stats import chi2_contingency

    table = np.array([x.sum(axis=0), y.sum(axis=0)])
    table = table[:, table.sum(axis=0) > 0]
    return float(chi2_contingency(table + 0.5, lambda_="log-likelihood").statistic) if table.shape[1] > 1 else 0.0


def excess(x: np.ndarray, y: np.ndarray) -> float:
    """Evidence that y (m,) of 0 and 1 holds a larger share of 1 than x (n,): -log10 of Fisher's exact p, one-sided."""
    from scipy.stats import fisher_exact

    table = [[y.sum(), len(y) - y.sum()], [x.sum(), len(x) - x.sum()]]
    return float(-np.log10(max(min(fisher_exact(table, alternative="greater").pvalue, 1.0), 1e-300)))


# -- which documents drive a difference ---------------------------------------------------------------------------


def _scaled_mmd(x: np.ndarray, y: np.ndarray) -> float:
    return mmd(*_scaled(x, y))


def _scaled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both samples in standard deviations of the first; at most 4, so that one odd post is one odd post."""
    centre, spread = x.mean(axis=0), x.std(axis=0).clip(min=1e-9)
    return tuple(((z - centre) / spread).clip(-4, 4) for z in (x, y))


def witness(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much more each row of y (m,) is like the rest of y than like x: the witness function of `mmd`."""
    width, m = bandwidth(x), len(y)
    return (kernel(y, y, width).sum(axis=1) - 1) / (m - 1) - kernel(y, x, width).mean(axis=1)


def _scaled_witness(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return witness(*_scaled(x, y))


def _displaced(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from the mean of x, in the direction in which y has moved."""
    return (y - x.mean()) * (1 if y.mean() >= x.mean() else -1)


def _overdone(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum over a document's items of the log of how much more often their type occurs in y than in x."""
    shares = [(z.sum(axis=0) + 0.5) / (z.sum() + 0.5 * z.shape[1]) for z in (x, y)]
    return y @ np.log(shares[1] / shares[0])


class Detector(NamedTuple):
    """What a detector looks at, its statistic of reference and window, and how much each document adds to it."""

    watch: str  # inputs, outputs or rewards
    feature: str
    statistic: Callable[[np.ndarray, np.ndarray], float]
    influence: Callable[[np.ndarray, np.ndarray], np.ndarray]


DETECTORS = {
    "words, MMD": Detector("inputs", "words", mmd, witness),
    "words, classifier": Detector("inputs", "words", classifier, witness),
    "layout, MMD": Detector("inputs", "layout", _scaled_mmd, _scaled_witness),
    "length, KS": Detector("inputs", "characters", ks, _displaced),
    "entity types, G": Detector("outputs", "entity_types", g_statistic, _overdone),
    "relationship types, G": Detector("outputs", "relationship_types", g_statistic, _overdone),
    "relationships a report, KS": Detector("outputs", "relationships", ks, _displaced),
    "report length, KS": Detector("outputs", "report_characters", ks, _displaced),
    "parse rate, Fisher": Detector("outputs", "unparsable", excess, _displaced),
    "reward, KS": Detector("rewards", "reward", ks, _displaced),
}

# A rate that never moved on the stationary stretch must not alarm at the first slip: p = 0.01 at least.
FLOORS = {"parse rate, Fisher": 2.0}


# How a stream is watched: inputs document by document, reports (outputs and rewards) of the few that the policy reads.
WATCHES = {name: "inputs" if detector.watch == "inputs" else "reports" for name, detector in DETECTORS.items()}


def statistics(reference: Features, window: Features) -> dict[str, float]:
    """Statistics of all detectors whose feature the window has."""
    return {
        name: detector.statistic(reference[detector.feature], window[detector.feature])
        for name, detector in DETECTORS.items()
        if detector.feature in window
    }


# -- calibration --------------------------------------------------------------------------------------------------


def _size(features: Features) -> int:
    return len(next(iter(features.values())))


def spread(total: int, taken: int, *, block: int) -> np.ndarray:
    """Places (taken,) of whole blocks of consecutive documents, evenly spaced over a stretch of `total`.

    Raises ValueError where `block` does not divide `taken` or the stretch is too short.
    """
    if taken % block or taken > total // block * block:
        raise ValueError(f"{taken} documents cannot be taken in blocks of {block} from a stretch of {total}")
    chosen = np.linspace(0, total // block - 1, taken // block).round().astype(int)
    return (chosen[:, None] * block + np.arange(block)).ravel()


def draws(stretch: Features, *, reference: int, window: int, block: int, samples: int = 499, seed: int) -> pd.DataFrame:
    """Statistics of windows that have not drifted, one row a draw: whole blocks of a stationary stretch in random
    order, the first ones being the reference and the next the window.

    Raises ValueError where a reference and a window do not fit into the stretch, or `block` does not divide both.
    """
    if reference % block or window % block:
        raise ValueError(f"blocks of {block} documents must divide reference ({reference}) and window ({window})")
    n, rng = _size(stretch) // block, np.random.default_rng(seed)
    if reference + window > n * block:
        raise ValueError(
            f"a reference of {reference} and a window of {window} documents do not fit into a stretch of "
            f"{_size(stretch)}: give more documents, or take a smaller window or reference"
        )
    found = []
    for _ in range(samples):
        order = (rng.permutation(n)[:, None] * block + np.arange(block)).ravel()
        after = order[reference : reference + window]
        found.append(statistics(rows(stretch, order[:reference]), rows(stretch, after)))
    return pd.DataFrame(found)


def calibrate(drawn: pd.DataFrame, *, rate: float) -> pd.Series:
    """Threshold of every detector, such that a share of at most `rate` of the draws is above any of them; not below the
    detector's floor in `FLOORS`.

    Each detector gets the same false-alarm rate of its own (min-p of Westfall and Young), which heeds that detectors
    move together. Raises ValueError where there are too few draws for the rate.
    """
    if not 0 < rate < 1 or rate * len(drawn) < 5:
        raise ValueError(f"{len(drawn)} draws are too few for a false-alarm rate of {rate}: take {int(5 / rate) + 1}")
    tail = drawn.rank(ascending=False, method="max") / len(drawn)  # share of draws as large or larger
    smallest = np.sort(tail.min(axis=1))
    held = smallest[np.searchsorted(smallest, smallest, side="right") / len(smallest) <= rate]
    level = held[-1] if len(held) else 0.0
    floors = pd.Series({name: FLOORS.get(name, -np.inf) for name in drawn})
    return drawn.where(tail > level).max().clip(lower=floors)


# -- watching -----------------------------------------------------------------------------------------------------


def watch(reference: Features, stream: Features, thresholds: pd.Series, *, window: int) -> pd.DataFrame:
    """Compare every full window of a stream with the reference: window, first, end (places), detector, statistic,
    threshold, fired.

    Documents after the last full window are left to the next call. Raises ValueError where no window is full.
    """
    if window > _size(stream):
        raise ValueError(f"a window of {window} documents is larger than the stream of {_size(stream)}")
    found = []
    for number in range(_size(stream) // window):
        first, end = number * window, (number + 1) * window
        values = statistics(reference, rows(stream, slice(first, end)))
        found += [(number, first, end, name, value, thresholds[name]) for name, value in values.items()]
    table = pd.DataFrame(found, columns=["window", "first", "end", "detector", "statistic", "threshold"])
    return table.assign(fired=table["statistic"] > table["threshold"])


def any_alarm(*watched: pd.DataFrame) -> Interval:
    """Share of the windows of several watches in which any detector fired, with Wilson's interval."""
    flags = pd.concat([table.groupby("window")["fired"].any() for table in watched])
    return wilson(int(flags.sum()), len(flags))


def false_alarms(watched: pd.DataFrame) -> pd.DataFrame:
    """Share of windows with an alarm, of any detector and of each, with Wilson intervals: value, low, high."""
    flags = watched.pivot(index="window", columns="detector", values="fired")
    flags = flags[list(dict.fromkeys(watched["detector"]))]
    flags.insert(0, "any detector", flags.any(axis=1))
    rates = {name: wilson(int(column.sum()), len(column)) for name, column in flags.items()}
    return pd.DataFrame(rates, index=Interval._fields).T


# -- a stream of one's own ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watching:
    """How the inputs of a stream are watched; sizes in documents."""

    window: int = 60  # compared with the reference at once; the resolution of a delay
    reference_windows: int = 6  # that windows are compared with: as many, and what differs is mostly the window's
    story_block: int = 20  # a run in which stories change, for `burst_weights`
    draws: int = 400  # windows without drift that thresholds come from: 20 of them above a rate of 0.05
    rate: float = 0.05  # share of the windows without drift that thresholds let alarm
    seed: int = 0  # of the draws


class WatchedInputs(NamedTuple):
    """The reference, the features of the part watched, and the rows of `watch` on the part to check and on that one."""

    reference: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    checked: pd.DataFrame
    watched: pd.DataFrame


def watch_inputs(
    parts: Mapping[str, Sequence[Document]], encoder: "SentenceTransformer", watching: Watching
) -> WatchedInputs:
    """Fit weights, calibrate and watch the inputs of a stream that `stretches.cut` has cut.

    An encoder that is fitted on texts must know those of the part `fit` alone: one that had seen the part to calibrate
    on alarmed in 37 to 70 % of the windows of stationary streams of 6,000 posts, instead of 3 to 13 %.
    Raises ValueError where a part is too short for the sizes asked for.
    """
    texts = {name: [document.text for document in part] for name, part in parts.items()}
    weights = burst_weights(encode(encoder, texts["fit"]), block=watching.story_block)
    seen = {name: inputs(texts[name], encode(encoder, texts[name]) @ weights) for name in texts if name != "fit"}
    window, size = watching.window, watching.reference_windows * watching.window
    drawn = draws(
        seen["calibrate"], reference=size, window=window, block=window, samples=watching.draws, seed=watching.seed
    )
    thresholds = calibrate(drawn, rate=watching.rate)
    reference = rows(seen["calibrate"], spread(len(texts["calibrate"]), size, block=window))
    checked, watched = (watch(reference, seen[name], thresholds, window=window) for name in ("check", "watched"))
    return WatchedInputs(reference, seen["watched"], checked, watched)


# -- planted drift ------------------------------------------------------------------------------------------------


def plant(n: int, background: int, drifted: int, *, at: int, share: float, seed: int) -> np.ndarray:
    """Places (n,) of a stream in `joined(background, drifted)`: a run of the background from a random place on, in
    which from `at` on each document is with probability `share` replaced by the next of a run of the drifted ones.

    Either part starts again where it ends.
    """
    rng = np.random.default_rng(seed)
    places = (rng.integers(background) + np.arange(n)) % background
    replaced = np.flatnonzero((np.arange(n) >= at) & (rng.random(n) < share))
    places[replaced] = background + (rng.integers(drifted) + np.arange(len(replaced))) % drifted
    return places


class Planted(NamedTuple):
    """A stream with a planted change: places of its documents in the background followed by the drifted ones, and its
    features."""

    order: np.ndarray
    features: dict[str, np.ndarray]


def planted(background: Features, drifted: Features, *, n: int, at: int, share: float, seed: int) -> Planted:
    """A stream of `n` documents with a change at `at`, as `plant` places it."""
    sizes = {"background": _size(background), "drifted": _size(drifted)}
    order = plant(n, **sizes, at=at, share=share, seed=seed)
    return Planted(order, rows(joined(background, drifted), order))


@dataclass(frozen=True)
class Planting:
    """How often a change is planted, and how long it is watched for."""

    window: int = 60  # documents
    windows: int = 6  # that each watch is given: a change that none of them sees is missed
    share: float = 1.0  # of the documents after the change that have changed
    repetitions: int = 20  # at random places: the delay depends on how much of the first window has changed
    seed: int = 0  # of places and changes


def delays(
    reference: Features, background: Features, drifted: Features, thresholds: pd.Series, planting: Planting
) -> pd.DataFrame:
    """Plant a change again and again and measure the delay of each detector: repetition, detector, delay.

    `delay` is the number of documents from the change to the end of the first window that fires, inf where none of
    the windows does; the change comes at a random place of the first window.
    """
    window, seed, found = planting.window, planting.seed, []
    pool, sizes = joined(background, drifted), {"background": _size(background), "drifted": _size(drifted)}
    for repetition in range(planting.repetitions):
        at = int(np.random.default_rng([seed, repetition]).integers(window))
        own = seed * planting.repetitions + repetition
        places = plant(planting.windows * window, **sizes, at=at, share=planting.share, seed=own)
        watched = watch(reference, rows(pool, places), thresholds, window=window)
        ends = watched["end"].where(watched["fired"], np.inf).groupby(watched["detector"], sort=False).min()
        found += [(repetition, name, end - at) for name, end in ends.items()]
    return pd.DataFrame(found, columns=["repetition", "detector", "delay"])


def delays_of_changes(
    reference: Features,
    inputs: Mapping[str, Features],
    reports: Mapping[str, Features],
    thresholds: pd.Series,
    planting: Planting,
    *,
    changes: Sequence[str],
    thin: int,
) -> pd.DataFrame:
    """`delays` of each change in documents of the stream, and of any detector: drift, repetition, detector, delay.

    The background of both watches is their `check`; a change without reports is looked for in the inputs alone. `thin`
    is the number of documents of the stream for each that the policy reads.
    """
    found = []
    for change in changes:
        watches = [delays(reference, inputs["check"], inputs[change], thresholds, planting)]
        if change in reports:
            slow = delays(reference, reports["check"], reports[change], thresholds, planting)
            watches.append(slow.assign(delay=slow["delay"] * thin))
        first = pd.concat(watches).groupby("repetition", as_index=False)["delay"].min()
        found.append(pd.concat([first.assign(detector="any detector"), *watches]).assign(drift=change))
    return pd.concat(found)


def summary(measured: pd.DataFrame, *, seed: int, samples: int = 2000) -> pd.DataFrame:
    """Median delay with its bootstrap interval, share of missed changes with Wilson's, by `drift` and detector: columns
    drift, detector, median, low, high, missed, missed_low, missed_high.

    Missed ones count as infinitely late: a median is inf where more than half are missed.
    """
    found = []
    for (kind, name), group in measured.groupby(["drift", "detector"], sort=False):
        values = np.sort(group["delay"].to_numpy())
        picked = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
        medians = np.quantile(values[picked], 0.5, axis=1, method="lower")
        low, high = np.quantile(medians, [0.025, 0.975], method="lower")
        missed = wilson(int(np.isinf(values).sum()), len(values))
        found.append((kind, name, np.quantile(values, 0.5, method="lower"), low, high, *missed))
    columns = ["drift", "detector", "median", "low", "high", "missed", "missed_low", "missed_high"]
    return pd.DataFrame(found, columns=columns)
