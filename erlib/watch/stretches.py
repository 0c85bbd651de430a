"""A dated stream of one's own: documents in order of time, cut into a part to fit, to calibrate, to check and to watch.

The first parts are taken for stationary. Nothing here knows what is measured on them: `drift` does that.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import pandas as pd

from erlib.task.schema import Document

PARTS = ("fit", "calibrate", "check", "watched")


def read_date(text: str | None) -> datetime | None:
    """A date such as 2025-01-31 or 2025-01-31T09:30:00Z, in UTC where it names no zone; None for anything else."""
    try:
        date = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def require_dated(documents: Sequence[Document]) -> list[datetime]:
    """Dates of the documents, in UTC where none is said; raises ValueError where one is missing, unreadable or earlier
    than the one before."""
    dates: list[datetime] = []
    for place, document in enumerate(documents):
        date = read_date(document.date)
        if date is None:
            raise ValueError(
                f"document {document.id!r} (number {place + 1}) has the date {document.date!r}: every document of a "
                "stream needs one such as 2025-01-31 or 2025-01-31T09:30:00Z"
            )
        if dates and date < dates[-1]:
            before = documents[place - 1]
            raise ValueError(
                f"document {document.id!r} (number {place + 1}) of {document.date} comes after {before.id!r} of "
                f"{before.date}: sort the stream by date, earliest first"
            )
        dates.append(date)
    return dates


class Ordered(NamedTuple):
    """Documents with a readable date, earliest first, and the number of those without."""

    documents: list[Document]
    undated: int


def in_order(documents: Sequence[Document]) -> Ordered:
    """Put documents in order of their dates, those of one date in the order given; leave out and count those without
    a date that can be read."""
    dated = [(date, document) for document in documents if (date := read_date(document.date)) is not None]
    dated.sort(key=lambda pair: pair[0])
    return Ordered([document for _, document in dated], len(documents) - len(dated))


class Stretches(NamedTuple):
    """The parts of a stream by the names of `PARTS`; where it cannot be watched there are none, and `said` says why."""

    parts: dict[str, list[Document]]
    said: str


def cut(ordered: Ordered, tenths: Sequence[int], *, smallest: Mapping[str, int]) -> Stretches:
    """Cut a stream into tenths to fit, to calibrate and to check on; the rest is watched.

    There are no parts where documents have no date or all the same one, or where a part would hold fewer documents
    than `smallest` says. Raises ValueError unless `tenths` are three numbers that leave a rest.
    """
    if len(tenths) != 3 or min(tenths) < 1 or sum(tenths) > 9:
        raise ValueError(f"tenths to fit, to calibrate and to check on must be three that leave a rest, not {tenths}")
    documents, undated = ordered
    left_out = f"; {undated:,} without a date that can be read are left out" if undated else ""
    if not documents:
        return Stretches({}, f"none of the {undated:,} documents has a date such as 2025-01-31")
    if read_date(documents[0].date) == read_date(documents[-1].date):
        return Stretches({}, f"all {len(documents):,} documents have the date {documents[0].date}{left_out}")
    borders, taken = [0], 0
    for each in tenths:
        taken += each
        borders.append(len(documents) * taken // 10)
    borders.append(len(documents))
    parts = {name: documents[borders[n] : borders[n + 1]] for n, name in enumerate(PARTS)}
    few = [f"{len(part):,} of {smallest[name]:,} to be {_DONE[name]}" for name, part in parts.items()
           if len(part) < smallest[name]]  # fmt: skip
    if few:
        return Stretches({}, f"{len(documents):,} dated documents are too few ({', '.join(few)}){left_out}")
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
    return Stretches(parts, f"{documents[0].date} to {documents[-1].date}: {sizes}{left_out}")


_DONE = dict(zip(PARTS, ("fitted on", "calibrated on", "checked on", "watched"), strict=True))


def dated_windows(watched: pd.DataFrame, documents: Sequence[Document]) -> pd.DataFrame:
    """Rows of `drift.watch` with the `date` (UTC) of the last document of each window of these documents."""
    dates = [date.astimezone(UTC).replace(tzinfo=None) for date in require_dated(documents)]
    return watched.assign(date=[dates[end - 1] for end in watched["end"]])
