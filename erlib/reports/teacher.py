"""The frontier LM behind DSPy: concurrency limit, retries, response cache, budget, and reports that resume.

`connect` gives an ordinary `dspy.LM`. Its engine is a `Meter` around the engine that does the work: the simulated
frontier, or DSPy's own client of an OpenAI-compatible endpoint, which reads the API key from the environment
(`OPENAI_API_KEY`). Nothing here sees, stores or logs the key.

1. An answer that was ever paid for is on disk before anyone uses it, and is never paid for twice.
2. A request is sent only if its worst case still fits the budget, beside the worst case of all requests under way.
3. Rate limits, server errors, timeouts and unreadable bodies are tried again with growing pauses; refusals are not.
"""

import hashlib
import json
import math
import random
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from erlib.reports import extraction, prompts
from erlib.task import evaluation
from erlib.task.schema import Brief, Document, Exemplar, Parsed

if TYPE_CHECKING:
    import dspy
    from dspy.lm15 import Request, Response

_PER_MESSAGE = 8  # tokens that a chat format adds around a message, at most
_CHARACTERS_A_TOKEN = 4  # English text, for the estimate only; the budget uses the bound of one token a byte
_LONGEST_PAUSE = 60.0  # seconds


class Engine(Protocol):
    """Whatever answers one canonical DSPy request."""

    def complete(self, request: "Request") -> "Response": ...


class BudgetExceeded(RuntimeError):
    """The next request could exceed the budget; everything paid for so far is in the cache."""


@dataclass
class Usage:
    """Totals of one connection; tokens and dollars count what was bought by it, not what the cache gave."""

    requests: int = 0
    cached: int = 0
    retries: int = 0
    empty: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests sent, {self.cached:,} answers from the cache, {self.retries:,} tried again, "
            f"{self.empty:,} empty; {self.input_tokens:,} tokens in, {self.output_tokens:,} out: ${self.usd:.2f}"
        )


class Estimate(NamedTuple):
    """What a set of requests would buy: those not in the cache, their tokens, dollars expected and at worst."""

    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    usd: float
    usd_at_worst: float


@dataclass(frozen=True)
class Budget:
    """What a connection may spend; prices are dollars for a million tokens."""

    usd: float = math.inf  # for everything recorded in the cache: a resumed run does not get a second budget
    price_in: float = 0.0  # of prompts; 0 only where nothing is paid
    price_out: float = 0.0  # of completions

    def __post_init__(self) -> None:
        if self.usd < math.inf and not (self.price_in > 0 and self.price_out > 0):
            raise ValueError("a budget needs price_in and price_out above 0, in dollars for a million tokens")

    def price(self, input_tokens: int, output_tokens: int) -> float:
        """Dollars for so many tokens."""
        return (input_tokens * self.price_in + output_tokens * self.price_out) / 1e6


@dataclass(frozen=True)
class Limits:
    """How a server is treated that is busy, slow or out of order."""

    concurrency: int = 16  # requests under way at once: most endpoints allow that many
    timeout: float = 120.0  # seconds for an answer; a long report takes a busy server a minute
    attempts: int = 6  # of one request, before its fault is raised: half a minute of pauses in all
    backoff: float = 1.0  # seconds of the first pause; each further one is twice as long, with jitter


def connect(
    model: str,
    *,
    engine: Engine | None = None,
    api_base: str | None = None,
    cache_dir: Path | None,
    budget: Budget = Budget(),
    limits: Limits = Limits(),
    max_tokens: int = 1024,
    temperature: float = 0.0,
) -> "dspy.LM":
    """Connect to a frontier LM: an engine of its own, or an OpenAI-compatible endpoint at `api_base`.

    The cache's key holds `model` and `api_base`, but no engine's code or weights: for one that costs nothing, give
    `cache_dir=None`, and answers are kept in memory only. A pause that the server asks for goes before `limits`.
    """
    import dspy
    from dspy.lm15 import LMRouter, RouterConfig, Timeouts

    if engine is None:
        urls = {"openai-chat": api_base} if api_base else None
        engine = _Endpoint(LMRouter(RouterConfig(base_urls=urls, timeouts=Timeouts(read=limits.timeout))))
    meter = Meter(engine, source=f"{model} {api_base or ''}", cache_dir=cache_dir, budget=budget, limits=limits)
    # DSPy's own cache is a pickle keyed by the model's name, and its retries would not see the budget.
    return dspy.LM(model, engine=meter, cache=False, num_retries=0, max_tokens=max_tokens, temperature=temperature)


def usage(lm: "dspy.LM") -> Usage:
    """What a connection has used so far."""
    return replace(lm.engine.usage)


class _Endpoint:
    """Sends every request to the chat-completions door of DSPy's router, whatever the model is called."""

    def __init__(self, router: Engine):
        self._router = router

    def complete(self, request: "Request") -> "Response":
        return self._router.complete(replace(request, model=f"openai-chat:{request.model}"))


class Meter:
    """A DSPy engine around another: cache, budget, concurrency limit, retries and totals. Safe to call from threads."""

    def __init__(self, engine: Engine, *, source: str, cache_dir: Path | None, budget: Budget, limits: Limits):
        self.usage, self.budget = Usage(), budget
        self._engine, self._source, self._limits = engine, source, limits
        self._cache = _Cache(cache_dir)
        self._slots = threading.BoundedSemaphore(limits.concurrency)
        self._funds = threading.Condition()
        self._spent = self._cache.spent()
        self._reserved: dict[int, float] = {}  # one entry per request under way: its worst case in dollars

    def complete(self, request: "Request") -> "Response":
        """Answer from the cache, or buy the answer and store it."""
        from dspy.lm15 import Message, Response
        from dspy.lm15 import Usage as Reported

        key = self.key(request)
        if (answer := self._cache.get(key)) is None:
            answer = self._buy(request, key)
        else:
            with self._funds:
                self.usage.cached += 1
        text, finish_reason = answer
        # An empty text would end as an error inside DSPy, far from here; a blank one is read as an unparsable answer.
        message = Message.assistant(text or " ")
        return Response(id=None, model=request.model, message=message, finish_reason=finish_reason, usage=Reported())

    def key(self, request: "Request") -> str:
        """Content hash of a request: source, system text, messages and settings."""
        messages = [(message.role, message.text) for message in request.messages]
        content = [self._source, request.system, messages, asdict(request.config)]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def holds(self, request: "Request") -> bool:
        """Whether the cache holds the answer to a request."""
        return self._cache.get(self.key(request)) is not None

    def _buy(self, request: "Request", key: str) -> tuple[str, str]:
        with self._slots:
            ticket = self._reserve(request)
            try:
                response = self._attempt(request, key)
                text = response.text or ""
                bought = response.usage
                spent_in = _estimated(_length(request)) if bought.input_tokens is None else bought.input_tokens
                spent_out = _estimated(len(text)) if bought.output_tokens is None else bought.output_tokens
                usd = self.budget.price(spent_in, spent_out)
                self._cache.put(key, text, response.finish_reason, spent_in, spent_out, usd)
            except BaseException:
                self._settle(ticket, 0.0)
                raise
            self._settle(ticket, usd)
        with self._funds:
            self.usage.requests += 1
            self.usage.empty += not text.strip()
            self.usage.input_tokens += spent_in
            self.usage.output_tokens += spent_out
            self.usage.usd += usd
        return text, response.finish_reason

    def _reserve(self, request: "Request") -> int:
        """Set the worst case of a request aside, waiting for requests under way to settle; raises BudgetExceeded."""
        worst = self.worst_case(request)
        with self._funds:
            while self._spent + sum(self._reserved.values()) + worst > self.budget.usd:
                if not self._reserved:
                    raise BudgetExceeded(
                        f"the budget of ${self.budget.usd:.2f} is used up: ${self._spent:.4f} spent, and the next "
                        f"request may cost up to ${worst:.4f}. All answers so far are kept: raise `budget_usd` and "
                        "run again."
                    )
                self._funds.wait()
            ticket = threading.get_ident()
            self._reserved[ticket] = worst
        return ticket

    def worst_case(self, request: "Request") -> float:
        """Upper bound of a request's price in dollars: one token a byte in, `max_tokens` out."""
        size = len((request.system or "").encode()) + sum(len((m.text or "").encode()) for m in request.messages)
        return self.budget.price(size + _PER_MESSAGE * (len(request.messages) + 1), request.config.max_tokens)

    def _settle(self, ticket: int, usd: float) -> None:
        with self._funds:
            del self._reserved[ticket]
            self._spent += usd
            self._funds.notify_all()

    def _attempt(self, request: "Request", key: str) -> "Response":
        jitter = random.Random(key)
        for attempt in range(1, self._limits.attempts + 1):
            try:
                return self._engine.complete(request)
            except Exception as error:
                if attempt == self._limits.attempts or not _transient(error):
                    raise
                pause = self._limits.backoff * 2 ** (attempt - 1) * jitter.uniform(0.5, 1.5)
                asked = getattr(error, "retry_after", None)
            with self._funds:
                self.usage.retries += 1
            # The slot stays taken during the pause: a server that is overloaded gets fewer requests, not others.
            time.sleep(min(_LONGEST_PAUSE, pause if asked is None else max(asked, 0.0)))
        raise AssertionError("unreachable: the last attempt returns or raises")


def _transient(error: Exception) -> bool:
    """Whether trying again may help: rate limit, server error, timeout, broken connection, unreadable body."""
    from dspy.lm15 import ProviderError, RateLimitError, ServerError, TimeoutError, TransportError

    if isinstance(error, RateLimitError | ServerError | TimeoutError | TransportError):
        return True
    return isinstance(error, ProviderError) and error.status == 200  # success that is not JSON: a broken gateway


def _length(request: "Request") -> int:
    return len(request.system or "") + sum(len(message.text or "") for message in request.messages)


def _estimated(characters: int) -> int:
    return math.ceil(characters / _CHARACTERS_A_TOKEN)


class _Cache:
    """Answers on disk by content hash, in SQLite: an answer is committed before `put` returns, and survives a kill."""

    def __init__(self, folder: Path | None):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        file = ":memory:" if folder is None else folder / "responses.sqlite"
        self._lock = threading.Lock()
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=30.0)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, text TEXT NOT NULL, "
            "finish_reason TEXT NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, "
            "usd REAL NOT NULL)"
        )

    def get(self, key: str) -> tuple[str, str] | None:
        """Text and finish reason of a stored answer."""
        with self._lock:
            return self._db.execute("SELECT text, finish_reason FROM responses WHERE key = ?", (key,)).fetchone()

    def put(self, key: str, text: str, finish_reason: str, input_tokens: int, output_tokens: int, usd: float) -> None:
        with self._lock:
            self._db.execute(
                "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)",
                (key, text, finish_reason, input_tokens, output_tokens, usd),
            )

    def spent(self) -> float:
        """Dollars paid for everything that is stored."""
        with self._lock:
            return self._db.execute("SELECT COALESCE(SUM(usd), 0.0) FROM responses").fetchone()[0]


# -- reports of a corpus ------------------------------------------------------------------------------------------


def estimate(
    lm: "dspy.LM",
    documents: Sequence[Document],
    *,
    template: prompts.Template,
    demos: Sequence[Exemplar] = (),
    form: prompts.Form = "json",
    output_tokens: int = 300,
) -> Estimate:
    """Tokens and dollars that `write_reports` would buy, with `output_tokens` expected a report; sends nothing."""
    from dspy.lm15 import request_from_openai_chat

    meter: Meter = lm.engine
    adapter = extraction.ReportAdapter(template, form)
    settings = {name: value for name, value in lm.kwargs.items() if value is not None}
    bodies = [{"model": lm.model, "messages": adapter.messages(d.text, demos), **settings} for d in documents]
    requests = [request_from_openai_chat(body) for body in bodies]
    new = [request for request in requests if not meter.holds(request)]
    tokens_in = sum(_estimated(_length(request)) for request in new)
    tokens_out = output_tokens * len(new)
    worst = sum(meter.worst_case(request) for request in new)
    usd = meter.budget.price(tokens_in, tokens_out)
    return Estimate(len(new), len(requests) - len(new), tokens_in, tokens_out, usd, worst)


def write_reports(
    lm: "dspy.LM",
    documents: Sequence[Document],
    *,
    template: prompts.Template,
    path: Path,
    demos: Sequence[Exemplar] = (),
    form: prompts.Form = "json",
    brief: Brief | None = None,
    threads: int = 16,
) -> list[Parsed]:
    """Have the frontier write the report of every document, and write them to `path` (`evaluation.write_predictions`).

    Resumes through the response cache: after a kill or a spent budget, the same call asks only for what is missing.
    """
    parsed = extraction.extract(lm, documents, template=template, demos=demos, form=form, threads=threads, brief=brief)
    evaluation.write_predictions(path, documents, parsed)
    return parsed
