"""What the embedded base model reads in its pre-training: rows of posts with generic reports, easy ones first.

A small LM finds out late that names can be copied, and later still that the wording between two names says how they are
related, and what is said of whom. Four kinds of row bring that forward, and teach nothing of any client's brief:

1. *Lists*: names, and the same names again. Only at the start; they make copying pay from the first step.
2. *Examples*: posts with their reports, in one text form a row; short posts first, and a few rows as long as a few-shot
   prompt.
3. *Pairs*: a post, two of its names in order, and their relationship if it states one.
4. *Facts*: a post, its names in any order, and all that it says of each.

A row is `{"parts": [(text, is_target), ...]}`.
"""

import random
from collections.abc import Iterator

from erlib.documents import corpus
from erlib.task.forms import ask, to_compact, to_json
from erlib.task.schema import Report
from erlib.world.posts import invent_name, inventory
from erlib.world.stream import World

LIST_ROWS = 3000  # over the first rows the share of lists falls from `LIST_SHARE` to nothing
LIST_SHARE = 0.7
SHORTEST = 120  # characters of the longest post in the first row; grows by that much every `GROWTH_ROWS` rows
GROWTH_ROWS = 2000
JSON_SHARE, LONG_JSON_SHARE = 0.2, 0.6
NAMED = ("organisation", "person", "product", "place", "event")

_INSTRUCTIONS = (
    "Read the document and write its report.",
    "Extract all entities and relationships from the text.",
    "List every named thing in the document with its type, and how they are connected.",
    "You read short posts from the web. For each one, name the entities and relationships in it.",
    "Task: information extraction. Report each entity once, with a type and a summary.",
    "The following documents come with reports that list who and what they mention.",
)


def rows(
    world: World, *, long_share: float = 0.035, pair_share: float = 0.2, fact_share: float = 0.2
) -> Iterator[dict]:
    """Yield endless pre-training rows, easy ones first; the same world and shares give the same rows."""
    number = index = 0
    while True:
        rng = random.Random(f"{world.seed}/rows/{number}")
        longest = SHORTEST * (1 + number / GROWTH_ROWS)
        if rng.random() < LIST_SHARE * max(0.0, 1 - number / LIST_ROWS):
            yield {"parts": _list(rng)}
        else:
            long, asks = rng.random() < long_share, rng.random()
            about = _pairs if asks < pair_share else _facts if asks < pair_share + fact_share else None
            examples = []
            for _ in range(rng.randint(3, 7) if long else 1 if about else rng.choice((1, 1, 2))):
                text, report, index = _next(world, index, longest)
                examples.append((text, report))
            if about and not long and len(examples[0][1].entities) > 1:
                yield {"parts": about(rng, *examples[0])}
            else:
                yield {"parts": _examples(rng, examples, long=long)}
        number += 1


def _next(world: World, index: int, longest: float) -> tuple[str, Report, int]:
    """The next post that is short enough, its generic report, and where to go on."""
    while True:
        document, truth = world.post(index)
        index += 1
        text = corpus.clean(document.text)
        if len(text) <= longest:
            return text, truth.generic_report, index


def _list(rng: random.Random) -> list[tuple[str, bool]]:
    names = [invent_name(rng, rng.choice(NAMED)) for _ in range(rng.randint(3, 12))]
    return [(", ".join(names) + "\n", False), ("\n".join(names), True)]


def _pairs(rng: random.Random, text: str, report: Report) -> list[tuple[str, bool]]:
    """A post, its related pairs of names and some that are not related, each with the relationship's type or `none`."""
    types = {(link.source, link.target): link.type for link in report.relationships}
    names = [entity.name for entity in report.entities]
    others = [(a, b) for a in names for b in names if a != b and (a, b) not in types]
    asked = [*types, *rng.sample(others, min(len(others), 1 + len(types) // 2))]
    pairs = rng.sample(asked, len(asked))
    return _answered(text, [(f"{source} > {target}", types.get((source, target), "none")) for source, target in pairs])


def _facts(rng: random.Random, text: str, report: Report) -> list[tuple[str, bool]]:
    """A post, its names in any order, and what it says of each, or `none`."""
    entities = rng.sample(report.entities, len(report.entities))
    return _answered(text, [(entity.name, entity.summary or "none") for entity in entities])


def _answered(text: str, questions: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """A post, and below it a line for each question with its answer, the target."""
    parts: list[tuple[str, bool]] = [(text + "\n", False)]
    for question, answer in questions:
        parts += [(f"\n{question}: ", False), (answer, True)]
    return parts


def _examples(rng: random.Random, examples: list[tuple[str, Report]], *, long: bool) -> list[tuple[str, bool]]:
    """At times an instruction, then examples of one text form, separated by blank lines."""
    write = to_json if rng.random() < (LONG_JSON_SHARE if long else JSON_SHARE) else to_compact
    parts: list[tuple[str, bool]] = []
    if rng.random() < 0.5 or long:
        parts.append((_header(rng, rng.choice((0, 15, 30, 45) if long else (0, 0, 3, 6))), False))
    for text, report in examples:
        blank = "\n\n" if parts else ""
        parts += [(f"{blank}{ask(text)}\n", False), (write(report), True)]
    return parts


def _header(rng: random.Random, kinds: int) -> str:
    """An instruction in the manner of many clients, with a list of kinds in words that fit none of them."""
    lines = [" ".join(rng.sample(_INSTRUCTIONS, rng.randint(1, 3)))]
    topics = list(inventory()["topics"].values())
    for _ in range(kinds):
        topic = rng.choice(topics)
        words = rng.choice((topic["sectors"], topic["products"], topic["events"], inventory()["roles"]))
        lines.append(f"- {rng.choice(words).replace(' ', '_')}: {rng.choice(topic['chatter'])}.")
    return "\n".join(lines)
