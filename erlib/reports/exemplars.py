"""Exemplars: dividing them into parts, and random sets of a few."""

import random
from collections.abc import Mapping, Sequence

from erlib.task.evaluation import normal_text
from erlib.task.schema import Exemplar

SPLITS = {"pool": 35, "dev": 30, "test": 40}  # relative sizes: shown as demos, selected on, reported on


def split(exemplars: Sequence[Exemplar], *, sizes: Mapping[str, int] = SPLITS, seed: int) -> list[Exemplar]:
    """Divide exemplars into named parts in proportion to `sizes`, disjoint by id and by text, whatever its case.

    Those whose `split` names a part already stay in it, as the test split of a benchmark does; the parts that such
    exemplars fill get no others.
    """
    given = {part for exemplar in exemplars if (part := exemplar.split) in sizes}
    if given:
        left = {name: size for name, size in sizes.items() if name not in given}
        placed = [exemplar for exemplar in exemplars if exemplar.split in given]
        others = [exemplar for exemplar in exemplars if exemplar.split not in given]
        if bool(left) != bool(others):
            raise ValueError(
                f"gold file: {len(others)} exemplars name no part, and open are: {', '.join(left) or 'none'}"
            )
        texts = {normal_text(exemplar.document.text) for exemplar in placed}
        if twice := [e.document.id for e in others if normal_text(e.document.text) in texts]:
            raise ValueError(f"gold file: {twice[0]!r} repeats the text of an exemplar of a part that the file names")
        return [*(split(others, sizes=left, seed=seed) if left else []), *placed]
    groups: dict[str, list[Exemplar]] = {}
    ids: set[str] = set()
    for exemplar in exemplars:
        if exemplar.document.id in ids:
            raise ValueError(f"gold file: the id {exemplar.document.id!r} occurs twice; ids must be unique")
        ids.add(exemplar.document.id)
        groups.setdefault(normal_text(exemplar.document.text), []).append(exemplar)
    if len(groups) < len(sizes):
        raise ValueError(f"gold file: {len(groups)} different documents cannot be split into {', '.join(sizes)}")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    quotas = {name: share * len(order) / sum(sizes.values()) for name, share in sizes.items()}
    filled = dict.fromkeys(sizes, 0)
    divided = []
    for group in order:
        name = max(quotas, key=lambda part: (quotas[part] - filled[part]) / quotas[part])
        filled[name] += 1
        divided += [exemplar.model_copy(update={"split": name}) for exemplar in group]
    return divided


def part(exemplars: Sequence[Exemplar], name: str) -> list[Exemplar]:
    """The exemplars of one split."""
    return [exemplar for exemplar in exemplars if exemplar.split == name]


def random_sets(pool: Sequence[Exemplar], *, k: int = 5, draws: int = 5, seed: int) -> list[tuple[Exemplar, ...]]:
    """Baseline: `draws` random sets of `k` exemplars. Raises ValueError where the pool has fewer."""
    if len(pool) < k:
        raise ValueError(
            f"the gold exemplars leave {len(pool)} to show (a third of them), and `n_exemplars` = {k} are to be shown: "
            "give more gold exemplars, or lower `n_exemplars` (section 01_prompts)"
        )
    rng = random.Random(f"random sets {seed}")  # LabeledFewShot samples with Random(0)
    return [tuple(rng.sample(list(pool), k)) for _ in range(draws)]
