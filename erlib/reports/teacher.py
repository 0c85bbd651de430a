"""The frontier LM as a teacher: how it is connected, what its reports would cost, and the reports.

`connect` gives an ordinary `dspy.LM`. Its engine is a `Meter` (cache, budget, pace, retries) around the engine that
does the work: the simulated frontier, or an `Endpoint`, which reads the API key from the environment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from erlib.reports import extraction, prompts
from erlib.reports.endpoint import Endpoint
from erlib.reports.meter import Budget, Engine, Limits, Meter, Usage, estimated_tokens
from erlib.task import evaluation
from erlib.task.schema import Brief, Document, Exemplar, Parsed

if TYPE_CHECKING:
    import dspy


@dataclass(frozen=True)
class Connection:
    """How a frontier LM is asked."""

    api_base: str = ""  # URL of an OpenAI-compatible endpoint; empty: OpenAI's
    max_tokens: int = 1024  # longest answer
    temperature: float = 0.0  # the likeliest answer: reports are to be right, not varied
    structured: bool = False  # whether the endpoint is asked to keep to the JSON schema of a report
    budget: Budget = field(default_factory=Budget)
    limits: Limits = field(default_factory=Limits)


_USUAL = Connection()


def connection(params: Mapping[str, Any]) -> Connection:
    """The connection that a phase's parameters ask for (01 and 02 have them all)."""
    limits = Limits(
        concurrency=params["threads"],
        timeout=params["timeout"],
        attempts=params["attempts"],
        requests_per_minute=params["requests_per_minute"],
        tokens_per_minute=params["tokens_per_minute"],
        max_unanswered_share=params["max_unanswered_share"],
    )
    return Connection(
        api_base=params["api_base"],
        max_tokens=params["frontier_max_tokens"],
        temperature=params["frontier_temperature"],
        structured=params["structured"],
        budget=Budget(params["budget_usd"], params["price_in"], params["price_out"]),
        limits=limits,
    )


class Estimate(NamedTuple):
    """What a set of requests would buy: those not in the cache, their tokens, dollars expected and at worst."""

    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    usd: float
    usd_at_worst: float


def connect(
    model: str,
    *,
    engine: Engine | None = None,
    cache_dir: Path | None,
    connection: Connection = _USUAL,
) -> "dspy.LM":
    """Connect to a frontier LM: an engine of its own, or an OpenAI-compatible endpoint's model of that name.

    The cache's key holds the model's name, the endpoint's URL and the settings, but no engine's code or weights: for
    one that costs nothing, give `cache_dir=None`, and answers are kept in memory only.
    """
    import dspy

    schema = prompts.schema_of_reports() if connection.structured else None
    source = f"{model} {connection.api_base}" + (f" {prompts.schema_digest(schema)}" if schema else "")
    engine = engine or Endpoint(model, connection.api_base, timeout=connection.limits.timeout, schema=schema)
    meter = Meter(engine, source=source, cache_dir=cache_dir, budget=connection.budget, limits=connection.limits)
    settings = {"max_tokens": connection.max_tokens, "temperature": connection.temperature}
    # DSPy's own cache is a pickle keyed by the model's name, and its retries would not see the budget. It gets a name
    # that it does not know, because it has rules of its own for the settings of models that it knows.
    return dspy.LM("frontier", engine=meter, cache=False, num_retries=0, **settings)


def usage(lm: "dspy.LM") -> Usage:
    """What a connection has used so far."""
    return replace(lm.engine.usage)


def account(lm: "dspy.LM") -> str:
    """What a connection has used so far, and what its endpoint was not sent because it refused it."""
    adapted = str(getattr(lm.engine.engine, "dialect", ""))
    return f"{lm.engine.usage}" + (
        f"\nnot as the params have it, because the endpoint refuses that: {adapted}" if adapted else ""
    )


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
    tokens_in = sum(estimated_tokens(request) for request in new)
    tokens_out = output_tokens * len(new)
    worst = sum(meter.worst_case(request) for request in new)
    usd = meter.budget.price(tokens_in, tokens_out)
    return Estimate(len(new), len(requests) - len(new), tokens_in, tokens_out, usd, worst)


class Written(NamedTuple):
    """The documents that got a report, their reports in the same order, and one row for each document that got none."""

    documents: list[Document]
    reports: list[Parsed]
    rejects: list[dict[str, str]]  # id, reason, row: the start of the document


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
) -> Written:
    """Have the frontier write the report of every document, and write them to `path` (`evaluation.write_predictions`).

    A document that the frontier refuses, or answers with nothing that can be read, is a reject. Raises
    `extraction.TooManyUnanswered` where their share is above the limit of the connection. Resumes through the response
    cache: after a kill or a spent budget, the same call asks only for what is missing.
    """
    parsed = extraction.extract(lm, documents, template=template, demos=demos, form=form, threads=threads, brief=brief)
    answered = [(document, each) for document, each in zip(documents, parsed, strict=True) if extraction.readable(each)]
    rejects = [
        {"id": document.id, "reason": extraction.reason(each), "row": document.text[:300]}
        for document, each in zip(documents, parsed, strict=True)
        if not extraction.readable(each)
    ]
    extraction.refuse_too_many([reject["reason"] for reject in rejects], len(documents), lm)
    written = Written([document for document, _ in answered], [each for _, each in answered], rejects)
    evaluation.write_predictions(path, written.documents, written.reports)
    return written
