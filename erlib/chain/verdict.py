"""What a phase is judged by: a value beside its target is met, missed or undecided.

A figure that was measured on some documents has an interval, and on another CPU or seed it lands elsewhere in it. So a
check is `missed` only where its whole interval lies on the wrong side of the target, `met` only where all of it lies on
the right side, and `undecided` between. A value without an interval is met or missed.
"""

import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

Outcome = Literal["met", "missed", "undecided"]
OUTCOMES: tuple[Outcome, ...] = ("met", "undecided", "missed")
SIGNS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq}


class Check(NamedTuple):
    """One row of a verdict; `outcome` is None where there is no target, and only a missed `gate` fails the phase."""

    check: str
    value: float | int | bool | str | None
    low: float | None
    high: float | None
    target: str | None
    outcome: Outcome | None
    gate: bool


def plain(value: Any) -> Any:
    """Turn a numpy scalar into a Python one, and what JSON has no number for into None."""
    value = _number(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    target: str | None = None,
    gate: bool = True,
) -> Check:
    """Judge `value` against a target such as ">= 0.80" (`>= > <= < ==`); NaN is missed, no target informs only.

    `value` is a number, or a `metrics.Interval`, which brings `low` and `high` with it. An end of the interval that is
    NaN counts as unlimited on that side, and so does one that is absent beside another.

    A missed target fails the phase if it is a `gate`, one without which the next phases are not worth running; else it
    is shown and the run goes on. Raises ValueError for a target that cannot be read.
    """
    if isinstance(value, tuple):  # an interval: value, low, high
        value, low, high = value
    value, low, high = _number(value), _number(low), _number(high)
    outcome = None if target is None else _outcome(name, value, low, high, target)
    return Check(name, plain(value), plain(low), plain(high), target, outcome, gate and target is not None)


def failed(checks: Iterable[Check]) -> bool:
    """Tell whether a gate was missed."""
    return any(row.outcome == "missed" and row.gate for row in checks)


def counts(rows: Sequence[Any]) -> dict[Outcome, int]:
    """Count the outcomes of checks as a manifest has them (`verdict`): met, undecided, missed."""
    return {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in OUTCOMES}


def _outcome(name: str, value: Any, low: float | None, high: float | None, target: str) -> Outcome:
    match_ = re.fullmatch(r"(>=|<=|==|>|<)\s*(\S+)", target.strip())
    if match_ is None:
        raise ValueError(f'{name}: a target looks like ">= 0.80", not {target!r}')
    sign, bound = match_[1], float(match_[2])
    if value is None or value != value:  # NaN
        return "missed"
    if low is None and high is None:
        return "met" if SIGNS[sign](value, bound) else "missed"
    low = -math.inf if low is None or low != low else low
    high = math.inf if high is None or high != high else high
    if sign == "==":
        return "missed" if not low <= bound <= high else "met" if low == high else "undecided"
    ends = {SIGNS[sign](low, bound), SIGNS[sign](high, bound)}
    return "undecided" if len(ends) == 2 else "met" if ends == {True} else "missed"


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
