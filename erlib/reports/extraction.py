"""Extraction through DSPy: one adapter from documents and exemplars to messages, and from any answer to a report.

One template serves prompting, training and serving: `ReportAdapter` makes the messages wherever an LM is asked.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TYPE_CHECKING, get_args

import dspy
from dspy.utils.exceptions import AdapterParseError, LMUnexpectedError

from erlib.reports.endpoint import Reason, Unanswered
from erlib.reports.meter import Limits
from erlib.reports.prompts import Form, Template, as_sent, enclosed
from erlib.task.answers import parse_json
from erlib.task.evaluation import Evaluation, evaluated, refuse_overlap
from erlib.task.forms import ask, flatten, parse_compact, short_prompt, to_compact, to_json
from erlib.task.schema import Brief, Defect, Document, Exemplar, Parsed, Report

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


class ReportAdapter(dspy.Adapter):
    """The one way from documents and exemplars to messages, and from an answer to a report.

    In DSPy's terms the signature is `document -> report`, both plain text; `parse` is total, because `read` lists
    whatever is wrong with an answer as defects.
    """

    def __init__(self, template: Template, form: Form = "json"):
        super().__init__()
        self.template = template
        self.form = form
        self.system = as_sent(template, form)

    def write(self, report: Report) -> str:
        """The text form of a report that this adapter asks for."""
        return to_json(report) if self.form == "json" else to_compact(report)

    def read(self, text: str, *, document: str | None = None, brief: Brief | None = None) -> Parsed:
        """Read any answer as a report with its defects."""
        parse = parse_json if self.form == "json" else parse_compact
        return parse(text, document=document, brief=brief)

    def messages(self, text: str, demos: Sequence[Exemplar] = ()) -> list[dict[str, str]]:
        """The messages that ask for the report of a document: system, two for each exemplar, the document."""
        shown = [(demo.document.text, self.write(demo.report)) for demo in demos]
        return self._messages(text, shown)

    def _messages(self, text: str, shown: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}]
        for document, report in shown:
            question = {"role": "user", "content": ask(enclosed(document))}
            messages += [question, {"role": "assistant", "content": report}]
        return [*messages, {"role": "user", "content": ask(enclosed(text))}]

    def format(self, signature: type[dspy.Signature], demos: list, inputs: dict) -> list[dict[str, str]]:
        """DSPy's entrance to `messages`; demos are examples with the fields `document` and `report`."""
        return self._messages(inputs["document"], [(demo["document"], demo["report"]) for demo in demos])

    def parse(self, signature: type[dspy.Signature], completion: str) -> dict[str, str]:
        """DSPy's exit: the answer as it is, for `read`."""
        return {"report": completion}


def example(exemplar: Exemplar, adapter: ReportAdapter) -> dspy.Example:
    """An exemplar as DSPy's trainer and predictor take it: id, document, report text."""
    fields = {"id": exemplar.document.id, "document": exemplar.document.text, "report": adapter.write(exemplar.report)}
    return dspy.Example(**fields).with_inputs("document")


# -- asking -------------------------------------------------------------------------------------------------------

GRACE = 3.0  # seconds that requests which are sent get to be answered and stored after an interruption


class TooManyUnanswered(RuntimeError):
    """More documents stay without an answer than the limit allows; the message has the first reasons."""


def extract(
    lm: dspy.LM,
    documents: Sequence[Document],
    *,
    template: Template,
    demos: Sequence[Exemplar] = (),
    form: Form = "json",
    threads: int = 8,
    brief: Brief | None = None,
) -> list[Parsed]:
    """Ask an LM for the report of every document, `threads` at a time; the result keeps the order of the documents.

    A document that stays unanswered has an empty report and one defect with the reason (see `readable`). Raises
    `TooManyUnanswered` where that happens to more than one of them and to a larger share than the LM's `Limits` allow.
    Any other error cancels what has not started and is raised as the engine raised it.
    """
    adapter = ReportAdapter(template, form)
    program = predictor([example(demo, adapter) for demo in demos])
    texts = [document.text for document in documents]
    return predict(program, lm, adapter, texts, threads=threads, brief=brief)


def readable(parsed: Parsed) -> bool:
    """Whether an answer is a report, if only in part or an empty one: there is one, and something of it can be read."""
    return parsed.valid or bool(parsed.report.entities)


def reason(parsed: Parsed) -> str:
    """Why an answer is not `readable`, its kind first: why none came, or the start of what cannot be read."""
    detail = parsed.defects[0].detail
    return detail if detail.startswith(get_args(Reason)) else f"unreadable: {detail[:300]}"


def predictor(demos: Sequence[dspy.Example] = ()) -> dspy.Predict:
    """The DSPy program `document -> report` that shows these demos."""
    program = dspy.Predict("document: str -> report: str")
    program.demos = list(demos)
    return program


def predict(
    program: dspy.Predict,
    lm: dspy.LM,
    adapter: ReportAdapter,
    texts: Sequence[str],
    *,
    threads: int,
    brief: Brief | None = None,
) -> list[Parsed]:
    """Run a DSPy program over texts; see `extract`."""
    unanswered: list[str] = []

    def ask(text: str) -> Parsed:
        # DSPy keeps every message of every call by default: 10,000 long prompts in memory, unread.
        with dspy.context(lm=lm, adapter=adapter, disable_history=True, trace=None):
            try:
                answer = program(document=text).report
            except AdapterParseError:  # an empty answer never reaches `parse`
                answer = ""
            except LMUnexpectedError as error:  # DSPy's wrapping of an engine's own exception
                if not isinstance(error.__cause__, Unanswered):
                    raise error.__cause__ or error from None
                reason = f"{error.__cause__.reason}: {error.__cause__}"
                unanswered.append(reason)
                refuse_too_many(unanswered, len(texts), lm)
                return Parsed(Report(), (Defect("unparsable", reason),))
        return adapter.read(answer, document=text, brief=brief)

    return _in_threads(ask, texts, threads, interrupt=getattr(lm.engine, "interrupt", lambda: None))


def refuse_too_many(reasons: Sequence[str], asked: int, lm: dspy.LM) -> None:
    """Raise `TooManyUnanswered` where more than one document, and a larger share than allowed, got no answer."""
    share = getattr(lm.engine, "limits", Limits()).max_unanswered_share
    if len(reasons) <= max(1, int(share * asked)):
        return
    kinds = Counter(reason.partition(":")[0] for reason in reasons)
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    first = "\n".join(dict.fromkeys(reasons[:3]))
    raise TooManyUnanswered(
        f"{len(reasons)} of {asked} documents got no answer that can be read ({counts}), more than "
        f"max_unanswered_share={share} of them. The first:\n{first}\nWhat was answered is kept: fix the cause, or "
        "raise `max_unanswered_share`, and run again."
    )


def _in_threads(
    work: Callable[[str], Parsed], texts: Sequence[str], threads: int, *, interrupt: Callable[[], None]
) -> list[Parsed]:
    """Do the work for every text, some at a time; the first error or an interruption leaves the rest undone.

    The threads are daemons: one that waits for a server must not keep an interrupted program from ending.
    """
    futures: list[Future[Parsed]] = [Future() for _ in texts]
    waiting = deque(zip(texts, futures, strict=True))

    def run() -> None:
        while True:
            try:
                text, future = waiting.popleft()
            except IndexError:
                return
            try:
                future.set_result(work(text))
            except BaseException as error:  # whoever waits for the result raises it
                future.set_exception(error)

    workers = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(texts)))]
    for worker in workers:
        worker.start()
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]
    except BaseException:
        waiting.clear()
        interrupt()
        deadline = time.monotonic() + GRACE
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        raise


def evaluate(
    lm: dspy.LM,
    exemplars: Sequence[Exemplar],
    *,
    template: Template,
    brief: Brief,
    demos: Sequence[Exemplar] = (),
    form: Form = "json",
    threads: int = 8,
) -> Evaluation:
    """Extract from the documents of exemplars and score against their reports; refuses demos that are scored."""
    refuse_overlap(demos, exemplars)
    documents = [exemplar.document for exemplar in exemplars]
    predicted = extract(lm, documents, template=template, demos=demos, form=form, threads=threads, brief=brief)
    return evaluated(exemplars, predicted, brief)


# -- tokens -------------------------------------------------------------------------------------------------------


def token_table(
    tokenizer: "PreTrainedTokenizerBase",
    exemplars: Sequence[Exemplar],
    *,
    template: Template,
    demos: Sequence[Exemplar],
    form: Form = "json",
) -> "pd.DataFrame":
    """Mean characters and tokens per document: the full and the short prompt, and both text forms of the report."""
    import pandas as pd

    adapter = ReportAdapter(template, form)
    texts = {
        "full prompt": [flatten(adapter.messages(e.document.text, demos)) for e in exemplars],
        "short prompt": [short_prompt(e.document.text) for e in exemplars],
        "report as JSON": [to_json(e.report) for e in exemplars],
        "report in compact form": [to_compact(e.report) for e in exemplars],
    }
    rows = [
        (name, sum(map(len, written)) / len(written), sum(map(len, tokenizer(written)["input_ids"])) / len(written))
        for name, written in texts.items()
    ]
    return pd.DataFrame(rows, columns=["text", "characters", "tokens"]).set_index("text")
