"""What stands between a program and an LM that is paid for: response cache, budget, pace, retries and totals.

1. An answer that was ever paid for is on disk before anyone uses it, and is never paid for twice.
2. A request is sent only if its worst case still fits the budget, beside the worst case of all requests under way.
3. A fault of the moment is tried again with growing pauses, and a pause that the server asks for holds for all
   requests; an answer that was cut off is asked for once more with more room; whatever stays unanswered is raised.
4. Nothing that a server charged is forgotten, whether it was of use or not.
"""

import hashlib
import json
import math
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from erlib.reports.endpoint import Fault, Slow, Unanswered, Unavailable

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response

_PER_MESSAGE = 8  # tokens that a chat format adds around a message, at most
_BYTES_A_TOKEN = 4  # English text, for estimates; the budget's worst case uses the bound of one token a byte
_MORE_ROOM = 4  # times the token limit, for an answer that was cut off: a reasoning model thinks 1,000 tokens and more


class Engine(Protocol):
    """Whatever answers one canonical DSPy request."""

    def complete(self, request: "Request") -> "Response": ...


class BudgetExceeded(RuntimeError):
    """The next request could exceed the budget; everything paid for so far is in the cache."""


class Interrupted(RuntimeError):
    """The program was interrupted while this request waited."""


@dataclass
class Usage:
    """Totals of one connection; tokens and dollars count what was bought by it, not what the cache gave."""

    requests: int = 0
    cached: int = 0
    retries: int = 0
    unanswered: int = 0
    estimated: int = 0  # requests whose tokens the server did not count
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def __str__(self) -> str:
        guessed = f" ({self.estimated:,} of them estimated, for the server did not count)" if self.estimated else ""
        return (
            f"{self.requests:,} requests answered, {self.cached:,} answers from the cache, "
            f"{self.retries:,} tried again, {self.unanswered:,} unanswered; {self.input_tokens:,} tokens in, "
            f"{self.output_tokens:,} out{guessed}: ${self.usd:.2f}"
        )


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
    requests_per_minute: float = 0.0  # 0: as many as the server takes
    tokens_per_minute: float = 0.0  # of prompts and answers, estimated; 0: as many as the server takes
    max_unanswered_share: float = 0.05  # of the documents of one question; more without an answer are a fault


class Pace:
    """When the next request may start: requests at once, rates a minute, and pauses that the server asked for."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._at_once = limits.concurrency
        self._under_way = 0
        self._next = 0.0  # moments of `time.monotonic`
        self._paused_until = 0.0
        self._changed = threading.Condition()
        self._interruptions = 0

    def interrupt(self) -> None:
        """Raise `Interrupted` in every thread that waits now; those that come later are not concerned."""
        with self._changed:
            self._interruptions += 1
            self._changed.notify_all()

    @contextmanager
    def turn(self, tokens: int) -> Iterator[None]:
        """Wait for the turn of a request of so many tokens, and hold it."""
        self._enter(tokens)
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def _enter(self, tokens: int) -> None:
        with self._changed:
            began = self._interruptions
            while self._under_way >= self._at_once:
                self._wait(began, None)
            self._under_way += 1
            try:
                start = max(time.monotonic(), self._next)
                self._next = start + self._spacing(tokens)
                while (left := max(start, self._paused_until) - time.monotonic()) > 0:
                    self._wait(began, left)
            except BaseException:
                self._under_way -= 1
                self._changed.notify_all()
                raise

    def rest(self, seconds: float) -> None:
        """Let this thread's request rest; its turn stays taken, so that a server in trouble gets fewer requests."""
        with self._changed:
            began, until = self._interruptions, time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0:
                self._wait(began, left)

    def pause(self, seconds: float) -> None:
        """Let every request wait that has not started."""
        with self._changed:
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def slow_down(self) -> None:
        """Halve the requests at once, down to one: a server that answers one at a time only falls behind with more."""
        with self._changed:
            self._at_once = max(1, self._at_once // 2)

    def _spacing(self, tokens: int) -> float:
        rates = ((1, self._limits.requests_per_minute), (tokens, self._limits.tokens_per_minute))
        return max(60.0 * amount / rate if rate else 0.0 for amount, rate in rates)

    def _wait(self, began: int, seconds: float | None) -> None:
        if self._interruptions == began:
            self._changed.wait(seconds)
        if self._interruptions != began:
            raise Interrupted("interrupted while a request waited for its turn")


class Meter:
    """A DSPy engine around another: cache, budget, pace, retries and totals. Safe to call from threads."""

    def __init__(self, engine: Engine, *, source: str, cache_dir: Path | None, budget: Budget, limits: Limits):
        self.usage, self.budget, self.engine = Usage(), budget, engine
        self._source, self.limits = source, limits
        self._cache = _Cache(cache_dir)
        self._pace = Pace(limits)
        self._thinks = False  # an answer was cut off before it began: the next ones get more room from the start
        self._funds = threading.Condition()
        self._spent = self._cache.spent()
        self._reserved: dict[int, float] = {}  # one entry per request under way: its worst case in dollars

    def complete(self, request: "Request") -> "Response":
        """Answer from the cache, or buy the answer and store it.

        Raises `Unanswered` for a request that stays without a whole answer, `EndpointError` where no request would get
        one, and `BudgetExceeded`.
        """
        from dspy.lm15 import Message, Response
        from dspy.lm15 import Usage as Reported

        key = self.key(request)
        if (answer := self._cache.get(key)) is None:
            try:
                answer = self._buy(request, key)
            except Unanswered:
                self._count(unanswered=1)
                raise
        else:
            self._count(cached=1)
        text, finish_reason = answer
        if finish_reason == "length":
            self._count(unanswered=1)
            raise Unanswered("cut off", f"the answer is cut off at its token limit, also with more room: {text[:80]!r}")
        return Response(
            id=None, model=request.model, message=Message.assistant(text), finish_reason="stop", usage=Reported()
        )

    def interrupt(self) -> None:
        """Raise `Interrupted` in the threads whose requests wait; requests that are sent are answered and stored."""
        self._pace.interrupt()

    def key(self, request: "Request") -> str:
        """Content hash of a request: source, system text, messages and settings."""
        messages = [(message.role, message.text) for message in request.messages]
        content = [self._source, request.system, messages, asdict(request.config)]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def holds(self, request: "Request") -> bool:
        """Whether the cache holds the answer to a request."""
        return self._cache.get(self.key(request)) is not None

    def worst_case(self, request: "Request") -> float:
        """Upper bound of a request's price in dollars: one token a byte in, `max_tokens` out."""
        return self.budget.price(
            _bytes(request) + _PER_MESSAGE * (len(request.messages) + 1), request.config.max_tokens
        )

    # -- buying --

    def _buy(self, request: "Request", key: str) -> tuple[str, str]:
        """Buy an answer, once more with more room where it is cut off: text and finish reason."""
        room = request.config.max_tokens
        roomy = replace(request, config=replace(request.config, max_tokens=room and _MORE_ROOM * room))
        if room is None or self._thinks:
            response = self._attempts(roomy, key, last=True)
        else:
            response = self._attempts(request, key, last=False)
            if response.finish_reason == "length":
                self._thinks = self._thinks or not (response.text or "").strip()
                response = self._attempts(roomy, key, last=True)
        return response.text, response.finish_reason

    def _attempts(self, request: "Request", key: str, *, last: bool) -> "Response":
        """Ask until there is an answer.

        A rate limit, or an answer that does not come in time, counts as an attempt only while nobody else is answered.
        """
        jitter = random.Random(key)
        attempt, answered = 1, self.usage.requests
        while True:
            with self._pace.turn(estimated_tokens(request) + (request.config.max_tokens or 0)):
                try:
                    return self._attempt(request, key, last=last)
                except Unavailable as error:
                    fault = error
                waits = fault.retry_after is not None or isinstance(fault, Slow)
                if waits and self.usage.requests > answered:
                    attempt, answered = 1, self.usage.requests
                if attempt >= self.limits.attempts:
                    raise Unanswered("no answer", f"{fault} ({attempt} attempts)") from fault
                self._count(retries=1)
                pause = self.limits.backoff * 2 ** (attempt - 1) * jitter.uniform(0.5, 1.5)
                if fault.retry_after is not None:
                    self._pace.pause(fault.retry_after)
                    pause = fault.retry_after + min(fault.retry_after, 1.0) * jitter.random()  # not all at one moment
                if not isinstance(fault, Slow):
                    self._pace.rest(pause)  # with the turn taken: a server in trouble gets fewer requests
            if isinstance(fault, Slow):  # it may still be at work on what was given up: let it finish, and ask in turn
                self._pace.slow_down()
                self._pace.rest(pause)
            attempt += 1

    def _attempt(self, request: "Request", key: str, *, last: bool) -> "Response":
        """Send a request once; what it cost is on disk, and with it the answer unless a longer one is asked for."""
        ticket, usd = self._reserve(request), 0.0
        try:
            response = self.engine.complete(request)
            tokens = self._tokens(request, response)
            usd = self.budget.price(*tokens)
            if last or response.finish_reason != "length":
                self._cache.put(key, response.text or "", response.finish_reason, *tokens, usd)
            else:
                self._cache.charge(*tokens, usd)
        except Fault as error:
            if any(error.tokens):
                usd = self.budget.price(*error.tokens)
                self._cache.charge(*error.tokens, usd)
                self._count(input_tokens=error.tokens[0], output_tokens=error.tokens[1], usd=usd)
            raise
        finally:
            self._settle(ticket, usd)
        self._count(requests=1, input_tokens=tokens[0], output_tokens=tokens[1], usd=usd)
        self._pace.pause((response.provider_data or {}).get("pause", 0.0))
        return response

    def _tokens(self, request: "Request", response: "Response") -> tuple[int, int]:
        """Tokens in and out as the server counted them, estimated where it did not."""
        counted = (response.usage.input_tokens, response.usage.output_tokens)
        self._count(estimated=None in counted)
        guessed = (estimated_tokens(request), _estimated(len((response.text or "").encode())))
        return tuple(guess if known is None else known for known, guess in zip(counted, guessed, strict=True))

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

    def _settle(self, ticket: int, usd: float) -> None:
        with self._funds:
            del self._reserved[ticket]
            self._spent += usd
            self._funds.notify_all()

    def _count(self, **amounts: float) -> None:
        with self._funds:
            for name, amount in amounts.items():
                setattr(self.usage, name, getattr(self.usage, name) + amount)


def _bytes(request: "Request") -> int:
    return len((request.system or "").encode()) + sum(len((m.text or "").encode()) for m in request.messages)


def estimated_tokens(request: "Request") -> int:
    """About how many tokens a request's messages have."""
    return _estimated(_bytes(request))


def _estimated(size: int) -> int:
    return math.ceil(size / _BYTES_A_TOKEN)


class _Cache:
    """Answers on disk by content hash, in SQLite: an answer is committed before `put` returns, and survives a kill.

    `charges` holds what was paid for answers that are of no use.
    """

    def __init__(self, folder: Path | None):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        file = ":memory:" if folder is None else folder / "responses.sqlite"
        self._lock = threading.Lock()
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=30.0)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        paid = "input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, usd REAL NOT NULL"
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS responses "
            f"(key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT NOT NULL, {paid})"
        )
        self._db.execute(f"CREATE TABLE IF NOT EXISTS charges ({paid})")

    def get(self, key: str) -> tuple[str, str] | None:
        """Text and finish reason of a stored answer; an empty text with finish reason `stop` is none."""
        query = (
            "SELECT text, finish_reason FROM responses WHERE key = ? AND (trim(text) <> '' OR finish_reason <> 'stop')"
        )
        with self._lock:
            return self._db.execute(query, (key,)).fetchone()

    def put(self, key: str, text: str, finish_reason: str, input_tokens: int, output_tokens: int, usd: float) -> None:
        """Store an answer; what was paid for one that it replaces stays counted."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "INSERT INTO charges SELECT input_tokens, output_tokens, usd FROM responses WHERE key = ?", (key,)
            )
            self._db.execute(
                "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)",
                (key, text, finish_reason, input_tokens, output_tokens, usd),
            )

    def charge(self, input_tokens: int, output_tokens: int, usd: float) -> None:
        """Store what was paid for nothing."""
        with self._lock:
            self._db.execute("INSERT INTO charges VALUES (?, ?, ?)", (input_tokens, output_tokens, usd))

    def spent(self) -> float:
        """Dollars paid for everything that is stored."""
        query = "SELECT (SELECT COALESCE(SUM(usd), 0.0) FROM responses) + (SELECT COALESCE(SUM(usd), 0.0) FROM charges)"
        with self._lock:
            return self._db.execute(query).fetchone()[0]
