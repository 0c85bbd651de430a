"""Which phase and round uses which documents: drawn at random, recorded, and never given twice.

1. `read`    what earlier phases have reserved, from the `reserved.jsonl` in their folders;
2. `draw`    the next free documents of a pool, for one purpose;
3. `write`   all of it for the phases to come. A phase's record holds those of the phases before it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erlib.task.jsonl import read_jsonl, write_jsonl
from erlib.task.schema import Document

FILE = "reserved.jsonl"


class Drawn(NamedTuple):
    """Documents in the order of their ids; how many were passed over as unfit, and how many are free after them.

    `reserved` is the record: id → purpose.
    """

    documents: list[Document]
    unfit: int
    left: int
    reserved: dict[str, str]


def read(*folders: str | Path) -> dict[str, str]:
    """What the phases in these folders and those before them have reserved: id → purpose.

    Empty folder names are passed over. Raises ValueError where two records give one document to two purposes.
    """
    records = []
    for folder in filter(None, folders):
        rows = read_jsonl(Path(folder) / FILE)
        records.append({row["id"]: row["purpose"] for row in rows})
    return merged(*records)


def draw(
    pool: Iterable[Document],
    n: int,
    *,
    purpose: str,
    earlier: Mapping[str, str],
    seed: int,
    fits: Callable[[Document], bool] = lambda document: True,
    least: int | None = None,
) -> Drawn:
    """Reserve the next `n` documents of the pool that nobody has and that fit, in an order that `seed` shuffles.

    Where there are fewer, all of them if they are `least` or more, else ValueError that says who has the others. The
    outcome does not depend on the order of `pool`.
    """
    pool = list(pool)
    free = sorted((document for document in pool if document.id not in earlier), key=lambda document: document.id)
    chosen: list[Document] = []
    unfit = 0
    for index in np.random.default_rng(seed).permutation(len(free)):
        if len(chosen) == n:
            break
        if fits(free[index]):
            chosen.append(free[index])
        else:
            unfit += 1
    if len(chosen) < (n if least is None else min(n, least)):
        taken = Counter(earlier[document.id] for document in pool if document.id in earlier)
        others = ", ".join(f"{number:,} for {name}" for name, number in taken.most_common()) or "none by others"
        at_least = f", {least:,} at least" if least is not None else ""
        raise ValueError(
            f"{purpose}: {n:,} documents are wanted{at_least}; of {len(pool):,} there are {len(chosen):,} that are "
            f"free and not too long ({others}; {unfit:,} too long). Ask for fewer in this phase (its `n_documents`, or "
            "`steps` and `prompts_per_step`), for fewer reports (`n_reports` in 02_corpus), or give more documents "
            "(`documents`, `n_documents` in 02_corpus)"
        )
    chosen.sort(key=lambda document: document.id)
    return Drawn(chosen, unfit, len(free) - len(chosen) - unfit, {document.id: purpose for document in chosen})


def merged(*records: Mapping[str, str]) -> dict[str, str]:
    """One record of several; raises ValueError that names the document and both purposes where they overlap."""
    found: dict[str, str] = {}
    for record in records:
        for name, purpose in record.items():
            if found.setdefault(name, purpose) != purpose:
                raise ValueError(f"document {name} is reserved twice, for {found[name]!r} and for {purpose!r}")
    return found


def write(path: Path, *records: Mapping[str, str]) -> None:
    """Write records as one; refuses an overlap as `merged` does."""
    write_jsonl(path, ({"id": name, "purpose": purpose} for name, purpose in sorted(merged(*records).items())))
