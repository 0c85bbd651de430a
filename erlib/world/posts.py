"""One post of the embedded world: what it says, how its kind of post says it, and the dirt of the web on top.

A `Story` gives the cast and the relationships; `Post` picks some of them, words them with phrasings of the inventory
(`world.yml`), adds facts, people and outlets that the client does not want, small talk and noise, and keeps the
truth about everything it wrote.
"""

import functools
import html
import random
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import NamedTuple
from zlib import crc32

import yaml

from erlib.task.schema import Brief, Entity, Relationship, Report

FORMAL = ("headline", "press", "review")
Phrases = dict[tuple[str, str], list[str]]  # (relationship type, "explicit" or "implied") → phrasings in use


class Fact(NamedTuple):
    """Something the post says of one entity, verbatim; plain facts are true but not wanted in a summary."""

    text: str
    salient: bool
    cue: int


class Mention(NamedTuple):
    """An entity as a post names it; `cue` is the hash of the phrasing that brought it in."""

    name: str
    type: str
    wanted: bool
    facts: tuple[Fact, ...]
    cue: int


class Link(NamedTuple):
    """A relationship that a post states (or implies), by entity names."""

    source: str
    target: str
    type: str
    implied: bool
    wanted: bool
    cue: int


@dataclass(frozen=True)
class Truth:
    """All that a post says; `report` is what the client wants of it."""

    kind: str
    topic: str
    mentions: tuple[Mention, ...]
    links: tuple[Link, ...]
    brief: Brief | None = None

    @functools.cached_property
    def report(self) -> Report:
        """The report that a careful person writes under the brief: wanted items, salient facts."""
        kept = [m for m in self.mentions if m.wanted and (not self.brief or m.type in self.brief.entity_types)]
        names = {m.name for m in kept}
        return Report(
            entities=[
                Entity(name=m.name, type=m.type, summary="; ".join(f.text for f in m.facts if f.salient)) for m in kept
            ],
            relationships=[
                Relationship(source=link.source, target=link.target, type=link.type)
                for link in self.links
                if link.wanted
                and {link.source, link.target} <= names
                and (not self.brief or link.type in self.brief.relationship_types)
            ],
        )

    @functools.cached_property
    def generic_report(self) -> Report:
        """The report of a reader without a brief: every entity, every stated relationship, every fact."""
        return Report(
            entities=[
                Entity(name=m.name, type=m.type, summary=", ".join(f.text for f in m.facts)) for m in self.mentions
            ],
            relationships=[Relationship(source=k.source, target=k.target, type=k.type) for k in self.links],
        )


class Story(NamedTuple):
    """A topic, a cast of `(name, type, what it is)` and links `(source actor, relationship type, target actor)`."""

    topic: str
    actors: list[tuple[str, str, str]]
    links: list[tuple[int, str, int]]


@dataclass
class _Actor:
    """A member of a story's cast."""

    name: str
    type: str
    descriptor: str
    facts: list[Fact] = field(default_factory=list)
    cue: int = 0
    told: bool = False


@functools.lru_cache(maxsize=1)
def inventory() -> dict:
    """The names, phrasings and noise of the embedded world, as `world.yml` has them."""
    text = resources.files("erlib.world").joinpath("world.yml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def invent_name(rng: random.Random, kind: str) -> str:
    """A name for an entity of that type; there are far more of them than any run uses."""
    names, pick = inventory()["names"], rng.choice
    if kind == "organisation":
        stem = (pick(names["org_prefix"]) + pick(names["org_middle"]) + pick(names["org_suffix"])).capitalize()
        if rng.random() < 0.06:
            return "".join(pick("BCDFGHKLMNPRSTVZ") for _ in range(3))
        return f"{stem} {pick(names['org_tail'])}" if rng.random() < 0.5 else stem
    if kind == "person":
        return f"{pick(names['first'])} {(pick(names['last_start']) + pick(names['last_end'])).capitalize()}"
    if kind == "product":
        stem = (pick(names["product_start"]) + pick(names["product_end"])).capitalize()
        tail = f" {pick(names['product_tail'])}" if rng.random() < 0.4 else ""
        return stem + tail + (f" {rng.randint(2, 9)}" if rng.random() < 0.2 else "")
    if kind == "place":
        return (pick(names["place_start"]) + pick(names["place_end"])).capitalize()
    head = pick(names["event_head"])
    return f"{head} {pick(names['event_tail'])}" + (f" {rng.randint(2024, 2027)}" if rng.random() < 0.25 else "")


def invent_handle(rng: random.Random) -> str:
    """The account name of a bystander."""
    number = str(rng.randint(1, 99)) if rng.random() < 0.5 else ""
    return f"@{rng.choice(inventory()['names']['handle'])}{number}"


def invent_url(rng: random.Random) -> str:
    """A link on a reserved domain."""
    return "https://" + rng.choice(("t.example/", "s.example/p/", "b.example/")) + f"{rng.getrandbits(30):x}"


_APOSITION = {
    "organisation": ("the {d} {n}", "{d} {n}", "{n}, {article} {d},", "{n} ({d})"),
    "person": ("{d} {n}", "{n}, {d},", "{n} ({d})", "{n}, the {d},"),
    "product": ("the {d} {n}", "{d} {n}", "{n}, {article} {d},", "the {n} ({d})"),
    "place": ("the {d} {n}", "{n}, {article} {d},"),
    "event": ("the {d} {n}", "{n}, {article} {d},", "{n} ({d})"),
}
_NUMBERS = {  # pattern of the inventory → ways to write it, amounts
    "money": (("${}M", "${}m", "€{}M", "{} million"), (2, 5, 8, 12, 18, 25, 40, 65, 90, 120, 300)),
    "money_raised": (("${}M raised", "${}m raised", "€{}M raised"), (1, 3, 6, 9, 14, 20, 35, 50)),
    "price": (("${}", "${}", "€{}"), (19, 49, 79, 99, 149, 199, 249, 299, 399, 599, 899)),
    "staff": (("{} staff",), (6, 12, 30, 45, 60, 85, 140, 220, 400, 900)),
    "visitors": (("{:,} visitors",), (300, 800, 1500, 3000, 6000, 20000)),
}
_MONTHS = "January February March April May June July August September October November December".split()
_SLOT = re.compile(r"\{([a-z])\}")
_UNWANTED_LINKS = {  # kind of irrelevant clause → slots of its ends, relationship type
    "bystander_pair": ("p", "q", "knows"),
    "visitor": ("p", "l", "visited"),
    "reported": ("a", "o", "reported_by"),
}


def _amount(rng: random.Random, pattern: str) -> str:
    forms, amounts = _NUMBERS[pattern]
    return rng.choice(forms).format(rng.choice(amounts))


class Post:
    """One post in the making: collects sentences, mentions and links, then dresses and dirties the text."""

    def __init__(self, rng: random.Random, kind: str, story: Story, phrases: Phrases):
        self.rng, self.kind, self.story, self.phrases = rng, kind, story, phrases
        self.inventory = inventory()
        self.cast: dict[int, _Actor] = {}
        self.bystanders: list[Mention] = []
        self.links: list[Link] = []
        self.messy = rng.random() < 0.35 and kind not in ("press", "headline")

    def write(self, *, length: float, brief: Brief | None) -> tuple[str, Truth]:
        """Write the post: raw text and truth; `length` in 0..1 makes posts longer."""
        rng, dress = self.rng, self.inventory["kinds"][self.kind]
        sentences = [] if rng.random() < 0.03 else self._tell(length)
        if self.kind != "headline" or rng.random() < 0.3:
            sentences += self._irrelevant(rng.choices((0, 1, 2, 3), (1, 3, 4, 2))[0])
        fillers = rng.choices((0, 1, 2, 3), (3, 4, 2, 2 * length))[0] if self.kind != "headline" else 0
        chatter = self.inventory["topics"][self.story.topic]["chatter"]
        for _ in range(fillers or not sentences):
            phrase = rng.choice(chatter if rng.random() < 0.5 else dress["fillers"])
            sentences.insert(rng.randint(0, len(sentences)), self._sentence(self._fill(self._typo(phrase))))
        if rng.random() < 0.5:
            sentences.insert(0, self._fill(rng.choice(dress["openings"])))
        if rng.random() < 0.45:
            sentences.append(self._fill(rng.choice(dress["closings"])))
        return self._finish([s for s in sentences if s], brief)

    # -- what the post says --

    def _tell(self, length: float) -> list[str]:
        rng, sentences = self.rng, []
        count = 1 if self.kind == "headline" else rng.choices((1, 2, 3, 4), (4, 5, 2, 3 * length))[0]
        clauses = [self._relate(*link) for link in rng.sample(self.story.links, min(count, len(self.story.links)))]
        while clauses:
            clause = clauses.pop(0)
            if clauses and rng.random() < 0.25 and self.kind != "headline":
                clause += rng.choice(self.inventory["joiners"]) + clauses.pop(0)
            sentences.append(self._sentence(clause, hedge=True))
        for actor in list(self.cast.values()):
            specs = self.inventory["facts"][actor.type]
            for manner, share in (("salient", 0.22), ("plain", 0.12)):
                if specs[manner] and rng.random() < share and self.kind != "headline":
                    sentences.append(self._state(actor, specs[manner], salient=manner == "salient"))
        return sentences

    def _relate(self, source: int, kind: str, target: int) -> str:
        rng, spec = self.rng, self.inventory["relationships"][kind]
        implied = rng.random() < 0.3
        phrase = rng.choice(self.phrases[kind, "implied" if implied else "explicit"])
        cue = crc32(phrase.encode())
        ends = {"a": self._actor(source, cue), "b": self._actor(target, cue)}
        tail = ""
        if spec.get("tails") and not implied and rng.random() < 0.4:
            fact = _amount(rng, spec["tail_fact"])
            tail = rng.choice(spec["tails"]).replace("{f}", fact)
            owner = ends["b" if spec.get("tail_of", "target") == "target" else "a"]
            owner.facts.append(Fact(fact, True, crc32(tail.split("{")[0].encode())))
        self.links.append(Link(ends["a"].name, ends["b"].name, kind, implied, True, cue))
        text = self._typo(phrase)
        return _SLOT.sub(lambda m: self._mention(ends[m[1]], text[m.end() : m.end() + 2]), text) + tail

    def _actor(self, index: int, cue: int) -> _Actor:
        if index not in self.cast:
            self.cast[index] = _Actor(*self.story.actors[index], cue=cue)
        return self.cast[index]

    def _mention(self, actor: _Actor, following: str) -> str:
        """Name an actor; the first time often with what it is, later at times in short."""
        rng = self.rng
        if actor.told:
            short = actor.name.split()[0]
            return short if actor.type == "organisation" and len(short) > 3 and rng.random() < 0.3 else actor.name
        actor.told = True
        if following.startswith("'") or rng.random() < 0.5:
            return actor.name
        form = rng.choice(_APOSITION[actor.type])
        actor.facts.insert(0, Fact(actor.descriptor, True, crc32(form.encode())))
        article = "an" if actor.descriptor[0] in "aeiou" else "a"
        text = form.format(d=actor.descriptor, n=actor.name, article=article)
        return text.rstrip(",") if following[:1] in ("", ",", ".", ";", "?") else text

    def _state(self, actor: _Actor, specs: dict, *, salient: bool) -> str:
        rng = self.rng
        spec = specs[rng.choice(list(specs))]
        values = spec["values"]
        fact = _amount(rng, values) if isinstance(values, str) else rng.choice(values)
        phrase = rng.choice(spec["say"])
        if not any(fact == known.text for known in actor.facts):
            actor.facts.append(Fact(fact, salient, crc32(phrase.encode())))
        return self._sentence(self._typo(phrase).replace("{f}", fact).replace("{a}", actor.name))

    def _irrelevant(self, count: int) -> list[str]:
        rng, options = self.rng, self.inventory["irrelevant"]
        kinds = [k for k in options if self.cast or "{a}" not in options[k][0]]
        sentences = []
        for kind in rng.sample(kinds, min(count, len(kinds))):
            phrase = rng.choice(options[kind])
            sentences.append(self._sentence(self._fill(self._typo(phrase), cue=crc32(phrase.encode()), kind=kind)))
        return sentences

    # -- slots, sentences, dirt --

    def _fill(self, phrase: str, *, cue: int = 0, kind: str = "") -> str:
        """Fill the slots of a phrase that is about nobody in the cast, and note whom it brings in."""
        made: dict[str, str] = {}
        phrase = phrase.replace("{topic}", self.story.topic)
        text = _SLOT.sub(lambda m: made.setdefault(m[1], self._slot(m[1], cue)), phrase)
        if kind in _UNWANTED_LINKS:
            source, target, link = _UNWANTED_LINKS[kind]
            self.links.append(Link(made[source], made[target], link, False, False, cue))
        return text

    def _slot(self, slot: str, cue: int) -> str:
        rng, types = self.rng, {"p": "person", "q": "person", "o": "outlet", "h": "handle", "d": "date", "l": "place"}
        if slot == "a":
            return rng.choice(list(self.cast.values())).name
        if slot == "t":
            return "#" + rng.choice(self.inventory["topics"][self.story.topic]["hashtags"])
        if slot in "ue":
            return invent_url(rng) if slot == "u" else rng.choice(self.inventory["emoji"])
        name = self._unwanted_name(slot)
        taken = [a.name.lower() for a in self.cast.values()] + [b.name.lower() for b in self.bystanders]
        while any(name.lower() in other or other in name.lower() for other in taken):
            name = self._unwanted_name(slot)
        self.bystanders.append(Mention(name, types[slot], False, (), cue))
        return name

    def _unwanted_name(self, slot: str) -> str:
        rng = self.rng
        if slot in "pq":
            return invent_name(rng, "person")
        if slot == "o":
            return rng.choice(self.inventory["names"]["outlet"]).replace("{place}", invent_name(rng, "place"))
        if slot == "h":
            return invent_handle(rng)
        if slot == "l":
            return invent_name(rng, "place")
        day, month = rng.randint(1, 28), rng.choice(_MONTHS)
        return rng.choice((f"{day} {month}", f"{month} {day}")) + (
            f", {rng.randint(2023, 2026)}" if rng.random() < 0.3 else ""
        )

    def _typo(self, phrase: str) -> str:
        if not self.messy:
            return phrase
        typos = self.inventory["typos"]
        return " ".join(typos.get(word, word) if self.rng.random() < 0.5 else word for word in phrase.split(" "))

    def _sentence(self, clause: str, *, hedge: bool = False) -> str:
        rng = self.rng
        if hedge and rng.random() < 0.25 and self.kind not in ("press", "headline"):
            lead = rng.choice(self.inventory["leads_in"])
            clause = f"{lead} {clause}" if lead else clause
        elif hedge and rng.random() < 0.2 and self.kind != "press":
            clause = f"{clause}, {rng.choice(self.inventory['hedges'])}"
        if self.kind in FORMAL or not self.messy:
            clause = clause[:1].upper() + clause[1:]
        if clause[-1:] in ".?!":
            return clause
        if self.kind == "headline":
            return clause
        ends = (
            (".", "", "!!", "...", " lol") if self.messy else (".",) if self.kind == "press" else (".", ".", ".", "!")
        )
        return clause + rng.choice(ends)

    def _finish(self, sentences: list[str], brief: Brief | None) -> tuple[str, Truth]:
        """Join the sentences, add hashtags, links, markup and stray characters, and settle the truth."""
        rng, social = self.rng, self.kind in ("microblog", "chat")
        if social and rng.random() < 0.5:
            tags = rng.sample(self.inventory["topics"][self.story.topic]["hashtags"], 2)
            sentences.append(" ".join("#" + tag for tag in tags))
        if rng.random() < (0.35 if social else 0.15):
            sentences.append(invent_url(rng))
        if social and rng.random() < 0.5:
            sentences.insert(rng.randint(0, len(sentences)), rng.choice(self.inventory["emoji"]))
        breaks = {"forum": ("\n", " ", " "), "chat": ("\n", "\n", " "), "transcript": ("\n",), "review": (" ", "\n")}
        text = "".join(s + rng.choice(breaks.get(self.kind, (" ",))) for s in sentences).strip()
        lower = social and rng.random() < 0.12
        text = self._dirt(text.lower() if lower else text)
        plain = html.unescape(text)
        actors = [Mention(a.name, a.type, True, tuple(a.facts), a.cue) for a in self.cast.values()]
        mentions, links = actors + self.bystanders, self.links
        if lower:
            mentions = [m._replace(name=m.name.lower()) for m in mentions]
            links = [k._replace(source=k.source.lower(), target=k.target.lower()) for k in links]
        mentions = [m._replace(facts=tuple(_as_written(fact, plain) for fact in m.facts)) for m in mentions]
        mentions.sort(key=lambda m: plain.find(m.name))
        unique = {(k.source, k.target, k.type): k for k in links}
        return text, Truth(self.kind, self.story.topic, tuple(mentions), tuple(unique.values()), brief)

    def _dirt(self, text: str) -> str:
        """Left-overs of web pages and of copying; `corpus.clean` takes all of them away again."""
        rng = self.rng
        if rng.random() < 0.25:
            text = html.escape(text, quote=rng.random() < 0.5)
            if rng.random() < 0.5:
                text = text.replace("\n", "<br>\n")
        elif "&" in text and rng.random() < 0.7:
            text = text.replace("&", "&amp;")
        if rng.random() < 0.08:
            text = text.replace(". ", ".\u200b ", 1).replace(" ", "\u00a0", 1)
        if rng.random() < 0.1:
            text = text.replace(". ", ".  ")
        if rng.random() < 0.04:
            text = f"<p>{text}</p>"
        return text


def _as_written(fact: Fact, text: str) -> Fact:
    """The fact in the text's own capitals: a sentence that starts with it, or a post in lower case, changed them."""
    if fact.text in text:
        return fact
    at = text.lower().find(fact.text.lower())
    return fact._replace(text=text[at : at + len(fact.text)])
