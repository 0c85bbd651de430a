"""Extraction through DSPy: one adapter for every LM, and any answer is a report with its defects."""

import re

import pytest

from erlib.reports import extraction, prompts
from erlib.task.forms import to_compact, to_json
from erlib.task.schema import Brief, Document, Entity, Exemplar, Kind, Relationship, Report

BRIEF = Brief(
    client="Quay Desk",
    purpose="It watches firms.",
    summaries="Money first, then size.",
    entities=(
        Kind(type="firm", description="A firm.", example="Ardox"),
        Kind(type="outlet", description="A newspaper.", example="Daily Reed", wanted=False),
    ),
    relationships=(
        Kind(type="bought", description="One bought the other.", example="A bought B", source="firm", target="firm"),
        Kind(type="sued", description="One sued the other.", example="A sued B"),
        Kind(type="allied", description="They work together.", example="A and B", symmetric=True),
        Kind(type="read_by", description="Who reads it.", example="read by all", wanted=False),
    ),
)
VERBS = ("bought", "sued", "allied")


def exemplar(number: int, verb: str | None = None) -> Exemplar:
    verb = verb or VERBS[number % 3]
    a, b = f"Ardox{number}", f"Belum{number}"
    entities = (Entity(name=a, type="firm", summary="$5M; 12 staff"), Entity(name=b, type="firm"))
    report = Report(entities=entities, relationships=(Relationship(source=a, target=b, type=verb),))
    return Exemplar(document=Document(id=f"gold-{number:03}", text=f"{a} {verb} {b}, says Daily Reed."), report=report)


GOLD = [exemplar(number) for number in range(30)]
# One exemplar of each type hidden among twenty of the first: only a search finds all three.
POOL = [exemplar(100 + i, "bought") for i in range(20)] + [exemplar(120, "sued"), exemplar(121, "allied")]


class Reader:
    """A fake frontier: reports relationship types that its demos show, and the outlet unless told to leave it out."""

    def __init__(self, answer: str | None = None):
        self.answer, self.requests = answer, []

    def complete(self, request):
        from dspy.lm15 import Message, Response, Usage

        self.requests.append(request)
        text = self.answer if self.answer is not None else self.report(request)
        return Response(id=None, model="fake", message=Message.assistant(text), finish_reason="stop", usage=Usage())

    def report(self, request) -> str:
        a, verb, b = re.search(r"Document:\n(\w+) (\w+) (\w+)", request.messages[-1].text).groups()
        shown = "".join(message.text for message in request.messages if message.role == "assistant")
        entities = [Entity(name=a, type="firm", summary="12 staff"), Entity(name=b, type="firm")]
        if "Leave out" not in request.system:
            entities.append(Entity(name="Daily Reed", type="outlet"))
        links = [Relationship(source=a, target=b, type=verb)] if verb in shown else []
        return to_json(Report(entities=tuple(entities), relationships=tuple(links)))


def connect(engine) -> "extraction.dspy.LM":
    return extraction.dspy.LM("fake", engine=engine, cache=False, num_retries=0)


V1, *_, V5 = prompts.templates(BRIEF)


@pytest.mark.parametrize("form", ["json", "compact"])
def test_messages_alternate_and_end_with_the_document(form):
    messages = extraction.ReportAdapter(V5, form).messages("Some text", GOLD[:2])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[-1]["content"] == "Document:\nSome text\nReport:"
    write = to_json if form == "json" else to_compact
    assert messages[2]["content"] == write(GOLD[0].report)


def test_the_lm_gets_exactly_the_messages_of_the_adapter():
    engine = Reader()
    extraction.extract(connect(engine), [GOLD[5].document], template=V5, demos=GOLD[:2], threads=1)
    request = engine.requests[0]
    turns = [("system", request.system), *((message.role, message.text) for message in request.messages)]
    asked = extraction.ReportAdapter(V5).messages(GOLD[5].document.text, GOLD[:2])
    assert turns == [(message["role"], message["content"]) for message in asked]


def test_extraction_keeps_the_order_of_documents_under_threads():
    parsed = extraction.extract(connect(Reader()), [e.document for e in GOLD], template=V5, threads=8, brief=BRIEF)
    assert [p.report.entities[0].name for p in parsed] == [e.report.entities[0].name for e in GOLD]


@pytest.mark.parametrize("answer", ["", " ", "no report today", '{"entities": [', "\u2028\x00", "[]"])
def test_any_answer_gives_a_report_and_its_defects(answer):
    parsed = extraction.extract(connect(Reader(answer)), [GOLD[0].document], template=V5, brief=BRIEF)[0]
    assert parsed.report == Report() and not parsed.valid


def test_ungrounded_names_and_unknown_types_are_listed():
    answer = to_json(Report(entities=(Entity(name="Elsewhere", type="firm"), Entity(name="Daily Reed", type="planet"))))
    parsed = extraction.extract(connect(Reader(answer)), [GOLD[0].document], template=V5, brief=BRIEF)[0]
    assert {defect.kind for defect in parsed.defects} == {"ungrounded", "unknown_type"}


def test_an_error_of_the_engine_reaches_the_caller_and_cancels_the_rest():
    class Broken:
        calls = 0

        def complete(self, request):
            self.calls += 1
            raise LookupError("unknown document")

    engine = Broken()
    with pytest.raises(LookupError, match="unknown document"):
        extraction.extract(connect(engine), [e.document for e in GOLD] * 20, template=V5, threads=2)
    assert engine.calls < 300


def test_token_table_measures_what_the_short_prompt_saves():
    def tokenizer(texts: list[str]) -> dict[str, list[list[str]]]:
        return {"input_ids": [text.split() for text in texts]}

    table = extraction.token_table(tokenizer, GOLD[:4], template=V5, demos=GOLD[4:6])
    assert table.loc["short prompt", "tokens"] == 8 and table.loc["full prompt", "tokens"] > 50
    assert table.loc["report in compact form", "characters"] < table.loc["report as JSON", "characters"]
