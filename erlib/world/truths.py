"""Where the truth about documents comes from that simulated frontier and panel need: the embedded world, or labels.

With labels any corpus is a dress rehearsal: documents of a team's own, or of a public benchmark, go through every phase
with simulated frontier and panel, before anybody is paid. What labels do not say (which facts are salient, what is only
implied, which kind a post is) is left out or follows from the words around an item, so that faults crowd in some
phrasings here, too.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from erlib.chain import manifest
from erlib.task.jsonl import read_jsonl
from erlib.task.schema import Brief, Exemplar
from erlib.world.posts import Fact, Link, Mention, Truth
from erlib.world.stream import Sample, World

FILE = "labels.jsonl"  # in the folder of phase 02, where documents were labelled
FRONTIERS = ("simulated", "labels")  # frontiers that know the truth: one with faults, and the labels themselves
FAR = 60  # characters between two ends, from which a relationship counts as implied: it is harder to see


def known(corpus_params: Mapping[str, Any]) -> bool:
    """Whether the truth of the documents that phase 02 read, with these parameters, is known."""
    return corpus_params.get("frontier") in FRONTIERS


def find(corpus_dir: str | Path, ids: Iterable[str], *, brief: Brief) -> list[Sample]:
    """The documents of these ids with what is true of them, or none where phase 02 read documents without labels.

    They are the labelled ones of phase 02, or posts of the embedded world. Raises LookupError for an id of neither.
    """
    params = (manifest.read_manifest(corpus_dir) or {}).get("params", {})
    if not known(params):
        return []
    path = Path(corpus_dir) / FILE
    if not path.is_file():
        return World(seed=params["seed"], brief=brief).find(ids)
    by_id = {exemplar.document.id: exemplar for exemplar in map(Exemplar.model_validate, read_jsonl(path))}
    wanted = list(ids)
    if missing := [name for name in wanted if name not in by_id]:
        raise LookupError(f"{path} has no labels of {missing[0]!r} and {len(missing) - 1} more: run phase 02 again")
    return samples([by_id[name] for name in wanted], brief=brief)


def samples(labelled: Sequence[Exemplar], *, brief: Brief) -> list[Sample]:
    """Labelled documents as simulated frontier and panel take them."""
    return [Sample(exemplar.document, _truth(exemplar, brief)) for exemplar in labelled]


def _truth(exemplar: Exemplar, brief: Brief) -> Truth:
    text, report = exemplar.document.text, exemplar.report
    mentions = tuple(
        Mention(
            entity.name,
            entity.type,
            entity.type in brief.entity_types,
            tuple(Fact(fact, True, _cue(fact)) for fact in entity.facts),
            _cue(_before(text, entity.name)),
        )
        for entity in report.entities
    )
    links = tuple(
        Link(
            link.source,
            link.target,
            link.type,
            len(_between(text, link.source, link.target)) > FAR,
            link.type in brief.relationship_types,
            _cue(" ".join(_between(text, link.source, link.target).split()[:2])),
        )
        for link in report.relationships
    )
    return Truth("document", exemplar.document.source or "", mentions, links, brief)


def _cue(words: str) -> int:
    """The hash of a phrasing, whatever its case and its numbers."""
    return crc32(re.sub(r"\d", "0", words.casefold()).encode())


def _before(text: str, name: str) -> str:
    """The word before the first place of a name."""
    words = text[: text.find(name)].split()
    return words[-1] if words else ""


def _between(text: str, one: str, other: str) -> str:
    """What stands between the first places of two names."""
    (first, name), (second, _) = sorted(((text.find(one), one), (text.find(other), other)))
    return text[first + len(name) : second]
