"""The simulated panel: annotators of the embedded world who compare two reports of a document as people would.

Each has the client's truth in mind and sees it through noise of its own. A report's *utility* for an aspect falls with
its faults as the brief weighs them; an annotator compares two utilities with error, bias towards the first report,
fatigue, and a threshold below which it calls a tie. So agreement between annotators, and the ceiling that it sets for
a reward model, come from stated constants. Numbers that come from it are labelled as simulated wherever they show.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from erlib.documents import corpus
from erlib.judgements.store import choice
from erlib.task import metrics, utility
from erlib.task.forms import parse_compact
from erlib.task.schema import ASPECTS, Brief
from erlib.world.stream import Sample

if TYPE_CHECKING:
    from erlib.judgements.annotation import Preference

LABEL = "simulated panel"
OPENED = datetime(2026, 1, 1, 9, tzinfo=UTC)  # when the panel's own clock starts

STRONG = 0.8  # a difference in utility above this is "much better" (2), below it "better" (1)
_WORDS_A_SECOND = 4.0  # silent reading of short posts, 240 words a minute
_FATIGUE_SPAN = 1500  # judgements after which an annotator is as tired as it gets


class Profile(NamedTuple):
    """How one annotator judges; noise, tie threshold and bias are in units of utility."""

    noise: float  # standard deviation of the error in a compared difference
    tie: float  # differences below this are a tie: the strictness
    first: float  # added in favour of report A: the position bias
    fatigue: float  # share by which the noise has grown after `_FATIGUE_SPAN` judgements
    seconds: float  # that it thinks about a pair after reading it


# Chosen so that two of the first four, where neither calls a tie, prefer the same of two near-equal reports (of one
# frontier LM) in 75 to 80 pairs of 100, about as people do who compare model outputs (73 % in 2203.02155). The fifth is
# careless, and training should find it out.
PROFILES = (
    Profile(noise=0.62, tie=0.25, first=0.00, fatigue=0.05, seconds=14),  # careful
    Profile(noise=0.70, tie=0.25, first=0.03, fatigue=0.10, seconds=10),  # average
    Profile(noise=0.75, tie=0.15, first=-0.03, fatigue=0.10, seconds=8),  # decided
    Profile(noise=0.85, tie=0.35, first=0.06, fatigue=0.20, seconds=5),  # quick
    Profile(noise=3.00, tie=0.40, first=0.30, fatigue=0.30, seconds=2),  # careless
)


class _Reading(NamedTuple):
    """What a report is worth, and what it says, by aspect."""

    utility: dict[str, float]
    content: dict[str, object]


class Panel:
    """Simulated annotators who know the truth of the samples; everything follows from `seed` and what is compared."""

    def __init__(self, samples: Iterable[Sample], brief: Brief, *, annotators: int = 5, seed: int = 0):
        if annotators < 1:
            raise ValueError(f"a panel needs at least one annotator, not {annotators}")
        self.brief, self.seed = brief, seed
        self.profiles = {f"simulated-{i + 1}": PROFILES[i % len(PROFILES)] for i in range(annotators)}
        self._truths = {corpus.clean(sample.document.text): sample.truth for sample in samples}
        self._read = functools.lru_cache(maxsize=65_536)(self._reading)

    @property
    def names(self) -> tuple[str, ...]:
        """The annotators, `simulated-1` and so on."""
        return tuple(self.profiles)

    def utility(self, document: str, report: str) -> dict[str, float]:
        """What a compact report of a document is worth, by aspect and without noise: 0 without fault, else below.

        `report` is any text. Raises `LookupError` for a document whose truth is not known.
        """
        return dict(self._read(document, report).utility)

    def judge(self, annotator: str, document: str, a: str, b: str, *, position: int = 0) -> dict[str, int]:
        """Compare two reports by aspect: 2 or 1 where A is better, 0 for a tie, -1 or -2 where B is better.

        Where two reports say the same in an aspect, nobody sees a difference. `position` is the number of pairs that
        the annotator has judged before. The same question gets the same answer.
        """
        profile = self.profiles[annotator]
        noise = profile.noise * (1 + profile.fatigue * min(1.0, position / _FATIGUE_SPAN))
        one, other = self._read(document, a), self._read(document, b)
        scores = {}
        for aspect in ASPECTS:
            error = noise * _normal(self.seed, annotator, document, a, b, aspect) + profile.first
            same = one.content[aspect] == other.content[aspect]
            difference = 0.0 if same else one.utility[aspect] - other.utility[aspect] + error
            strength = 0 if abs(difference) < profile.tie else 1 if abs(difference) < STRONG else 2
            scores[aspect] = strength if difference > 0 else -strength
        return scores

    def seconds(self, annotator: str, document: str, a: str, b: str) -> float:
        """How long the annotator takes over a pair, on a clock as simulated as the rest: reading, then thinking."""
        words = sum(len(text.split()) for text in (document, a.replace("|", " "), b.replace("|", " ")))
        return round(words / _WORDS_A_SECOND + self.profiles[annotator].seconds, 1)

    def right(self, preferences: "Iterable[Preference]", *, texts: Mapping[str, str]) -> metrics.Interval:
        """Share of labels that name the report that is truly worth more, with its Wilson interval.

        `texts` are the documents' by id. Reports of equal worth have no better one and are left out; a label that
        calls the others a tie is wrong.
        """
        right = []
        for pair in preferences:
            document = texts[pair.document_id]
            a, b = (sum(self.utility(document, report).values()) for report in (pair.a, pair.b))
            if a != b:
                right.append(pair.preference == choice(a - b))
        return metrics.wilson(sum(right), len(right))

    def _reading(self, document: str, text: str) -> "_Reading":
        truth = self._truths.get(corpus.clean(document))
        if truth is None:
            raise LookupError(
                f"the simulated panel knows the embedded world and labelled documents, not {document[:60]!r}; "
                "for other documents set `annotators: people` in the params file"
            )
        wanted = replace(truth, brief=self.brief).report
        return _Reading(utility.by_aspect(document, wanted, text, brief=self.brief), _content(text))


def _normal(*parts: object) -> float:
    """A draw from the standard normal distribution that depends on the parts alone."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "replace"), digest_size=8).digest()
    return NormalDist().inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**64)


def _content(text: str) -> dict[str, object]:
    """What a compact report says in each aspect: equal where a reader sees no difference."""
    report, defects = parse_compact(text)
    return {
        "entities": ({(entity.name, entity.type) for entity in report.entities}, sorted(defects)),
        "relationships": ({relationship.key for relationship in report.relationships}, sorted(defects)),
        "summaries": {(entity.name, entity.summary) for entity in report.entities if entity.summary},
    }
