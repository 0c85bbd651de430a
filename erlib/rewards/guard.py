"""A guard on the distribution of rewards while a policy is trained, and what the training log says when it went wrong.

The reward model is known to be right only where it was evaluated: on samples of the round's start. So the rewards of
the last steps are compared with those that it gave on held-out documents then (the reference). An honestly improving
policy moves the mean up *inside the support* of the reference and keeps the shape of its distribution. These do not:

    outliers      too much mass above the 99th percentile, or any real share far beyond the maximum
    broken        too much mass below the 1st percentile, or the mean falls by more than a reference deviation
    collapse      the spread shrinks to a fraction: every answer gets the same reward
    explosion     the spread grows to a multiple
    other shape   the Wasserstein distance that is left once both means are laid on each other is large

The limits are in units of the reference, so that they serve any reward model. The total Wasserstein and Kolmogorov-
Smirnov distances and the population stability index react to honest improvement just as well: they are measured and
recorded as evidence, and alarm nobody.

Such signals audit, they do not foretell: a policy can exploit a reward model inside its usual range, and then nothing
is seen here; what is seen has already happened. The check on the outcome is people's preference (phases 08 to 10).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

_ENOUGH = 20  # rewards below which a percentile says nothing


class Figures(NamedTuple):
    """How a window of rewards compares with the reference; distances in its standard deviations, shares 0 to 1."""

    mean: float  # of the window
    shift: float  # of the mean
    spread: float  # the window's standard deviation over the reference's
    below: float  # share below the reference's 1st percentile
    above: float  # share above its 99th
    far: float  # share beyond the maximum by more than the 99th percentile is from the median
    ks: float  # two-sample Kolmogorov-Smirnov statistic
    wasserstein: float  # distance of the two distributions
    shape: float  # the same once the means are laid on each other
    psi: float  # population stability index over the reference's tenths


class Alarm(NamedTuple):
    """Why training must stop, in words, and the figures of the window; None where rewards are not finite."""

    reason: str
    mean: float | None = None
    shift: float | None = None
    spread: float | None = None
    below: float | None = None
    above: float | None = None
    far: float | None = None
    ks: float | None = None
    wasserstein: float | None = None
    shape: float | None = None
    psi: float | None = None


def compare(reference: np.ndarray, rewards: np.ndarray) -> Figures:
    """Compare rewards (n,) with the reference (N,); raises ValueError where the reference is too small or constant."""
    from scipy.stats import ks_2samp, wasserstein_distance

    deviation = float(np.std(reference))
    if len(reference) < _ENOUGH or not np.isfinite(reference).all() or not deviation > 0:
        raise ValueError(
            f"a reference needs {_ENOUGH} finite rewards that differ, got {len(reference)}, sd {deviation}"
        )
    low, median, high = np.quantile(reference, [0.01, 0.5, 0.99])
    centred = reference - reference.mean(), rewards - rewards.mean()
    return Figures(
        mean=float(rewards.mean()),
        shift=float(rewards.mean() - reference.mean()) / deviation,
        spread=float(np.std(rewards)) / deviation,
        below=float(np.mean(rewards < low)),
        above=float(np.mean(rewards > high)),
        far=float(np.mean(rewards > reference.max() + (high - median))),
        ks=float(ks_2samp(reference, rewards, method="asymp").statistic),
        wasserstein=float(wasserstein_distance(reference, rewards)) / deviation,
        shape=float(wasserstein_distance(*centred)) / deviation,
        psi=stability_index(reference, rewards),
    )


def stability_index(reference: np.ndarray, rewards: np.ndarray, *, bins: int = 10) -> float:
    """Population stability index: sum over bins of (q - p) ln(q / p), bins with equal shares p of the reference.

    Half a count is added to every bin, so that an empty one stays finite.
    """
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, bins + 1)[1:-1]))
    counts = [np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) for values in (reference, rewards)]
    p, q = ((count + 0.5) / (count + 0.5).sum() for count in counts)
    return float(np.sum((q - p) * np.log(q / p)))


class Guard:
    """Watches the rewards of the last `window` steps against `reference`, the rewards of held-out samples (N,)."""

    def __init__(
        self,
        reference: np.ndarray,
        *,
        window: int = 5,
        max_above: float = 0.35,  # a normal distribution reaches it when its mean has risen by 1.9 deviations
        max_far: float = 0.02,
        max_below: float = 0.15,
        max_fall: float = 1.0,
        spread: tuple[float, float] = (0.3, 2.5),
        max_shape: float = 0.75,
    ):
        self.reference = np.asarray(reference, dtype=float)
        compare(self.reference, self.reference)  # raises now rather than at the first step
        self.window, self.spread = window, spread
        self.max_above, self.max_far, self.max_below = max_above, max_far, max_below
        self.max_fall, self.max_shape = max_fall, max_shape
        self._steps: list[list[float]] = []

    def update(self, rewards: np.ndarray) -> Alarm | None:
        """Take a step's raw rewards (n,); an alarm where the window is full and has left the reference.

        A reward that is not finite is an alarm at once.
        """
        rewards = np.asarray(rewards, dtype=float)
        if not np.isfinite(rewards).all():
            return Alarm(f"{np.sum(~np.isfinite(rewards))} rewards are not finite")
        self._steps = [*self._steps, rewards.tolist()][-self.window :]
        seen = np.concatenate(self._steps)
        if len(self._steps) < self.window or len(seen) < _ENOUGH:
            return None
        figures = compare(self.reference, seen)
        reason = self._reason(figures)
        return Alarm(reason, *figures) if reason else None

    def _reason(self, figures: Figures) -> str:
        narrow, wide = self.spread
        found = [
            (
                figures.far > self.max_far,
                f"outliers: {figures.far:.1%} of the rewards lie far beyond the largest of the evaluation",
            ),
            (
                figures.above > self.max_above,
                f"outliers: {figures.above:.0%} of the rewards lie above the evaluation's 99th percentile",
            ),
            (
                figures.below > self.max_below,
                f"broken: {figures.below:.0%} of the rewards lie below the evaluation's 1st percentile",
            ),
            (figures.shift < -self.max_fall, f"broken: the mean fell by {-figures.shift:.1f} deviations"),
            (figures.spread < narrow, f"collapse: the spread is {figures.spread:.2f} of the evaluation's"),
            (figures.spread > wide, f"explosion: the spread is {figures.spread:.1f} times the evaluation's"),
            (
                figures.shape > self.max_shape,
                f"other shape: {figures.shape:.2f} deviations from the evaluation's, means aside",
            ),
        ]
        return "; ".join(words for seen, words in found if seen)

    def state_dict(self) -> dict[str, list[list[float]]]:
        """The rewards of the window, as JSON takes them."""
        return {"steps": [list(step) for step in self._steps]}

    def load(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Go on from what `state_dict` gave; an empty window is `{"steps": []}`."""
        self._steps = [list(step) for step in state["steps"]][-self.window :]


# -- when a gate fails --------------------------------------------------------------------------------------------


def diagnose(log: "pd.DataFrame", *, gold: str, kl_target: float) -> "pd.DataFrame":
    """What a PPO log (one row per step, columns as `ppo` writes them) says of a training that missed its gate.

    Compares the last fifth of the steps with the first; `gold` names the column of the gold score. Rows are signs:
    measured, seen ("YES", "no", "unknown" where it was never measured), and what to change.
    """
    import pandas as pd

    def ends(column: str) -> tuple[float, float]:
        known = log[column].dropna() if column in log else pd.Series(dtype=float)
        share = max(1, len(known) // 5)
        return float(known[:share].mean()), float(known[-share:].mean())

    def rise(column: str) -> float:
        first, last = ends(column)
        return last - first

    reward, truth, kl = rise("reward_normalised"), rise(gold), ends("kl")[1]
    entropy = ends("entropy")[1] / ends("entropy")[0]
    rows = [
        (
            "reward rises, gold falls",
            truth,
            reward > 0.2 and truth < 0,
            "the reward model is exploited: new pairs",
        ),
        ("reward does not rise", reward, reward < 0.1, "policy does not learn: higher rate, lower kl_coef, more steps"),
        ("KL above its target", kl, kl > 1.5 * kl_target, "too far from the start: higher kl_coef, fewer epochs"),
        ("KL hardly moved", kl, kl < 0.1 * kl_target, "too close to the start: higher rate, lower kl_coef"),
        ("value model explains nothing", x := ends("explained_variance")[1], x < 0, "longer critic warm-up"),
        ("updates clipped", x := ends("clip_fraction")[1], x > 0.3, "steps too large: lower rate, fewer epochs"),
        ("entropy collapsed", entropy, entropy < 0.5, "one answer for everything: higher kl_coef, lower rate"),
        ("reports stop parsing", x := rise("parse_rate"), x < -0.03, "form is lost: higher kl_coef, look at samples"),
        ("reports do not end", x := rise("eos_rate"), x < -0.03, "raise the penalty for a missing end"),
    ]
    table = pd.DataFrame(rows, columns=["sign", "measured", "seen", "what to change"])
    seen = table["seen"].map({True: "YES", False: "no"}).where(table["measured"].notna(), "unknown")
    return table.assign(seen=seen).set_index("sign")
