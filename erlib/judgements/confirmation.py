"""What a finished run is confirmed with: its models, how its frontier was asked, and which texts it has read."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erlib.chain.manifest import RunError, read_manifest
from erlib.documents.files import read_gold
from erlib.judgements import blindtest, contests
from erlib.judgements.blindtest import Result, Vote
from erlib.task.evaluation import normal_text
from erlib.task.jsonl import read_jsonl
from erlib.task.schema import Document, Exemplar


class Finished(NamedTuple):
    """A finished run: its name, its last policy, and what phases 01 to 03 left and were told."""

    name: str
    policy: Path  # merged checkpoint
    sft: Path  # merged checkpoint
    base: str  # LM that SFT started from
    prompts: Path  # folder of phase 01
    corpus: Path  # folder of phase 02
    asked: dict[str, Any]  # parameters of phase 02, which say how the frontier is asked
    seed: int


def finished(ppo_dir: str | Path, *, used: Iterable[str] = ()) -> Finished:
    """Describe the run that a folder of phase 07 ended, under a name that is none of those `used`.

    Raises RunError where it, or one of phases 02 and 03 that it names, is not complete.
    """
    said = _params(ppo_dir)
    sft, corpus = _params(said["sft_dir"]), _params(said["corpus_dir"])
    folder = Path(ppo_dir).parent
    name = folder.parent.name if folder.name.startswith("round-") else folder.name
    taken, plain, number = set(used), name, 2
    while name in taken:
        name, number = f"{plain} {number}", number + 1
    return Finished(
        name=name,
        policy=Path(ppo_dir) / "merged",
        sft=Path(said["sft_dir"]) / "merged",
        base=sft["local_model"],
        prompts=Path(said["prompts_dir"]),
        corpus=Path(said["corpus_dir"]),
        asked=corpus,
        seed=corpus["seed"],
    )


def _params(folder: str | Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise RunError(f"{folder} holds no complete phase: finish that run first, or name another folder of phase 07")
    return manifest["params"]


def read_before(run: Finished, documents: Iterable[Document]) -> list[str]:
    """Ids of the documents whose text the run knows: from its corpus or its gold exemplars, whatever its case."""
    known = {normal_text(row["text"]) for row in read_jsonl(run.corpus / "documents.jsonl")}
    known |= {normal_text(exemplar.document.text) for exemplar in read_gold(run.prompts / "gold.jsonl")}
    return [document.id for document in documents if normal_text(document.text) in known]


def labelled(exemplars: Iterable[Exemplar], run: Finished) -> list[Exemplar]:
    """The exemplars with the run's name before their ids, so that those of several runs can be told apart."""
    return [
        each.model_copy(update={"document": each.document.model_copy(update={"id": f"{run.name}/{each.document.id}"})})
        for each in exemplars
    ]


def by_run(
    planned: contests.Plan, votes: Sequence[Vote], contest: contests.Contest, runs: Iterable[Finished]
) -> dict[str, Result]:
    """What came of one contest on the documents of each run, and of all of them together under "all runs"."""
    own = contests.votes_of(votes, contest)
    identical = planned.asked[contest].identical
    found = {}
    for run in runs:
        prefix = f"{run.name}/"
        found[run.name] = blindtest.result(
            [vote for vote in own if vote.document_id.startswith(prefix)],
            contest[0],
            identical=[name for name in identical if name.startswith(prefix)],
        )
    return found | {"all runs": blindtest.result(own, contest[0], identical=identical)}
