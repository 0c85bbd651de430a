"""Selection of the few exemplars that a prompt shows: the search, and the baseline that DSPy ships.

The selector departs from the optimisers that DSPy ships: those bootstrap their own demonstrations, or score a candidate
on the examples that it shows. Here the k best of the hand-corrected exemplars are searched, scored on other documents.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import dspy

from erlib.reports.extraction import ReportAdapter, example, predict, predictor
from erlib.reports.prompts import Form, Template
from erlib.task.evaluation import normal_text, objective, refuse_overlap, score
from erlib.task.schema import Brief, Exemplar, Parsed

if TYPE_CHECKING:
    import pandas as pd


def labeled_few_shot(pool: Sequence[Exemplar], *, k: int = 5) -> tuple[Exemplar, ...]:
    """Baseline: the set that `dspy.LabeledFewShot` takes; it samples with a fixed seed and never looks at scores."""
    trainset = [dspy.Example(id=exemplar.document.id) for exemplar in pool]
    by_id = {exemplar.document.id: exemplar for exemplar in pool}
    compiled = dspy.LabeledFewShot(k=k).compile(predictor(), trainset=trainset)
    return tuple(by_id[demo.id] for demo in compiled.demos)


class ExemplarSelector(dspy.teleprompt.Teleprompter):
    """DSPy optimiser that searches the best ordered set of `k` labelled demonstrations.

    1. Successive halving: `sets` random sets compete on a quarter of the valset, the better half of them on half of it,
       the better half of those on all of it.
    2. Swap search: `swaps` times one demonstration of the best set is exchanged for a random other one, and the
       exchange stays if it scores strictly better.

    Sets always compete on the same documents: those of the valset, and those of the trainset that none of the
    competitors shows. The score is the mean of entity and relationship F1. LM and adapter come from `dspy.context`.
    `history` (a list of dicts) has a row for each set in each competition: stage, documents, score, margin over the
    best of the others, won, exemplars. Scores of winners are optimistic: re-score on fresh documents.
    """

    def __init__(self, *, brief: Brief, k: int = 5, sets: int = 16, swaps: int = 30, seed: int = 0, threads: int = 8):
        super().__init__()
        self.brief, self.k, self.sets, self.swaps, self.seed, self.threads = brief, k, sets, swaps, seed, threads
        self.history: list[dict] = []

    def compile(
        self, student: dspy.Predict, *, trainset: list[dspy.Example], valset: list[dspy.Example], **_: object
    ) -> dspy.Predict:
        """A copy of the student that shows the best set found; trainset and valset must be disjoint."""
        if len(trainset) < self.k:
            raise ValueError(f"{self.k} exemplars cannot be chosen from a pool of {len(trainset)}")
        if {normal_text(e.document) for e in trainset} & {normal_text(e.document) for e in valset}:
            raise ValueError("trainset and valset share documents: a demonstration would be scored on itself")
        rng = random.Random(f"selector {self.seed}")
        self._student, self._trainset = student, trainset
        self._answers: dict[tuple[Demos, str], Parsed] = {}
        self.history = []
        order = rng.sample(valset, len(valset))
        sets = [tuple(rng.sample(trainset, self.k)) for _ in range(self.sets)]
        for documents in _rungs(len(valset)):
            scores = self._compete(sets, order[:documents], "successive halving")
            ranked = sorted(range(len(sets)), key=lambda index: -scores[index])
            sets = [sets[index] for index in ranked[: (len(sets) + 1) // 2]]
        best = sets[0]
        for _ in range(self.swaps if len(trainset) > self.k else 0):
            position = rng.randrange(self.k)
            other = rng.choice([e for e in trainset if e not in best])
            trial = (*best[:position], other, *best[position + 1 :])
            score_of_best, score_of_trial = self._compete([best, trial], order, "swap search")
            best = trial if score_of_trial > score_of_best else best
        compiled = student.reset_copy()
        compiled.demos = list(best)
        return compiled

    def _compete(self, sets: "list[Demos]", valset: list[dspy.Example], stage: str) -> list[float]:
        """Score sets on the same documents, none of which any of them shows."""
        shown = {demo.id for demos in sets for demo in demos}
        scored = [*valset, *(e for e in self._trainset if e.id not in shown)]
        scores = [self._score(demos, scored) for demos in sets]
        for index, demos in enumerate(sets):
            margin = scores[index] - max([*scores[:index], *scores[index + 1 :]], default=scores[index])
            names = ", ".join(demo.id for demo in demos)
            row = {"stage": stage, "documents": len(scored), "score": scores[index], "margin": margin}
            self.history.append({**row, "exemplars": names})
        return scores

    def _score(self, demos: "Demos", scored: list[dspy.Example]) -> float:
        missing = [e for e in scored if (demos, e.id) not in self._answers]  # earlier competitions asked for the others
        program = self._student.reset_copy()
        program.demos = list(demos)
        lm, adapter = dspy.settings.lm, dspy.settings.adapter
        answers = predict(program, lm, adapter, [e.document for e in missing], threads=self.threads)
        self._answers.update({(demos, e.id): parsed for e, parsed in zip(missing, answers, strict=True)})
        gold = [adapter.read(e.report).report for e in scored]
        return objective(score(gold, [self._answers[demos, e.id] for e in scored], self.brief))


Demos = tuple[dspy.Example, ...]


def _rungs(documents: int) -> list[int]:
    return sorted({max(1, documents // 4), max(1, documents // 2), documents})


class Selection(NamedTuple):
    """The chosen exemplars and one row for each set in each competition (`ExemplarSelector`)."""

    exemplars: tuple[Exemplar, ...]
    history: "pd.DataFrame"


def select(
    lm: dspy.LM,
    pool: Sequence[Exemplar],
    dev: Sequence[Exemplar],
    *,
    template: Template,
    brief: Brief,
    form: Form = "json",
    k: int = 5,
    sets: int = 16,
    swaps: int = 30,
    seed: int,
    threads: int = 8,
) -> Selection:
    """Choose the best `k` exemplars of the pool with `ExemplarSelector`."""
    import pandas as pd

    refuse_overlap(pool, dev)
    adapter = ReportAdapter(template, form)
    selector = ExemplarSelector(brief=brief, k=k, sets=sets, swaps=swaps, seed=seed, threads=threads)
    with dspy.context(lm=lm, adapter=adapter):
        chosen = selector.compile(
            predictor(),
            trainset=[example(exemplar, adapter) for exemplar in pool],
            valset=[example(exemplar, adapter) for exemplar in dev],
        )
    by_id = {exemplar.document.id: exemplar for exemplar in pool}
    return Selection(tuple(by_id[demo.id] for demo in chosen.demos), pd.DataFrame(selector.history))


def selection_calls(pool: int, dev: int, *, sets: int, swaps: int, k: int = 5) -> int:
    """The number of LM calls that a selection makes at most: for the estimate before spending."""
    calls, before, remaining = 0, 0, sets
    for documents in _rungs(dev):
        calls += remaining * (documents - before)
        before, remaining = documents, (remaining + 1) // 2
    return calls + swaps * dev + (sets + swaps) * (pool - k)
