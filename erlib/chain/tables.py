"""Numbers, intervals and verdicts as a reader sees them, in reports, in the index, in Markdown and on the console."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from erlib.chain.verdict import OUTCOMES, Check, counts

if TYPE_CHECKING:
    import pandas as pd

# Shapes and words, so that the colour adds to them and carries nothing alone.
MARKS = {"met": "✓ met", "undecided": "○ undecided", "missed": "✗ missed", None: ""}


def number(value: Any, name: str = "") -> str:
    """Write a value: four significant digits, whole numbers whole; a p-value (`name` ends in p) not below 0.001."""
    if value is None:
        return "undefined"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if re.search(r"(?:^|[\W_])p$", name) and 0 <= value < 0.001:
        return "< 0.001"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def interval(row: Mapping[str, Any]) -> str:
    """Write a check's interval; an end that is not known is left out."""
    low, high = row["low"], row["high"]
    if low is None and high is None:
        return ""
    if high is None:
        return f"from {number(low)}"
    return f"up to {number(high)}" if low is None else f"{number(low)} to {number(high)}"


def outcome(row: Mapping[str, Any]) -> str:
    """Word a check's outcome, with a mark; a missed target that stops no run says so."""
    return MARKS[row["outcome"]] + (" (not a gate)" if row["outcome"] == "missed" and not row["gate"] else "")


def tally(rows: Sequence[Mapping[str, Any]]) -> str:
    """Count a verdict's outcomes in words: "3 met, 1 undecided, 0 missed"."""
    found = counts(rows)
    return ", ".join(f"{found[each]} {each}" for each in OUTCOMES)


def markdown_row(cells: Iterable[Any]) -> str:
    """Write one row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def verdict_table(checks: Sequence[Check]) -> "pd.DataFrame":
    """Lay a verdict out for reading: check, value, 95 % interval, target, outcome."""
    import pandas as pd

    rows = [
        {
            "check": row["check"],
            "value": number(row["value"], row["check"]),
            "95 % interval": interval(row),
            "target": row["target"] or "",
            "outcome": outcome(row),
        }
        for row in (each._asdict() for each in checks)
    ]
    return pd.DataFrame(rows, columns=["check", "value", "95 % interval", "target", "outcome"]).set_index("check")


def cell(value: float) -> str:
    """Write a float in a displayed frame: whole numbers whole, else six significant digits; rounds no count."""
    if value != value:
        return "NaN"
    if abs(value) >= 1e15:
        return f"{value:g}"
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}" if abs(value) >= 1e6 else f"{value:.6g}"
