"""The simulated frontier LM: answers extraction prompts about documents of the embedded world, with faults of its own.

It stands in for a paid frontier LM where there is none, behind the same DSPy engine interface. It reads the *text* of
the prompt as an LM would: which kinds the instructions name, what they say of salient facts and of implied
relationships, and what the exemplars show. Better prompts and exemplars make fewer faults, of the kinds that the source
reports: salient facts missing from summaries, items missed, irrelevant items reported.

Whether a fault occurs is settled by hashes of the document, the item and its phrasing: the same prompt gets the same
answer, and some phrasings are *blind spots* where faults crowd. A student trained on its reports therefore inherits
them. Numbers that come from it are labelled as simulated wherever they show.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from erlib.documents import corpus
from erlib.reports.prompts import enclosed
from erlib.task.answers import parse_json
from erlib.task.forms import parse_compact, to_compact, to_json
from erlib.task.schema import Brief, Entity, Kind, Relationship, Report
from erlib.world.posts import Link, Mention, Truth, inventory
from erlib.world.stream import Sample

if TYPE_CHECKING:
    import dspy
    from dspy.lm15 import Request, Response

    from erlib.reports.teacher import Connection

LABEL = "simulated frontier"

BLIND_SPOT_SHARE = 0.3  # of the phrasings; a fault is seven times as likely there
BLIND_SPOT, ELSEWHERE = 2.5, 0.36  # multiples of the fault's probability; the mean is 1

_DOCUMENT = re.compile(r"Document:\n(.*)\nReport:\s*$", re.DOTALL)
_SALIENT = re.compile(r"\b(salient|key fact)", re.IGNORECASE)
_IMPLIED = re.compile(r"\b(impl(y|ied|ies|icit)|infer)", re.IGNORECASE)
_CONFUSED_TYPE = {
    "organisation": "product",
    "product": "organisation",
    "person": "organisation",
    "place": "event",
    "event": "place",
}


WORLDLY = frozenset({*_CONFUSED_TYPE, *inventory()["relationships"]})  # types whose confusions are stated here


class Reading(NamedTuple):
    """What the simulated frontier takes from a prompt."""

    named: frozenset[str]  # types of wanted kinds that the instructions name
    ruled_out: frozenset[str]  # types of unwanted kinds that the instructions describe
    asks_salient: bool
    asks_implied: bool
    shown_types: frozenset[str]  # relationship types in the exemplars' reports
    shown_implied: bool
    shown_left_out: frozenset[str]  # unwanted types that exemplars leave out
    shown_kinds: frozenset[str]  # kinds of post among the exemplars
    shown_facts: bool  # exemplars whose summaries hold two facts or more
    exemplars: int
    form: str  # "json" or "compact"


class Frontier:
    """A DSPy engine (`complete(Request) -> Response`) that knows the documents of the samples it was given."""

    def __init__(self, samples: Iterable[Sample], brief: Brief, *, faultless: bool = False):
        self.brief, self.faultless = brief, faultless
        self._truths: dict[str, Truth] = {}
        self._read = functools.lru_cache(maxsize=256)(self._read_prompt)
        self.add(samples)

    def add(self, samples: Iterable[Sample]) -> None:
        """Let the frontier read more documents of the embedded world."""
        for sample in samples:
            # Of documents with one text the first stays, as phase 02 keeps the first.
            self._truths.setdefault(enclosed(corpus.clean(sample.document.text)), sample.truth)

    def complete(self, request: "Request") -> "Response":
        """Answer one request; the last user message must hold `Document:`, the text and `Report:`."""
        from dspy.lm15 import Message, Response, Usage

        system = _text(request.system)
        turns = tuple((message.role, _text(message.parts)) for message in request.messages)
        text = _document(turns[-1][1])
        if text not in self._truths:
            raise LookupError(
                f"the simulated frontier knows the embedded world and labelled documents, not {text[:60]!r}; "
                "for other documents set `frontier` to an endpoint's model in the params file"
            )
        config = request.config
        nonce = f"{config.seed}/{config.temperature}" if config.temperature else ""
        answer = self.answer(text, self._read(system, turns[:-1]), nonce=nonce)
        prompt_characters = len(system) + sum(len(content) for _, content in turns)
        return Response(
            id=None,
            model=LABEL,
            message=Message.assistant(answer),
            finish_reason="stop",
            usage=Usage(input_tokens=prompt_characters // 4, output_tokens=len(answer) // 4),
        )

    def answer(self, text: str, reading: Reading, *, nonce: str = "") -> str:
        """Write the report of a known document as this reading of the prompt leads to it."""
        truth = self._truths[text]
        report = truth.report if self.faultless else _Draft(text, truth, reading, nonce, self.brief).report()
        if reading.form == "compact":
            return to_compact(report)
        if not reading.exemplars and _chance("chatter", text, nonce) < 0.3:
            return f"Here is the report:\n```json\n{to_json(report)}\n```"
        return to_json(report)

    def _read_prompt(self, system: str, turns: tuple[tuple[str, str], ...]) -> Reading:
        shown_types, left_out, kinds = set(), set(), set()
        implied = facts = False
        answers = [content for role, content in turns if role == "assistant"]
        documents = [_document(content) for role, content in turns if role == "user"]
        for text, answer in zip(documents, answers, strict=False):
            report = (parse_json if answer.lstrip().startswith("{") else parse_compact)(answer).report
            shown_types |= {relationship.type for relationship in report.relationships}
            facts = facts or sum(len(entity.facts) >= 2 for entity in report.entities) >= 2
            if truth := self._truths.get(text):
                kinds.add(truth.kind)
                reported = {entity.name for entity in report.entities}
                left_out |= {m.type for m in truth.mentions if not m.wanted and m.name not in reported}
                keys = {relationship.key for relationship in report.relationships}
                implied = implied or any(k.implied and (k.source, k.type, k.target) in keys for k in truth.links)
        kinds_of_brief = (*self.brief.entities, *self.brief.relationships)
        instructions = "\n".join(line for line in system.split("\n") if not line.startswith("- "))  # less the kinds
        return Reading(
            named=frozenset(k.type for k in kinds_of_brief if k.wanted and re.search(rf"\b{k.type}\b", system)),
            ruled_out=frozenset(k.type for k in kinds_of_brief if not k.wanted and _describes(system, k)),
            asks_salient=bool(_SALIENT.search(instructions)),
            asks_implied=bool(_IMPLIED.search(instructions)),
            shown_types=frozenset(shown_types),
            shown_implied=implied,
            shown_left_out=frozenset(left_out),
            shown_kinds=frozenset(kinds),
            shown_facts=facts,
            exemplars=len(answers),
            form="compact" if (answers and not answers[-1].lstrip().startswith("{")) else "json",
        )


def connect_frontier(
    name: str,
    samples: Iterable[Sample],
    brief: Brief,
    *,
    cache_dir: Path,
    connection: "Connection",
) -> "dspy.LM":
    """Connect to the frontier LM of the params: the one simulated on `samples`, or an endpoint's model of that name.

    The simulated one costs nothing and keeps no cache, and "labels" is the one that makes no fault: what it says of a
    labelled document is its labels. See `teacher.connect` for the rest.
    """
    from erlib.reports import teacher

    if name not in ("simulated", "labels"):
        return teacher.connect(name, cache_dir=cache_dir, connection=connection)
    free = replace(connection, budget=teacher.Budget())
    engine = Frontier(samples, brief, faultless=name == "labels")
    return teacher.connect(name, engine=engine, cache_dir=None, connection=free)


class _Draft:
    """One answer in the making: decides, item by item, which faults occur."""

    def __init__(self, text: str, truth: Truth, reading: Reading, nonce: str, brief: Brief):
        self.text, self.truth, self.reading, self.nonce, self.brief = text, truth, reading, nonce, brief
        # Long, crowded posts are harder; exemplars of the same kind of post help.
        crowd = 1 + 0.06 * max(0, len(truth.mentions) - 4)
        self.difficulty = crowd * (0.7 if truth.kind in reading.shown_kinds else 1.0)

    def report(self) -> Report:
        entities: dict[str, Entity] = {}
        written: dict[str, str] = {}  # name in the document → name in the report
        for mention in self.truth.mentions:
            if self._reports(mention):
                name = self._boundary(mention)
                written[mention.name] = name
                entities.setdefault(name, Entity(name=name, type=self._type(mention), summary=self._summary(mention)))
        links = {}
        for link in self.truth.links:
            if link.source in written and link.target in written and self._links(link):
                made = Relationship(source=written[link.source], target=written[link.target], type=self._relation(link))
                links.setdefault(made.key, made)
        return Report(entities=tuple(entities.values()), relationships=tuple(links.values()))

    def _fault(self, what: str, item: str, cue: int, probability: float) -> bool:
        """Whether a fault of that kind befalls an item; blind spots are a property of the phrasing alone."""
        weight = BLIND_SPOT if _chance("blind", what, cue) < BLIND_SPOT_SHARE else ELSEWHERE
        return _chance(what, self.text, item, self.nonce) < min(0.97, probability * weight)

    def _reports(self, mention: Mention) -> bool:
        reading = self.reading
        if mention.wanted:
            probability = (0.085 if mention.type in reading.named else 0.15) * self.difficulty
            return not self._fault("missed", mention.name, mention.cue, probability)
        probability = 0.5 if mention.type in reading.ruled_out else 0.85
        probability *= 0.4 if mention.type in reading.shown_left_out else 1.0
        return self._fault("irrelevant", mention.name, mention.cue, probability)

    def _boundary(self, mention: Mention) -> str:
        words = mention.name.split()
        probability = 0.03 if self.reading.exemplars else 0.05
        if len(words) == 1 or mention.type == "person":
            return mention.name
        return words[0] if self._fault("boundary", mention.name, mention.cue, probability) else mention.name

    def _type(self, mention: Mention) -> str:
        confused = _CONFUSED_TYPE.get(mention.type) or self._other(mention.type, mention.cue)
        probability = 0.02 if mention.type in self.reading.named else 0.05
        return confused if confused and self._fault("type", mention.name, mention.cue, probability) else mention.type

    def _summary(self, mention: Mention) -> str:
        reading, kept = self.reading, []
        drop = (0.36 if reading.asks_salient else 0.6) * (0.72 if reading.shown_facts else 1.0)
        add = (0.25 if reading.asks_salient else 0.6) * (0.72 if reading.shown_facts else 1.0)
        for fact in mention.facts:
            what, probability = ("fact", drop) if fact.salient else ("plain", add)
            faulty = self._fault(what, mention.name + fact.text, fact.cue, probability)
            if faulty != fact.salient:  # a salient fact that is not dropped, or a plain one that slips in
                kept.append(fact.text)
        return "; ".join(kept)

    def _links(self, link: Link) -> bool:
        reading, item = self.reading, f"{link.source}>{link.target}"
        if not link.wanted:
            return self._fault("irrelevant link", item, link.cue, 0.3 if link.type in reading.ruled_out else 0.85)
        if link.implied:
            probability = 0.6 if reading.asks_implied else 0.8
            probability *= 0.8 if reading.shown_implied else 1.0
        else:
            probability = 0.1 if link.type in reading.named else 0.18
        probability *= (0.45 if link.type in reading.shown_types else 1.0) * self.difficulty
        return not self._fault("missed link", item, link.cue, probability)

    def _relation(self, link: Link) -> str:
        """The relationship's type, at times confused with one between the same types of entity."""
        probability = (0.04 if link.type in self.reading.named else 0.09) * (1.6 if link.implied else 1.0)
        if link.wanted and self._fault("relation", f"{link.source}>{link.target}", link.cue, probability):
            options = _RIVALS.get(link.type, ())
            if options:
                return options[int(_chance("rival", link.cue) * len(options))]
            return self._other(link.type, link.cue) or link.type
        return link.type

    def _other(self, kind: str, cue: int) -> str | None:
        """Another wanted type of the brief, the same one in one phrasing, for types that the embedded world has not."""
        for kinds in (self.brief.entity_types, self.brief.relationship_types):
            others = sorted(kinds - {kind})
            if kind in kinds and others and kind not in WORLDLY:
                return others[int(_chance("other", kind, cue) * len(others))]
        return None


_RIVALS = {
    "acquired": ("invested_in", "partners_with"),
    "invested_in": ("acquired", "partners_with"),
    "partners_with": ("supplies", "competes_with"),
    "competes_with": ("sued", "partners_with"),
    "supplies": ("partners_with",),
    "sued": ("competes_with",),
    "makes": ("uses",),
    "uses": ("makes",),
    "founded": ("leads",),
    "leads": ("founded", "works_for"),
    "works_for": ("leads",),
    "left": ("works_for",),
    "based_in": ("expands_to",),
    "expands_to": ("based_in",),
}


def _chance(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    value = crc32("\x1f".join(map(str, parts)).encode())
    # crc32 alone is linear: nearby texts give related values, so a multiplicative hash spreads them.
    return ((value * 2654435761) & 0xFFFFFFFF) / 2**32


def _describes(system: str, kind: Kind) -> bool:
    return kind.description in system or kind.example in system


def _text(content: object) -> str:
    """The text of a system prompt or of message parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(getattr(part, "text", "") or "" for part in content)


def _document(message: str) -> str:
    match = _DOCUMENT.search(message)
    return match[1].strip() if match else message.strip()
