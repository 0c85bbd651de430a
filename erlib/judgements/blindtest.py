"""The blind test: whose reports do people prefer, and how sure can one be of it?

The rules stand before anybody judges:

1. Both reports are shown in one form, without a name, and each system's report as often first as second.
2. A judgement prefers the system that the sum of its aspects favours. A document is won by the system that more than
   half of its judgements prefer, whoever gave them and in whichever order; any other document is a tie.
3. Documents on which both reports are the same are ties without being asked.
4. The sign test is exact, two-sided and over documents. Ties are left out; a second line gives half of them to each.
5. Shares of documents have Wilson intervals. Where judgements are counted, documents are resampled, not judgements.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from erlib.judgements.store import Judgement
from erlib.task import jsonl, metrics
from erlib.task.forms import to_compact
from erlib.task.schema import ASPECTS, Document, Report

if TYPE_CHECKING:
    import pandas as pd

SOURCE = {"win": 0.49, "tie": 0.24, "loss": 0.27}  # the published blind test of a tuned LM against its teacher
_STRICT = ConfigDict(extra="forbid", frozen=True)


# -- how many documents -------------------------------------------------------------------------------------------


def power(n: int, *, win: float, loss: float, alpha: float) -> float:
    """Chance that the two-sided exact sign test of `n` documents gives p <= `alpha`, if these are the true shares.

    Exact: the number of documents without a tie is binomial in win + loss, the wins among them in win / (win + loss).
    """
    from scipy.stats import binom

    decided = np.arange(n + 1)
    lost = binom.ppf(alpha / 2, decided, 0.5)  # the most losses (or wins) with which the test still rejects
    lost = np.where(2 * binom.cdf(lost, decided, 0.5) <= alpha, lost, lost - 1)
    share = win / (win + loss)
    rejected = binom.cdf(lost, decided, share) + binom.sf(decided - lost - 1, decided, share)
    return float(binom.pmf(decided, n, win + loss) @ np.where(lost >= 0, rejected, 0.0))


def needed(*, win: float, loss: float, alpha: float, target: float = 0.9, limit: int = 20_000) -> int:
    """Fewest documents (in steps of 10) with which the power reaches `target`; raises ValueError above `limit`."""
    for n in range(10, limit + 1, 10):
        if power(n, win=win, loss=loss, alpha=alpha) >= target:
            return n
    raise ValueError(f"shares of {win} and {loss} need more than {limit} documents for a power of {target}")


# -- what is asked ------------------------------------------------------------------------------------------------


class Comparison(BaseModel):
    """One question: a document and two reports as they are shown, A and B; who wrote which is for the record only."""

    model_config = _STRICT
    id: str  # document, order and a hash of texts and systems: a judgement of other texts does not fit it
    document_id: str
    order: Literal[1, 2]  # 2: the same reports the other way round, for a second time
    document: str
    a: str
    b: str
    a_system: str
    b_system: str


class Questions(NamedTuple):
    """What to ask, and the ids of documents on which both systems wrote the same."""

    comparisons: list[Comparison]
    identical: list[str]


class Vote(BaseModel):
    """One judgement: a score of -2 to 2 an aspect, above 0 where A is better; `position` counts those before it."""

    model_config = _STRICT
    comparison_id: str
    document_id: str
    annotator: str
    position: int
    a_system: str
    b_system: str
    scores: dict[Literal[ASPECTS], int]

    def preferred(self, aspect: str | None = None) -> str | None:
        """The system that the sum of the aspects, or one aspect, favours; None for a tie."""
        score = sum(self.scores.values()) if aspect is None else self.scores[aspect]
        return self.a_system if score > 0 else self.b_system if score < 0 else None


class Judge(Protocol):
    """Whoever compares two reports of a document, such as `panel.Panel.judge`."""

    def __call__(self, annotator: str, document: str, a: str, b: str, *, position: int) -> Mapping[str, int]: ...


def shown(report: Report, document: str) -> str:
    """Write a report so that its form tells nothing of its writer: entities in the order of the text, compact form."""

    def place(name: str) -> tuple[int, str]:
        found = document.find(name)
        return (found if found >= 0 else len(document), name)

    entities = tuple(sorted(report.entities, key=lambda entity: place(entity.name)))
    links = tuple(sorted(report.relationships, key=lambda link: (place(link.target), link.type)))
    return to_compact(Report(entities=entities, relationships=links))


def questions(
    documents: Sequence[Document], reports: Mapping[str, Sequence[Report]], *, both_orders: float, seed: int
) -> Questions:
    """Set two systems' reports of each document against each other, which of them is A drawn at random, half and half.

    A share `both_orders` of the documents, drawn at random, is asked in the other order as well.
    """
    (one, other), (texts, others) = zip(*reports.items(), strict=True)
    rows = []
    for document, report, rival in zip(documents, texts, others, strict=True):
        rows.append((document, {one: shown(report, document.text), other: shown(rival, document.text)}))
    identical = [document.id for document, by_system in rows if by_system[one] == by_system[other]]
    rows = [(document, by_system) for document, by_system in rows if by_system[one] != by_system[other]]
    rng = np.random.default_rng(seed)
    swapped = rng.permutation(np.arange(len(rows)) % 2)
    twice = set(rng.permutation(len(rows))[: round(both_orders * len(rows))].tolist())
    found = []
    for row, (document, by_system) in enumerate(rows):
        order = (other, one) if swapped[row] else (one, other)
        found.append(_comparison(document, by_system, order, 1))
        if row in twice:
            found.append(_comparison(document, by_system, order[::-1], 2))
    return Questions(found, identical)


def _comparison(document: Document, by_system: Mapping[str, str], order: tuple[str, str], number: int) -> Comparison:
    a, b = order
    # With the systems: where two of them write the same, their contests against a third ask different questions.
    content = "\x1f".join((document.text, by_system[a], by_system[b], a, b))
    return Comparison(
        id=f"{document.id}#{number}-{hashlib.sha256(content.encode()).hexdigest()[:8]}",
        document_id=document.id,
        order=number,
        document=document.text,
        a=by_system[a],
        b=by_system[b],
        a_system=a,
        b_system=b,
    )


def queues(
    comparisons: Sequence[Comparison], annotators: Sequence[str], *, each: int, seed: int
) -> dict[str, list[Comparison]]:
    """Give every document to `each` of the annotators, in turn: the questions of each annotator in order.

    A question that comes back in the other order comes in the second half, when its first time is long past.
    """
    if not 1 <= each <= len(annotators):
        raise ValueError(f"each document can go to 1 to {len(annotators)} annotators, not {each}")
    rng = np.random.default_rng(seed)
    ids = list(dict.fromkeys(comparison.document_id for comparison in comparisons))
    turn = {ids[row]: place for place, row in enumerate(rng.permutation(len(ids)).tolist())}
    ordered = sorted(comparisons, key=lambda comparison: (comparison.order, turn[comparison.document_id]))
    found: dict[str, list[Comparison]] = {annotator: [] for annotator in annotators}
    for comparison in ordered:
        for step in range(each):
            found[annotators[(turn[comparison.document_id] + step) % len(annotators)]].append(comparison)
    return found


def ask(queued: Mapping[str, Sequence[Comparison]], judge: Judge) -> list[Vote]:
    """Have every annotator judge its queue in order."""
    return [
        vote(comparison, annotator, position, judge(annotator, *_texts(comparison), position=position))
        for annotator, comparisons in queued.items()
        for position, comparison in enumerate(comparisons)
    ]


def _texts(comparison: Comparison) -> tuple[str, str, str]:
    return comparison.document, comparison.a, comparison.b


def vote(comparison: Comparison, annotator: str, position: int, scores: Mapping[str, int]) -> Vote:
    """Record a judgement of a comparison."""
    return Vote(
        comparison_id=comparison.id,
        document_id=comparison.document_id,
        annotator=annotator,
        position=position,
        a_system=comparison.a_system,
        b_system=comparison.b_system,
        scores={aspect: scores[aspect] for aspect in ASPECTS},
    )


def tasks(queued: Mapping[str, Sequence[Comparison]]) -> Iterator[dict[str, str]]:
    """Give what people are sent, one row per judgement: pair, annotator, document and both texts, no system."""
    for annotator, comparisons in queued.items():
        for comparison in comparisons:
            document, a, b = _texts(comparison)
            key = {"annotator": annotator, "pair_id": comparison.id, "document_id": comparison.document_id}
            yield key | {"document": document, "a": a, "b": b}


class Answers(NamedTuple):
    """What a file of people's answers holds for these comparisons, and how many rows answer other questions."""

    judgements: list[Judgement]
    votes: list[Vote]  # one of each judgement
    elsewhere: int


def read_answers(path: Path, queued: Mapping[str, Sequence[Comparison]]) -> Answers:
    """Read people's answers to `tasks`: JSONL of `store.Judgement`, as many of them as there are.

    Rows about comparisons that are not asked here are counted: one file may serve several phases. Raises ValueError
    that names file, line and what to do for a row that is no judgement, that answers a comparison of another annotator,
    or that answers one again.
    """
    places = {
        (annotator, comparison.id): (place, comparison)
        for annotator, comparisons in queued.items()
        for place, comparison in enumerate(comparisons)
    }
    here = {name for _, name in places}
    found: dict[tuple[str, str], tuple[Judgement, Vote]] = {}
    elsewhere = 0
    for number, row, unreadable, _ in jsonl.rows(path):
        try:
            judgement = Judgement.model_validate(row)
        except ValidationError as error:
            fault = error.errors()[0]
            reason = unreadable or f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            raise ValueError(f"{path}:{number}: {reason}") from None
        if judgement.pair_id not in here:
            elsewhere += 1
            continue
        key = (judgement.annotator, judgement.pair_id)
        if key not in places:
            raise ValueError(f"{path}:{number}: {' / '.join(key)} is no task: answer those of the present tasks.jsonl")
        if key in found:
            raise ValueError(f"{path}:{number}: {' / '.join(key)} is answered a second time: keep one of the lines")
        place, comparison = places[key]
        found[key] = judgement, vote(comparison, judgement.annotator, place, judgement.model_dump())
    return Answers([one for one, _ in found.values()], [one for _, one in found.values()], elsewhere)


# -- what came out ------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Documents won, tied and lost by `system`, shares with Wilson intervals, and the sign test of wins and losses."""

    system: str
    wins: int
    ties: int
    losses: int
    win: metrics.Interval
    tie: metrics.Interval
    loss: metrics.Interval
    ratio: metrics.Interval  # wins to losses; one loss is assumed where there is none
    p: float  # ties left out
    p_ties_split: float  # half of the ties to each side, an odd one to the side that is behind

    @property
    def n(self) -> int:
        """Documents, ties included."""
        return self.wins + self.ties + self.losses


def outcomes(
    votes: Iterable[Vote], system: str, *, identical: Sequence[str] = (), aspect: str | None = None
) -> dict[str, int]:
    """What came of each document, by all aspects or one: 1 won by `system`, 0 a tie, -1 lost (rules 2 and 3)."""
    given: dict[str, list[int]] = defaultdict(list)
    for each in votes:
        preferred = each.preferred(aspect)
        given[each.document_id].append(0 if preferred is None else 1 if preferred == system else -1)
    decided = {
        name: (2 * values.count(1) > len(values)) - (2 * values.count(-1) > len(values))
        for name, values in given.items()
    }
    return decided | dict.fromkeys(identical, 0)


def result(votes: Iterable[Vote], system: str, *, identical: Sequence[str] = (), aspect: str | None = None) -> Result:
    """Count the documents that `system` won, tied and lost; see `outcomes`."""
    values = list(outcomes(votes, system, identical=identical, aspect=aspect).values())
    wins, ties, losses = (values.count(value) for value in (1, 0, -1))
    n = len(values)
    return Result(
        system,
        *(wins, ties, losses),
        *(metrics.wilson(count, n) for count in (wins, ties, losses)),
        _ratio(wins, losses),
        metrics.sign_test(wins, losses),
        metrics.sign_test(max(wins, losses) + ties // 2, min(wins, losses) + ties - ties // 2),
    )


def _ratio(wins: int, losses: int) -> metrics.Interval:
    """Wins to losses, with the ends of the Wilson interval of the share of wins turned into odds."""
    share = metrics.wilson(wins, wins + max(1, losses))
    low, high = (end / (1 - end) if end < 1 else float("inf") for end in (share.low, share.high))
    return metrics.Interval(wins / max(1, losses), low, high)


def table(results: Mapping[str, Result]) -> "pd.DataFrame":
    """Lay results out: one row each with counts, shares with interval ends, ratio and both p-values."""
    import pandas as pd

    rows = {}
    for name, found in results.items():
        row: dict[str, float] = {"n": found.n, "wins": found.wins, "ties": found.ties, "losses": found.losses}
        for share in ("win", "tie", "loss", "ratio"):
            row |= dict(zip((share, f"{share}_low", f"{share}_high"), getattr(found, share), strict=True))
        rows[name] = row | {"p": found.p, "p_ties_split": found.p_ties_split}
    return pd.DataFrame.from_dict(rows, orient="index")


def readable(results: Mapping[str, Result]) -> "pd.DataFrame":
    """Lay results out for reading: counts of documents, shares and ratio with their intervals, both p-values."""
    import pandas as pd

    def said(found: metrics.Interval) -> str:
        return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"

    rows = {}
    for name, found in results.items():
        rows[name] = {
            **{"documents": found.n, "won": found.wins, "tied": found.ties, "lost": found.losses},
            **{"share won": said(found.win), "share lost": said(found.loss), "won to lost": said(found.ratio)},
            **{"p": f"{found.p:.2g}", "p, ties split": f"{found.p_ties_split:.2g}"},
        }
    return pd.DataFrame.from_dict(rows, orient="index")


class PositionBias(NamedTuple):
    """Whether reports are preferred for their place."""

    first: metrics.Interval  # share of A among judgements that are no tie; documents resampled
    p: float  # sign test over documents: more judgements for A than for B, against fewer
    twice: int  # questions that one annotator answered in both orders
    same: metrics.Interval  # share of those answered alike, ties included; documents resampled


def position_bias(votes: Sequence[Vote], *, seed: int) -> PositionBias:
    """Test whether A is preferred for being first; which system is A is balanced, so quality cannot explain it."""
    first: dict[str, list[bool]] = defaultdict(list)
    answers: dict[tuple[str, str], list[str | None]] = defaultdict(list)
    for each in votes:
        answers[each.document_id, each.annotator].append(each.preferred())
        if each.preferred() is not None:
            first[each.document_id].append(each.preferred() == each.a_system)
    leads = [2 * sum(flags) - len(flags) for flags in first.values()]
    alike: dict[str, list[bool]] = defaultdict(list)
    for (document_id, _), given in answers.items():
        if len(given) == 2:
            alike[document_id].append(given[0] == given[1])
    return PositionBias(
        _share(first, seed=seed),
        metrics.sign_test(sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)),
        sum(map(len, alike.values())),
        _share(alike, seed=seed),
    )


def by_judgement(named: Sequence[tuple[str, Vote]], system: str, *, seed: int) -> "pd.DataFrame":
    """Shares of judgements that prefer `system`, tie, or prefer the other, in groups by the name beside each vote.

    One row a name and share: name, measure ("win", "tie", "loss"), value, low, high, judgements.
    """
    import pandas as pd

    rows = []
    for name in dict.fromkeys(name for name, _ in named):
        votes = [vote for found, vote in named if found == name]
        for measure in ("win", "tie", "loss"):
            flags: dict[str, list[bool]] = defaultdict(list)
            for each in votes:
                preferred = each.preferred()
                came = "tie" if preferred is None else "win" if preferred == system else "loss"
                flags[each.document_id].append(came == measure)
            rows.append((name, measure, *_share(flags, seed=seed), len(votes)))
    return pd.DataFrame(rows, columns=["name", "measure", "value", "low", "high", "judgements"])


def frame(votes: Sequence[Vote]) -> "pd.DataFrame":
    """Lay judgements out for `agreement.table`: pair, document, annotator, the aspects, `total` and `preference`."""
    import pandas as pd

    keys = [{"pair_id": v.comparison_id, "document_id": v.document_id, "annotator": v.annotator} for v in votes]
    rows = [key | dict(each.scores) for key, each in zip(keys, votes, strict=True)]
    laid = pd.DataFrame(rows, columns=["pair_id", "document_id", "annotator", *ASPECTS])
    total = laid[list(ASPECTS)].sum(axis=1)
    return laid.assign(total=total, preference=np.sign(total))


def clearest(
    comparisons: Iterable[Comparison], votes: Iterable[Vote], system: str, *, n: int
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """The `n` documents that `system` won by most, and the `n` that it lost by most: texts and mean summed score."""
    import pandas as pd

    scores: dict[str, list[int]] = defaultdict(list)
    for each in votes:
        scores[each.document_id].append(sum(each.scores.values()) * (1 if each.a_system == system else -1))
    rows = [
        {"document": c.document, c.a_system: c.a, c.b_system: c.b, "score": float(np.mean(scores[c.document_id]))}
        for c in comparisons
        if c.order == 1 and c.document_id in scores
    ]
    ranked = pd.DataFrame(rows).sort_values("score", ascending=False, kind="stable", ignore_index=True)
    return ranked[ranked["score"] > 0].head(n), ranked[ranked["score"] < 0][::-1].head(n)


def _share(flags: Mapping[str, Sequence[bool]], *, seed: int) -> metrics.Interval:
    """Share of true flags, kept by document, with its bootstrap interval over documents; nan without any."""
    if not flags:
        return metrics.Interval(float("nan"), float("nan"), float("nan"))
    return metrics.bootstrap_ratio(list(map(sum, flags.values())), list(map(len, flags.values())), seed=seed)
