"""What the embedded base model reads in its pre-training: rows of posts with generic reports, easy ones first.

A small LM finds out late that names can be copied, and later still that the wording between two names says how they are
related. Four kinds of row bring that forward, and teach nothing of any client's brief:

1. *Lists*: names, and the same names again. Only at the start; they make copying pay from the first step.
2. *Examples*: posts with their reports, in one text form a row; short posts first, and a few rows as long as a few-shot
   prompt.
3. *Pairs*: a post, two of its names in order, and their relationship if it states one.
4. *Verdicts*: a post, a draft report with planted faults, the post again, and how many faults the draft has. An LM that
   has read them can be made a reward model: at the last token of the second reading it knows what the draft is worth.

A row is `{"parts": [(text, is_target), ...]}`; the text `None` stands for the end token.
"""

import random
from collections.abc import Iterator

from . import corpus
from .posts import invent_name, inventory
from .schema import Entity, Relationship, Report, ask, to_compact, to_json
from .synthetic import World

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
    world: World, *, long_share: float = 0.035, pair_share: float = 0.25, verdict_share: float = 0.15
) -> Iterator[dict]:
    """Yield endless pre-training rows, easy ones first; the same world and shares give the same rows."""
    number = index = 0
    while True:
        rng = random.Random(f"{world.seed}/rows/{number}")
        longest = SHORTEST * (1 + number / GROWTH_ROWS)
        if rng.random() < LIST_SHARE * max(0.0, 1 - number / LIST_ROWS):
            yield {"parts": _list(rng)}
        else:
            long, verdict = rng.random() < long_share, rng.random() < verdict_share
            pairs = not verdict and rng.random() < pair_share
            examples = []
            for _ in range(rng.randint(3, 7) if long else 1 if pairs or verdict else rng.choice((1, 1, 2))):
                text, report, index = _next(world, index, longest)
                examples.append((text, report))
            if long or not (pairs or verdict):
                yield {"parts": _examples(rng, examples, long=long)}
            else:
                yield {"parts": (_pairs if pairs else _verdict)(rng, *examples[0])}
        number += 1


def _next(world: World, index: int, longest: float) -> tuple[str, Report, int]:
    """The next post that is short enough, its generic report, and where to go on."""
    while True:
        document, truth = world.post(index)
        index += 1
        text = corpus.clean(document.text)
        if len(text) <= longest:
            return text, truth.generic_report, index


def _list(rng: random.Random) -> list[tuple[str | None, bool]]:
    names = [invent_name(rng, rng.choice(NAMED)) for _ in range(rng.randint(3, 12))]
    return [(", ".join(names) + "\n", False), ("\n".join(names), True)]


def _pairs(rng: random.Random, text: str, report: Report) -> list[tuple[str | None, bool]]:
    """A post, its related pairs of names and some that are not related, each with the relationship's type or `none`."""
    types = {(link.source, link.target): link.type for link in report.relationships}
    names = [entity.name for entity in report.entities]
    others = [(a, b) for a in names for b in names if a != b and (a, b) not in types]
    asked = [*types, *rng.sample(others, min(len(others), 1 + len(types) // 2))]
    parts: list[tuple[str | None, bool]] = [(text + "\n", False)]
    for source, target in rng.sample(asked, len(asked)):
        parts += [(f"\n{source} > {target}: ", False), (types.get((source, target), "none"), True)]
    return parts


def _examples(rng: random.Random, examples: list[tuple[str, Report]], *, long: bool) -> list[tuple[str | None, bool]]:
    """At times an instruction, then examples of one text form, separated by blank lines."""
    write = to_json if rng.random() < (LONG_JSON_SHARE if long else JSON_SHARE) else to_compact
    parts: list[tuple[str | None, bool]] = []
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


# -- drafts with planted faults -------------------------------------------------------------------------------------


def _verdict(rng: random.Random, text: str, report: Report) -> list[tuple[str | None, bool]]:
    draft = with_faults(rng, text, report, count=rng.choice((0, 0, 1, 1, 2, 2, 3, 4, 5, 7)))
    stated, drafted = _items(report), _items(draft)
    missed, wrong = len(stated - drafted), len(drafted - stated)
    verdict = f"{min(9, missed + wrong)} faults: {missed} missed, {wrong} wrong"
    asked = f"{ask(text)}\n"
    return [(asked, False), (to_compact(draft), False), (None, False), (asked, False), (verdict, True)]


def _items(report: Report) -> set[tuple[str, ...]]:
    """Everything that a report states, one by one: entities with their types, their facts, relationships."""
    facts = {(e.name, fact) for e in report.entities for fact in e.summary.split(", ") if fact}
    return {(e.name, e.type, "") for e in report.entities} | facts | {("", *r.key) for r in report.relationships}


def with_faults(rng: random.Random, text: str, report: Report, *, count: int) -> Report:
    """A copy of a report with about `count` faults of the kinds that an extractor makes.

    Entities, facts and relationships go missing or come up twice over, change their type, their end or their owner,
    and names lose a word.
    """
    entities = {e.name: (e.type, [fact for fact in e.summary.split(", ") if fact]) for e in report.entities}
    links = [relationship.key for relationship in report.relationships]
    kinds = list(inventory()["relationships"])
    for _ in range(count):
        fault, name = rng.random(), rng.choice(list(entities)) if entities else ""
        if fault < 0.25 and links:  # another relationship, or another end
            source, kind, target = links.pop(rng.randrange(len(links)))
            other = rng.choice(list(entities))
            changed = ((source, rng.choice(kinds), target), (target, kind, source), (source, kind, other))
            links.append(rng.choice(changed))
        elif fault < 0.4 and links:
            links.pop(rng.randrange(len(links)))
        elif fault < 0.5 and len(entities) > 1:
            links.append((name, rng.choice(kinds), rng.choice([other for other in entities if other != name])))
        elif fault < 0.7 and entities:
            del entities[name]
        elif fault < 0.8 and entities:
            entities[name] = (rng.choice(NAMED), entities[name][1])
        elif fault < 0.95 and entities:  # a fact less, or one that is none
            facts, words = entities[name][1], text.split()
            at = rng.randrange(len(words))
            if facts and rng.random() < 0.6:
                facts.pop(rng.randrange(len(facts)))
            else:
                facts.append(" ".join(words[at : at + rng.randint(1, 3)]).replace(",", ""))
        elif " " in name:
            cut = name.split()[0]
            entities = {cut if known == name else known: value for known, value in entities.items()}
            links = [tuple(cut if end == name else end for end in link) for link in links]
        links = [link for link in dict.fromkeys(links) if {link[0], link[2]} <= entities.keys() and link[0] != link[2]]
    return Report(
        entities=[Entity(name=n, type=kind, summary=", ".join(facts)) for n, (kind, facts) in entities.items()],
        relationships=[Relationship(source=source, type=kind, target=target) for source, kind, target in links],
    )
