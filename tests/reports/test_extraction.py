"""Extraction through DSPy: one adapter for every LM, and any answer is a report with its defects."""

import pytest
from reading import BRIEF, GOLD, V5, Reader, connect

from erlib.reports import extraction
from erlib.task.forms import to_compact, to_json
from erlib.task.schema import Entity, Report


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
