"""The embedded world: a seeded stream of noisy posts about invented companies, with the true report of each.

Stands in for the web crawl that a laptop cannot have. The inventory of names, phrasings and noise is data
(`world.yml`), `posts` words one post, and this module decides what is told, when and how often:

1. A *story* has a topic, a cast and some relationships between its members. Stories come and go with the dates.
2. A *post* tells part of one story in the manner of its kind (microblog, forum, headline, review, chat, press), adds
   facts, people and outlets that the client does not want, small talk and noise. Some posts repost an earlier one.
3. Topic, kind and length of posts drift with the date, as `drift` says; `drift=0` makes the stream stationary.

Every document depends on the seed and its own index alone, so any stretch of the stream can be made by itself.
"""

import functools
import json
import math
import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from erlib.documents import corpus
from erlib.task.schema import Brief, Document, Exemplar
from erlib.world.posts import Mention, Post, Story, Truth, invent_handle, invent_name, invent_url, inventory

START = datetime(2025, 1, 1, tzinfo=UTC)
MINUTES_PER_DOCUMENT = 15  # 20,000 documents cover seven months
STORIES_PER_DOCUMENT = 0.3
REPOST_SHARE = 0.08
YEAR_MINUTES = 365 * 24 * 60

# Shares of the phrasings, by a hash of their text: what a generic base model has read, what the stream and the gold
# set use; the rest is kept back for out-of-distribution documents.
BASE_EXPOSURE, STREAM_EXPOSURE = 0.8, 0.92
KINDS = ("microblog", "forum", "headline", "review", "chat", "press")
OUT_OF_DISTRIBUTION_KIND = "transcript"
PARTS = ("stream", "gold", "fresh", "ood")  # what ids of documents start with


class Sample(NamedTuple):
    """A raw post and the truth about it."""

    document: Document
    truth: Truth

    @property
    def exemplar(self) -> Exemplar:
        """The cleaned document with its report, as a careful person would have corrected it."""
        cleaned = self.document.model_copy(update={"text": corpus.clean(self.document.text)})
        return Exemplar(document=cleaned, report=self.truth.report)


def _bucket(phrase: str) -> float:
    """Place a phrasing in [0, 1) by a hash of its text."""
    return (crc32(phrase.encode()) % 1000) / 1000


class World:
    """A reproducible world of stories and the posts about them."""

    def __init__(
        self, seed: int = 0, *, brief: Brief | None = None, drift: float = 1.0, exposure: float = STREAM_EXPOSURE
    ):
        self.seed, self.brief, self.drift = seed, brief, drift
        self._phrases = {
            (kind, manner): _usable(spec[manner], exposure)
            for kind, spec in inventory()["relationships"].items()
            for manner in ("explicit", "implied")
        }
        self._rare = {
            (kind, manner): [p for p in spec[manner] if _bucket(p) >= STREAM_EXPOSURE] or spec[manner]
            for kind, spec in inventory()["relationships"].items()
            for manner in ("explicit", "implied")
        }
        self._story = functools.lru_cache(maxsize=1024)(self._make_story)

    def stream(self, n: int, *, start: int = 0) -> list[Sample]:
        """Make `n` posts of the dated stream, from position `start`."""
        return [self.post(i) for i in range(start, start + n)]

    def gold(self, n: int = 105) -> list[Sample]:
        """Make `n` posts whose truth serves as hand-corrected exemplars; each tells a story of its own."""
        return [self._sample("gold", i) for i in range(n)]

    def fresh(self, n: int) -> list[Sample]:
        """Make `n` posts like those of `gold` that nothing was chosen on."""
        return [self._sample("fresh", i) for i in range(n)]

    def out_of_distribution(self, n: int) -> list[Sample]:
        """Make `n` posts of a kind, and with phrasings, that the stream never has."""
        return [self._sample("ood", i) for i in range(n)]

    def post(self, index: int) -> Sample:
        """Make the post at that position of the dated stream."""
        return self._sample("stream", index)

    def find(self, ids: Iterable[str]) -> list[Sample]:
        """Make the posts of these ids, such as `stream-000123` or `gold-007`; raises LookupError for any other id."""
        found = []
        for name in ids:
            part, _, number = name.rpartition("-")
            sample = self._sample(part, int(number)) if part in PARTS and number.isdecimal() else None
            if sample is None or sample.document.id != name:
                raise LookupError(f"{name!r} is no document of the embedded world; ids start with {', '.join(PARTS)}")
            found.append(sample)
        return found

    # -- stories ------------------------------------------------------------------------------------------------

    def _make_story(self, part: str, index: int) -> Story:
        rng = random.Random(f"{self.seed}/{part}/story/{index}")
        topic = self._topic(rng, self._minute(part, round(index / STORIES_PER_DOCUMENT), rng))
        actors: list[tuple[str, str, str]] = []
        pools: dict[str, list[int]] = {}
        links = []
        for _ in range(rng.choice((2, 3, 3, 4, 5))):
            kind = rng.choice(list(inventory()["relationships"]))
            spec = inventory()["relationships"][kind]
            source = self._cast(rng, spec["source"], topic, actors, pools, reuse=0.6)
            target = self._cast(rng, spec["target"], topic, actors, pools, reuse=0.25, avoid=source)
            if not any({source, target} == {a, b} for a, _, b in links):
                links.append((source, kind, target))
        return Story(topic, actors, links)

    def _cast(self, rng, kind, topic, actors, pools, *, reuse: float, avoid: int = -1) -> int:
        """Take an actor of that type from the story, or invent one; returns its index."""
        known = [i for i in pools.get(kind, ()) if i != avoid]
        if known and rng.random() < reuse:
            return rng.choice(known)
        taken = [name.lower() for name, _, _ in actors]
        name = invent_name(rng, kind)
        while any(name.lower() in other or other in name.lower() for other in taken):
            name = invent_name(rng, kind)
        actors.append((name, kind, self._descriptor(rng, kind, topic)))
        pools.setdefault(kind, []).append(len(actors) - 1)
        return len(actors) - 1

    def _descriptor(self, rng: random.Random, kind: str, topic: str) -> str:
        words = inventory()["topics"][topic]
        if kind == "person":
            return rng.choice(inventory()["roles"])
        if kind == "place":
            return rng.choice(inventory()["place_kinds"])
        return rng.choice(words[{"organisation": "sectors", "product": "products", "event": "events"}[kind]])

    # -- time ---------------------------------------------------------------------------------------------------

    def _minute(self, part: str, index: int, rng: random.Random) -> int:
        """Minutes since the start; documents outside the stream fall anywhere in its first seven months."""
        return index * MINUTES_PER_DOCUMENT if part == "stream" else rng.randrange(20_000 * MINUTES_PER_DOCUMENT)

    def _wave(self, minute: int, k: int, n: int) -> float:
        """Weight of option `k` of `n` at that minute: each has its season once a year."""
        return 1 + 0.8 * self.drift * math.cos(2 * math.pi * (minute / YEAR_MINUTES - k / n))

    def _topic(self, rng: random.Random, minute: int) -> str:
        topics = list(inventory()["topics"])
        return rng.choices(topics, [self._wave(minute, k, len(topics)) for k in range(len(topics))])[0]

    # -- posts --------------------------------------------------------------------------------------------------

    def _sample(self, part: str, index: int) -> Sample:
        rng = random.Random(f"{self.seed}/{part}/{index}")
        minute = self._minute(part, index, rng)
        repost = part == "stream" and index > 0 and rng.random() < REPOST_SHARE
        if repost:
            origin = max(0, index - 1 - int(rng.expovariate(1 / 60)))
            text, truth = self._compose(part, origin, self._minute(part, origin, rng))
            text, truth = self._repost(rng, text, truth)
        else:
            text, truth = self._compose(part, index, minute)
        document = Document(
            id=f"{part}-{index:06d}" if part == "stream" else f"{part}-{index:03d}",
            text=text,
            date=(START + timedelta(minutes=minute)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            source=truth.kind,
        )
        return Sample(document, truth)

    def _repost(self, rng: random.Random, text: str, truth: Truth) -> tuple[str, Truth]:
        handle = invent_handle(rng)
        while handle in {mention.name for mention in truth.mentions}:
            handle = invent_handle(rng)
        extra = Mention(handle, "handle", False, (), crc32(b"repost"))
        link = invent_url(rng)
        text = rng.choice((f"RT {handle}: {text}", f"{text} (via {handle})", f"{handle} posted: {text} {link}"))
        mentions = (*truth.mentions, extra)
        return text, Truth(truth.kind, truth.topic, mentions, truth.links, truth.brief)

    def _compose(self, part: str, index: int, minute: int) -> tuple[str, Truth]:
        rng = random.Random(f"{self.seed}/{part}/{index}/text")
        if part == "stream":
            story_index = int(index * STORIES_PER_DOCUMENT) - int(rng.expovariate(1 / 6))
            if rng.random() < 0.12:
                story_index -= story_index % 40  # the story that everybody talks about
            story = self._story(part, max(0, story_index))
        else:
            story = self._story(part, index)
        if part == "ood":
            kind = OUT_OF_DISTRIBUTION_KIND
        else:
            kind = rng.choices(KINDS, [self._wave(minute, k, len(KINDS)) for k in range(len(KINDS))])[0]
        post = Post(rng, kind, story, self._rare if part == "ood" else self._phrases)
        return post.write(length=self.drift * min(1.0, minute / YEAR_MINUTES), brief=self.brief)


def _usable(phrases: list[str], exposure: float) -> list[str]:
    return [p for p in phrases if _bucket(p) < exposure] or phrases[:1]


# -- files --------------------------------------------------------------------------------------------------------


def write_documents(samples: list[Sample], path: Path, *, seed: int = 0, bad_share: float = 0.002) -> int:
    """Write raw posts as the JSONL of a crawl, with some broken lines among them; returns the number of broken ones."""
    rng, broken = random.Random(f"{seed}/broken"), 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for sample in samples:
            row = sample.document.model_dump(exclude={"group"})
            line = json.dumps(row, ensure_ascii=False)
            if rng.random() < bad_share:
                broken += 1
                blank, null = json.dumps({**row, "text": "  "}), json.dumps({**row, "text": None})
                file.write(rng.choice((line[: len(line) // 2], blank, null, "NaN", "[]")) + "\n")
            file.write(line + "\n")
    return broken
