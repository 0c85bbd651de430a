"""Completions to compare: drawn from one merged checkpoint, split by document, paired.

1. `split`                documents → train, validation, test, before anything is paired; near duplicates stay together;
2. `sweep` … `choose_temperature`   how hot can sampling be before people prefer the greedy completion?
3. `draw`                 per document one greedy completion and k - 1 at temperature T, in an order that is shuffled;
4. `pairs`, `leaks`       C(k, 2) pairs per document, identical ones dropped; does anything cross a split?

What `lm.models.generate` completes becomes a `Candidate`, the record in `samples.jsonl`. A `Pair` refers to two of them
by their places, and the token ids that were sampled are those that the reward model is trained on and scores.

Log-probabilities are of the policy itself, at temperature 1, whatever T a completion was drawn at, so that they compare
across temperatures, and with what PPO computes.
Only the end token ends a completion, for its score counts as that of every other token. Every record names the
fingerprint of its checkpoint, and readers refuse any other: judgements of one checkpoint's texts say nothing of
another's distribution.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from erlib.documents import corpus
from erlib.judgements.store import Choice, choice
from erlib.lm import models
from erlib.task import metrics
from erlib.task.forms import parse_compact, short_prompt
from erlib.task.jsonl import read_jsonl
from erlib.task.schema import Brief, Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRIAL = "trial"  # the split of documents that only the temperature is tuned on
Record = TypeVar("Record", "Sampled", "Pair")
_STRICT = ConfigDict(extra="forbid", frozen=True)


# -- records ------------------------------------------------------------------------------------------------------


class Candidate(BaseModel):
    """A completion that may be judged: text, token ids with the end token, log-probabilities in nats at temperature 1.

    `logprob` is the joint one, the sum of `token_logprobs`. `finished` is False when it ran out of tokens, and then
    the end token is not among the ids.
    """

    model_config = _STRICT
    text: str
    ids: tuple[int, ...]
    logprob: float
    token_logprobs: tuple[float, ...]
    greedy: bool
    finished: bool


class Sampled(BaseModel):
    """The completions of one document; their order was drawn at random and is the record of it."""

    model_config = _STRICT
    document: Document
    split: str
    checkpoint: str
    temperature: float
    completions: tuple[Candidate, ...]


class Pair(BaseModel):
    """Two completions of one document, by their places in `Sampled.completions`; which is A was drawn at random."""

    model_config = _STRICT
    id: str  # "<document id>#<i>-<j>" with i < j
    document_id: str
    split: str
    checkpoint: str
    a: int
    b: int


class Trial(BaseModel):
    """A greedy and a sampled completion as the trial annotator sees them; `preference` is None until judged."""

    model_config = _STRICT
    id: str  # "<document id>@<temperature>"
    checkpoint: str
    document: str
    a: str
    b: str
    preference: Choice | None = None


# -- documents ----------------------------------------------------------------------------------------------------


def near_duplicates(texts: Sequence[str], *, similarity: float) -> list[tuple[int, int, float]]:
    """Every two texts, i < j, whose indel similarity without case and punctuation is at least `similarity` (0 to 1).

    Brute force: time and memory grow with the square of the number of texts (0.4 s for 400 posts).
    """
    from rapidfuzz import fuzz, process, utils

    plain = [utils.default_process(text) for text in texts]
    scores = process.cdist(plain, plain, scorer=fuzz.ratio, score_cutoff=100 * similarity, dtype=np.float32)
    rows, columns = np.nonzero(np.triu(scores, k=1))
    return [(int(i), int(j), float(scores[i, j]) / 100) for i, j in zip(rows, columns, strict=True)]


def closest(documents: Sequence[Document], *, similarity: float) -> pd.DataFrame:
    """The `near_duplicates` among documents in full text, the closest first: columns similarity, one, other."""
    texts = [document.text for document in documents]
    found = near_duplicates(texts, similarity=similarity)
    rows = [(value, texts[i], texts[j]) for i, j, value in sorted(found, key=lambda one: -one[2])]
    return pd.DataFrame(rows, columns=["similarity", "one", "other"])


def split(
    documents: Sequence[Document], fractions: Mapping[str, float], *, similarity: float, seed: int
) -> dict[str, list[Document]]:
    """Split documents so that no group and no near duplicates, nor chains of them, are in two parts.

    Raises ValueError as `corpus.split_by_group` does, and for an id that occurs twice.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    by_id = {document.id: document for document in documents}
    if len(by_id) < len(documents):
        raise ValueError("an id occurs twice: documents are split by id, so each needs its own")
    first: dict[str, int] = {}  # the first document of each group
    edges = [(i, j) for i, j, _ in near_duplicates([d.text for d in documents], similarity=similarity)]
    edges += [
        (first.setdefault(document.group, index), index)
        for index, document in enumerate(documents)
        if document.group is not None
    ]
    ends = np.array(edges, dtype=int).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(edges)), (ends[0], ends[1])), shape=(len(documents), len(documents)))
    _, labels = connected_components(graph, directed=False)
    names: dict[int, str] = {}  # a component is named by its smallest id, whatever the order of the documents
    for document, label in zip(documents, labels, strict=True):
        names[label] = min(names.get(label, document.id), document.id)
    grouped = [d.model_copy(update={"group": names[label]}) for d, label in zip(documents, labels, strict=True)]
    parts = corpus.split_by_group(grouped, fractions, seed=seed)
    return {name: [by_id[document.id] for document in part] for name, part in parts.items()}


# -- drawing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn, whatever their temperature."""

    checkpoint: str  # fingerprint of the checkpoint that writes them: every record names it
    max_new_tokens: int = 192  # longest report; what is cut off counts as unfinished
    batch_size: int = 64  # completions at once: more need more memory, and change nothing but rounding
    seed: int = 0  # of the tokens drawn and of the order within a document


def draw(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents_by_split: Mapping[str, Sequence[Document]],
    settings: Sampling,
    *,
    k: int,
    temperature: float,
) -> list[Sampled]:
    """Complete every document once greedily and k - 1 times at `temperature`, shuffled within the document."""
    if k < 2 or temperature <= 0:
        raise ValueError(f"k={k} and temperature={temperature}: pairs need k >= 2 and a temperature above 0")
    splits = [(name, document) for name, part in documents_by_split.items() for document in part]
    documents = [document for _, document in splits]
    greedy = _candidates(model, tokenizer, documents, settings, temperature=0.0)
    repeated = [document for document in documents for _ in range(k - 1)]
    hot = _candidates(model, tokenizer, repeated, settings, temperature=temperature)
    samples = []
    for i, (name, document) in enumerate(splits):
        candidates = [greedy[i], *hot[i * (k - 1) : (i + 1) * (k - 1)]]
        samples.append(_sampled(document, candidates, name, temperature, settings))
    return samples


def sweep(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    settings: Sampling,
    *,
    temperatures: Sequence[float],
) -> list[Sampled]:
    """Draw one completion of every trial document at each temperature, beside the greedy one.

    All temperatures use the same random numbers, so that a difference between them is less a matter of luck.
    """
    greedy = _candidates(model, tokenizer, documents, settings, temperature=0.0) if temperatures else []
    drawn = []
    for temperature in sorted(temperatures):
        hot = _candidates(model, tokenizer, documents, settings, temperature=temperature)
        for document, *two in zip(documents, greedy, hot, strict=True):
            drawn.append(_sampled(document, two, TRIAL, temperature, settings))
    return drawn


def _candidates(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    settings: Sampling,
    *,
    temperature: float,
) -> list[Candidate]:
    """One completion of each document; log-probabilities are rounded to what a file keeps of them."""
    written = models.generate(
        model,
        tokenizer,
        [short_prompt(document.text) for document in documents],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        temperature=temperature,
        seed=settings.seed,
    )
    candidates = []
    for one in written:
        tokens = tuple(round(value, 6) for value in one.logprobs)
        candidates.append(
            Candidate(
                text=one.text,
                ids=one.ids,
                logprob=round(math.fsum(tokens), 6),
                token_logprobs=tokens,
                greedy=temperature == 0,
                finished=one.finished,
            )
        )
    return candidates


def _sampled(
    document: Document, candidates: list[Candidate], split: str, temperature: float, settings: Sampling
) -> Sampled:
    random.Random(f"{settings.seed}/order/{document.id}/{temperature}").shuffle(candidates)
    return Sampled(
        document=document,
        split=split,
        checkpoint=settings.checkpoint,
        temperature=temperature,
        completions=tuple(candidates),
    )


def table(samples: Sequence[Sampled], *, brief: Brief | None = None) -> pd.DataFrame:
    """One row per completion, in the order of the samples.

    Columns document_id, document (its text), split, temperature (0 for greedy), text, ids, logprob, finished; with a
    `brief` also valid, whether the text parses under it.
    """
    rows = []
    for sample in samples:
        for candidate in sample.completions:
            row = {
                "document_id": sample.document.id,
                "document": sample.document.text,
                "split": sample.split,
                "temperature": 0.0 if candidate.greedy else sample.temperature,
                "text": candidate.text,
                "ids": candidate.ids,
                "logprob": candidate.logprob,
                "finished": candidate.finished,
            }
            if brief:
                row["valid"] = parse_compact(candidate.text, brief=brief, document=sample.document.text).valid
            rows.append(row)
    return pd.DataFrame(rows)


def describe(samples: Sequence[Sampled], *, brief: Brief) -> pd.DataFrame:
    """By temperature (0: greedy): completions, different texts per document, tokens, shares, mean log-probabilities.

    `distinct` counts the greedy completion in. A greedy completion that stands in several samples counts once.
    """
    rows = {}
    for sample in samples:
        texts = len({completion.text for completion in sample.completions})
        for number, completion in enumerate(sample.completions):
            temperature = 0.0 if completion.greedy else sample.temperature
            parsed = parse_compact(completion.text, brief=brief, document=sample.document.text)
            key = (sample.document.id, temperature, 0 if completion.greedy else number)
            rows[key] = {
                "temperature": temperature,
                "distinct": 1 if completion.greedy else texts,
                "tokens": len(completion.ids),
                "finished": completion.finished,
                "parse_valid": parsed.valid,
                "logprob": completion.logprob,
                "logprob_per_token": completion.logprob / len(completion.ids),
            }
    table = pd.DataFrame(rows.values()).groupby("temperature")
    return table.size().to_frame("completions").join(table.mean())


# -- temperature --------------------------------------------------------------------------------------------------


def _greedy_and_other(sample: Sampled) -> tuple[int, int]:
    """Indices of the greedy completion and of the first other one, in the shuffled order."""
    greedy = next(index for index, completion in enumerate(sample.completions) if completion.greedy)
    return greedy, 1 if greedy == 0 else 0


def _trial_id(sample: Sampled) -> str:
    return f"{sample.document.id}@{sample.temperature:g}"


def trials(samples: Sequence[Sampled], *, seed: int) -> list[Trial]:
    """Greedy against the first sampled completion of each document, in random order; the first in the record is A.

    Identical ones are not asked about: `comparisons` counts them as ties of their own kind.
    """
    asked = []
    for sample in samples:
        a, b = sorted(_greedy_and_other(sample))
        first, second = sample.completions[a].text, sample.completions[b].text
        if first != second:
            fields = {"checkpoint": sample.checkpoint, "document": sample.document.text, "a": first, "b": second}
            asked.append(Trial(id=_trial_id(sample), **fields))
    random.Random(f"{seed}/{TRIAL}").shuffle(asked)
    return asked


def judged(asked: Sequence[Trial], judge: Callable[..., Mapping[str, int]]) -> list[Trial]:
    """The trials with what `judge(document, a, b, position=...)` prefers: the sign of its scores' sum.

    `position` counts what it has judged before, for whoever tires.
    """
    found = []
    for position, trial in enumerate(asked):
        scores = judge(trial.document, trial.a, trial.b, position=position)
        found.append(trial.model_copy(update={"preference": choice(sum(scores.values()))}))
    return found


def read_trials(path: str | Path, *, asked: Sequence[Trial]) -> tuple[list[Trial], int]:
    """Read people's judgements of trial pairs: the lines of `trial_pairs.jsonl` with `preference` filled in.

    Gives the asked ones, in their order, with `preference` None where it is still missing, and the number of lines
    about other texts. A judgement belongs to the texts, whatever run, checkpoint, temperature or order they were shown
    in. Raises ValueError naming file and line of what is no trial pair, or judges the same texts in another way.
    """
    found: dict[tuple[str, frozenset[str]], tuple[int, str | None]] = {}  # line, and the text that is preferred
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            trial = Trial.model_validate(row)
        except ValidationError as error:
            raise ValueError(f"{path}:{number}: {_fault(error)}; keep the lines of trial_pairs.jsonl") from None
        if trial.preference is None:
            continue
        preferred = {"A": trial.a, "B": trial.b, "tie": None}[trial.preference]
        line, before = found.setdefault(_texts(trial), (number, preferred))
        if before != preferred:
            raise ValueError(f"{path}:{number}: {trial.id} is judged otherwise than the same texts in line {line}")
    judged = []
    for trial in asked:
        if (known := found.get(_texts(trial))) is not None:
            choice = "tie" if known[1] is None else "A" if known[1] == trial.a else "B"
            trial = trial.model_copy(update={"preference": choice})
        judged.append(trial)
    return judged, len(found.keys() - set(map(_texts, asked)))


def _texts(trial: Trial) -> tuple[str, frozenset[str]]:
    return trial.document, frozenset((trial.a, trial.b))


def comparisons(samples: Sequence[Sampled], judged: Sequence[Trial]) -> pd.DataFrame:
    """One row a sample: document_id, temperature, outcome (greedy, tie, identical, sample), logprob_difference.

    The outcome names what was preferred; the difference is greedy minus sampled, of joint log-probabilities in nats.
    Raises ValueError when a judgement is missing.
    """
    chosen = {trial.id: trial.preference for trial in judged}
    rows = []
    for sample in samples:
        greedy, other = _greedy_and_other(sample)
        one, two = sample.completions[greedy], sample.completions[other]
        name = _trial_id(sample)
        if one.text != two.text and chosen.get(name) is None:
            raise ValueError(f"{name} has no judgement")
        outcome = "identical" if one.text == two.text else chosen[name]
        if outcome in ("A", "B"):
            outcome = "greedy" if (outcome == "A") == (greedy < other) else "sample"
        rows.append((sample.document.id, sample.temperature, outcome, one.logprob - two.logprob))
    return pd.DataFrame(rows, columns=["document_id", "temperature", "outcome", "logprob_difference"])


OUTCOMES = ("greedy", "tie", "identical", "sample")


def by_temperature(compared: pd.DataFrame) -> pd.DataFrame:
    """By temperature: counts of each outcome, n, and `share` preferring greedy among all n, with its Wilson interval.

    Ties and identical completions count in n but not as a preference; `decided_share` leaves them out.
    """
    rows = []
    for temperature, group in compared.groupby("temperature"):
        counts = {outcome: int((group["outcome"] == outcome).sum()) for outcome in OUTCOMES}
        share = metrics.wilson(counts["greedy"], len(group))
        decided = metrics.wilson(counts["greedy"], counts["greedy"] + counts["sample"]).value
        interval = {"share": share.value, "low": share.low, "high": share.high, "decided_share": decided}
        rows.append({"temperature": temperature, "n": len(group)} | counts | interval)
    return pd.DataFrame(rows).set_index("temperature")


def choose_temperature(table: pd.DataFrame, *, limit: float = 0.5) -> float:
    """The highest temperature of the unbroken stretch, from the lowest up, with a share of at most `limit`.

    Unbroken, because one lucky count above temperatures that fail is no reason to sample that hot. Where the lowest one
    fails already it is taken all the same, and a check of its share fails. `table` is of `by_temperature`.
    """
    shares = table["share"].sort_index()
    stretch = list(itertools.takewhile(lambda row: row[1] <= limit, shares.items()))
    return float(stretch[-1][0] if stretch else shares.index[0])


def by_logprob(compared: pd.DataFrame, *, bins: int) -> pd.DataFrame:
    """Share of judged pairs with greedy, and with the sample, preferred, in `bins` quantiles of logprob_difference.

    Columns difference (mean of the bin, nats), preferred, n, value, low, high (Wilson). A document may stand in a bin
    at several temperatures, which makes the intervals a little too narrow. Identical completions are left out.
    """
    judged = compared[compared["outcome"] != "identical"]
    cut = pd.qcut(judged["logprob_difference"], bins, duplicates="drop")
    rows = []
    for _, group in judged.groupby(cut, observed=True):
        for outcome in ("greedy", "sample"):
            share = metrics.wilson(int((group["outcome"] == outcome).sum()), len(group))
            rows.append((group["logprob_difference"].mean(), outcome, len(group), *share))
    return pd.DataFrame(rows, columns=["difference", "preferred", "n", "value", "low", "high"])


# -- pairs --------------------------------------------------------------------------------------------------------


def pairs(samples: Sequence[Sampled], *, seed: int) -> tuple[list[Pair], pd.DataFrame]:
    """All C(k, 2) pairs of each document with different texts, and by split what there was and what was dropped.

    The table's columns: documents, without_pair (all completions alike), pairs (kept), identical (dropped).
    """
    kept, counts = [], []
    for sample in samples:
        texts = [completion.text for completion in sample.completions]
        different = [(i, j) for i, j in itertools.combinations(range(len(texts)), 2) if texts[i] != texts[j]]
        identical = math.comb(len(texts), 2) - len(different)
        counts.append((sample.split, 1, not different, len(different), identical))
        for i, j in different:
            name = f"{sample.document.id}#{i}-{j}"
            a, b = (i, j) if random.Random(f"{seed}/side/{name}").random() < 0.5 else (j, i)
            origin = {"document_id": sample.document.id, "split": sample.split, "checkpoint": sample.checkpoint}
            kept.append(Pair(id=name, a=a, b=b, **origin))
    columns = ["split", "documents", "without_pair", "pairs", "identical"]
    return kept, pd.DataFrame(counts, columns=columns).groupby("split", sort=False).sum().astype(int)


def greedy_sides(samples: Sequence[Sampled], pairs: Sequence[Pair]) -> dict[str, int]:
    """In how many pairs the greedy completion is A, and in how many B: about as many, as lots decide."""
    by_document = {sample.document.id: sample.completions for sample in samples}
    sides = {"A": 0, "B": 0}
    for pair in pairs:
        completions = by_document[pair.document_id]
        sides["A"] += completions[pair.a].greedy
        sides["B"] += completions[pair.b].greedy
    return sides


def leaks(samples: Sequence[Sampled], pairs: Sequence[Pair], *, similarity: float) -> pd.DataFrame:
    """Whatever crosses a split, one row each: kind, first, second, similarity; no rows is what there should be.

    Kinds: `id`, `group` (the near-duplicate component that a document came with) and `text` (near duplicates found by
    brute force) of two documents in different splits; `pair` where a pair is not in the split of its document.
    """
    rows = []
    by_key: dict[tuple[str, str], Sampled] = {}  # the first of each id and group
    for sample in samples:
        for kind, key in (("id", sample.document.id), ("group", sample.document.group)):
            if key is not None and (first := by_key.setdefault((kind, key), sample)).split != sample.split:
                rows.append((kind, _place(first), _place(sample), 1.0))
    for i, j, found in near_duplicates([sample.document.text for sample in samples], similarity=similarity):
        if samples[i].split != samples[j].split:
            rows.append(("text", _place(samples[i]), _place(samples[j]), found))
    splits = {(sample.document.id, sample.split) for sample in samples}
    rows += [("pair", pair.id, pair.split, 1.0) for pair in pairs if (pair.document_id, pair.split) not in splits]
    return pd.DataFrame(rows, columns=["kind", "first", "second", "similarity"])


def _place(sample: Sampled) -> str:
    return f"{sample.document.id} ({sample.split})"


# -- reading ------------------------------------------------------------------------------------------------------


def read_samples(path: str | Path, *, checkpoint: str) -> list[Sampled]:
    """Read what `draw` drew; raises ValueError naming file and line of a bad record or one of another checkpoint."""
    return _read(path, Sampled, checkpoint)


def read_pairs(path: str | Path, *, checkpoint: str) -> list[Pair]:
    """Read what `pairs` made; raises ValueError naming file and line of a bad record or one of another checkpoint."""
    return _read(path, Pair, checkpoint)


def _read(path: str | Path, record: type[Record], checkpoint: str) -> list[Record]:
    records = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            records.append(record.model_validate(row))
        except ValidationError as error:
            raise ValueError(f"{path}:{number}: {_fault(error)}; write the file again with 04_sampling") from None
        if records[-1].checkpoint != checkpoint:
            raise ValueError(
                f"{path}:{number}: drawn from checkpoint {records[-1].checkpoint[:12]}, but this round starts from "
                f"{checkpoint[:12]}: run 04_sampling again from the present checkpoint (and judge its pairs), or point "
                "`sft_dir` and `previous_dir` at the phases that the records come from"
            )
    return records


def _fault(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'record'}: {first['msg']}"
