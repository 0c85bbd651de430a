"""A brief, exemplars and a fake frontier that reads them, shared by the tests of prompts, selection and evaluation."""

import re

from erlib.reports import extraction, prompts
from erlib.task.forms import to_json
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
