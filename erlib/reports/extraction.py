"""Extraction through DSPy: one adapter from documents and exemplars to messages, and from any answer to a report.

One template serves prompting, training and serving: `ReportAdapter` makes the messages wherever an LM is asked.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import dspy
from dspy.utils.exceptions import AdapterParseError, LMUnexpectedError

from erlib.reports.prompts import Form, Template, as_sent
from erlib.task.evaluation import Evaluation, evaluated, refuse_overlap
from erlib.task.forms import ask, flatten, parse_compact, parse_json, short_prompt, to_compact, to_json
from erlib.task.schema import Brief, Document, Exemplar, Parsed, Report

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
            messages += [{"role": "user", "content": ask(document)}, {"role": "assistant", "content": report}]
        return [*messages, {"role": "user", "content": ask(text)}]

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

    The first error cancels what has not started and is raised as the engine raised it.
    """
    adapter = ReportAdapter(template, form)
    program = predictor([example(demo, adapter) for demo in demos])
    texts = [document.text for document in documents]
    return predict(program, lm, adapter, texts, threads=threads, brief=brief)


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

    def ask(text: str) -> Parsed:
        # DSPy keeps every message of every call by default: 10,000 long prompts in memory, unread.
        with dspy.context(lm=lm, adapter=adapter, disable_history=True, trace=None):
            try:
                answer = program(document=text).report
            except AdapterParseError:  # an empty answer never reaches `parse`
                answer = ""
            except LMUnexpectedError as error:  # DSPy's wrapping of an engine's own exception
                raise error.__cause__ or error from None
        return adapter.read(answer, document=text, brief=brief)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(ask, text) for text in texts]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
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
