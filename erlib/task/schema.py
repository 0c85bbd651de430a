"""Records that every phase exchanges: documents, reports, exemplars, the brief.

A `Report` is what a model extracts from one `Document`: entities, each with a short summary, and relationships between
them. `forms` writes and reads it as text.
"""

from collections import Counter
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator


def _encodable(value: str) -> str:
    """Refuse lone surrogates: they cannot be written as UTF-8 and crash tokenizers."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate at character {error.start}") from None
    return value


def _filled(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


# pydantic strips fewer characters than `str.strip`, which the parsers use; the round trip needs one rule for both.
Text = Annotated[str, AfterValidator(_encodable), AfterValidator(str.strip)]
Name = Annotated[Text, AfterValidator(_filled)]
ASPECTS = ("entities", "relationships", "summaries")  # what annotators compare two reports by
_STRICT = ConfigDict(extra="forbid", frozen=True)


class Document(BaseModel):
    """One cleaned document; `group` names the story or component that must stay on one side of a split."""

    model_config = _STRICT
    id: Name
    text: Annotated[str, AfterValidator(_encodable), AfterValidator(_filled)]
    date: str | None = None
    source: str | None = None
    group: str | None = None


class Entity(BaseModel):
    """A named thing as the document writes it; `summary` holds its salient facts, separated by `; `."""

    model_config = _STRICT
    name: Name
    type: Name
    summary: Text = ""

    @property
    def facts(self) -> tuple[str, ...]:
        """The salient facts: the clauses of the summary."""
        return tuple(clause for part in self.summary.split(";") if (clause := part.strip()))


class Relationship(BaseModel):
    """A directed relationship between two entities of the same report, by name."""

    model_config = _STRICT
    source: Name
    target: Name
    type: Name

    @property
    def key(self) -> tuple[str, str, str]:
        return self.source, self.type, self.target


class Report(BaseModel):
    """Entities and relationships of one document, in canonical order.

    Entity names are unique; both ends of a relationship are entities of the report; relationships are unique and
    ordered by the position of their source (a stable sort), which is the order of the compact form.
    """

    model_config = _STRICT
    entities: tuple[Entity, ...] = ()
    relationships: tuple[Relationship, ...] = ()

    @model_validator(mode="after")
    def _canonical(self) -> "Report":
        position = {entity.name: index for index, entity in enumerate(self.entities)}
        if len(position) < len(self.entities):
            repeated = [name for name, n in Counter(e.name for e in self.entities).items() if n > 1]
            raise ValueError(f"entity names must be unique; repeated: {repeated}")
        for relationship in self.relationships:
            for end in (relationship.source, relationship.target):
                if end not in position:
                    raise ValueError(f"relationship end {end!r} is not an entity of the report")
        if len({r.key for r in self.relationships}) < len(self.relationships):
            raise ValueError("relationships must be unique")
        ordered = tuple(sorted(self.relationships, key=lambda r: position[r.source]))
        if ordered != self.relationships:
            object.__setattr__(self, "relationships", ordered)
        return self


class Exemplar(BaseModel):
    """A document with its hand-corrected report; `split` names the part it is kept for, such as `fresh`."""

    model_config = _STRICT
    document: Document
    report: Report
    split: Name | None = None


class Kind(BaseModel):
    """One kind of entity or relationship that the client wants, or does not want, reported."""

    model_config = _STRICT
    type: Annotated[str, StringConstraints(pattern=r"^\w([\w .-]*\w)?$")]
    description: Name
    example: Name
    wanted: bool = True
    source: Name | None = None
    target: Name | None = None
    symmetric: bool = False


class Brief(BaseModel):
    """The client's brief: what to report, what to leave out, and how to write summaries."""

    model_config = _STRICT
    client: Name
    purpose: Name
    summaries: Name
    entities: tuple[Kind, ...] = Field(min_length=1)
    relationships: tuple[Kind, ...] = ()  # none: a corpus of entities alone

    @model_validator(mode="after")
    def _consistent(self) -> "Brief":
        for name, kinds in (("entities", self.entities), ("relationships", self.relationships)):
            wanted = Counter(kind.type for kind in kinds if kind.wanted)
            if kinds and not wanted:
                raise ValueError(f"{name}: at least one kind must be wanted")
            if repeated := [kind for kind, n in wanted.items() if n > 1]:
                raise ValueError(f"{name}: each wanted type is stated once; repeated: {repeated}")
        known = {kind.type for kind in self.entities}
        for kind in self.relationships:
            if unknown := {kind.source, kind.target} - known - {None}:
                raise ValueError(f"relationships: an end of {kind.type!r} is no entity type: {sorted(unknown)}")
        return self

    @property
    def entity_types(self) -> frozenset[str]:
        return frozenset(kind.type for kind in self.entities if kind.wanted)

    @property
    def relationship_types(self) -> frozenset[str]:
        return frozenset(kind.type for kind in self.relationships if kind.wanted)

    @property
    def symmetric_types(self) -> frozenset[str]:
        return frozenset(kind.type for kind in self.relationships if kind.symmetric)


class Defect(NamedTuple):
    """One fault found in model output; `detail` quotes the offending text. What was `repaired` is no fault any more."""

    kind: Literal["unparsable", "unknown_type", "missing_entity", "duplicate", "ungrounded", "repaired"]
    detail: str


class Parsed(NamedTuple):
    """What could be read from model output: a valid report and the defects that were met on the way."""

    report: Report
    defects: tuple[Defect, ...]

    @property
    def valid(self) -> bool:
        """True when nothing was unparsable: the parse-valid rate counts these."""
        return not any(defect.kind == "unparsable" for defect in self.defects)
