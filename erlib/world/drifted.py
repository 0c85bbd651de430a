"""Planted drift, the control of the watch: a stationary stream of the embedded world, and documents unlike it.

topic      topics that the stream does not have
length     the longest documents of each kind of post, topics and kinds as before
structure  transcripts, a kind of post, with phrasings, that the stream never has
serving    the same documents; what changes is how reports are written
none       more of the same: what chance alone detects
"""

from collections.abc import Collection
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import pandas as pd

from erlib.task.schema import Brief, Document
from erlib.world.posts import inventory
from erlib.world.stream import MINUTES_PER_DOCUMENT, YEAR_MINUTES, Sample, World

INPUT_CHANGES = ("topic", "length", "structure")
READ_CHANGES = (*INPUT_CHANGES, "serving")  # those whose documents the policy reads too
CHANGES = (*READ_CHANGES, "none")

OTHER_STORIES = 1000  # added to the run's seed: other stories than those of phase 02
CONTROL_WINDOWS = 40  # of `none`, which the longest documents are taken from too
SHORTER = 2 / 3  # of the documents of each kind; the others are long


class Sizes(NamedTuple):
    """Sizes of the control: documents to calibrate on (to fit on half as many), to check on, of a window; windows of
    `structure` and `serving`."""

    stretch: int
    checked: int
    window: int
    changed_windows: int


def held_out_topics(n: int) -> list[str]:
    """The `n` topics that the stationary stream does not have: the first ones by name."""
    return sorted(inventory()["topics"])[:n]


def control(brief: Brief, sizes: Sizes, *, held_out: Collection[str], seed: int) -> dict[str, list[Document]]:
    """Documents, cleaned, of a stationary stream in their order (fit, calibrate, check) and of each of `CHANGES`."""
    world = World(seed=seed + OTHER_STORIES, brief=brief, drift=0)
    window = sizes.window
    borders = np.cumsum([0, sizes.stretch // 2, sizes.stretch, sizes.checked]).tolist()
    samples = world.stream(round((borders[-1] + CONTROL_WINDOWS * window) / 0.7))  # 0.7: some are held out
    known = [sample for sample in samples if sample.truth.topic not in held_out]
    parts = {name: known[borders[n] : borders[n + 1]] for n, name in enumerate(("fit", "calibrate", "check"))}
    none = known[borders[-1] :]
    changed = sizes.changed_windows * window
    parts["topic"] = [sample for sample in samples if sample.truth.topic in held_out]
    parts["length"] = longest(none)
    parts["structure"] = world.out_of_distribution(changed)
    parts["serving"] = parts["check"][:changed]
    parts["none"] = none
    return {name: [sample.exemplar.document for sample in part] for name, part in parts.items()}


def longest(samples: list[Sample]) -> list[Sample]:
    """The longest third of the posts of each kind, in their order."""
    lengths = pd.Series([len(sample.document.text) for sample in samples])
    ranks = lengths.groupby([sample.truth.kind for sample in samples]).rank(pct=True)
    return [samples[place] for place in np.flatnonzero(ranks > SHORTER)]


def year(brief: Brief, *, parts: int, window: int, held_out: Collection[str], seed: int) -> list[Document]:
    """A window of documents, cleaned, of each of so many parts of a year with its seasons: topics and kinds of posts
    come and go, posts grow longer. Topics that are held out stay so."""
    seasons = World(seed=seed + OTHER_STORIES, brief=brief, drift=1)
    kept: list[Sample] = []
    for part in range(parts):
        start = part * YEAR_MINUTES // MINUTES_PER_DOCUMENT // parts
        samples = (seasons.post(index) for index in count(start))
        kept += islice((sample for sample in samples if sample.truth.topic not in held_out), window)
    return [sample.exemplar.document for sample in kept]
