"""The text forms of questions and reports: the short prompt, compact lines, JSON.

A report is written as JSON (frontier LM, files) or in a compact line form (local LM, fewer tokens):

    Name|type|summary            one line per entity; the last field is left out when the summary is empty
    >relationship|Target         one line per relationship, below the entity it starts from
    none                         the report of a document with nothing to find

Both forms round-trip without loss. `parse_compact` and `answers.parse_json` are total: any text gives a report and the
list of its defects, because model output is untrusted.
"""

import json
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from erlib.task.schema import Brief, Defect, Entity, Parsed, Relationship, Report

EMPTY = "none"


def ask(text: str) -> str:
    """Word the question about a document, the same in pre-training, prompts and serving; the report is the answer."""
    return f"Document:\n{text}\nReport:"


# -- compact form -------------------------------------------------------------------------------------------------

_ESCAPES = {"\\": "\\\\", "|": "\\|", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {"\\": "\\", "|": "|", "n": "\n", "r": "\r", ">": ">"}


def _escape(field: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in field)


def _fields(line: str) -> list[str]:
    """Split a line at unescaped bars and undo the escapes; an unknown escape keeps its backslash."""
    fields, current, characters = [], [], iter(line)
    for character in characters:
        if character == "|":
            fields.append("".join(current))
            current = []
        elif character == "\\":
            following = next(characters, "")
            current.append(_UNESCAPES.get(following, "\\" + following))
        else:
            current.append(character)
    return [*fields, "".join(current)]


def to_compact(report: Report) -> str:
    """Write a report in the compact line form."""
    if not report.entities:
        return EMPTY
    below: dict[str, list[str]] = {}
    for relationship in report.relationships:
        line = f">{_escape(relationship.type)}|{_escape(relationship.target)}"
        below.setdefault(relationship.source, []).append(line)
    lines = []
    for entity in report.entities:
        name = _escape(entity.name)
        line = ("\\" + name if name.startswith(">") else name) + "|" + _escape(entity.type)
        lines.append(f"{line}|{_escape(entity.summary)}" if entity.summary else line)
        lines += below.get(entity.name, [])
    return "\n".join(lines)


def parse_compact(text: str, *, brief: Brief | None = None, document: str | None = None) -> Parsed:
    """Read any text as a compact report; see `collect` for the defects."""
    entities: list[tuple[str, str, str]] = []
    relationships: list[tuple[str, str, str]] = []
    unparsable: list[str] = []
    source = ""  # the entity that relationship lines belong to; empty below a line that could not be read
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    for line in lines if lines != [EMPTY] else []:
        related = line.startswith(">")
        fields = [field.strip() for field in _fields(line[1:] if related else line)]
        if related and source and len(fields) == 2 and all(fields):
            relationships.append((source, fields[0], fields[1]))
        elif not related and len(fields) in (2, 3) and all(fields[:2]):
            entities.append((fields[0], fields[1], fields[2] if len(fields) == 3 else ""))
            source = fields[0]
        else:
            unparsable.append(line)
            source = source if related else ""
    if not lines:
        unparsable.append(text)
    return collect(entities, relationships, unparsable, brief=brief, document=document)


# -- JSON form ----------------------------------------------------------------------------------------------------


def to_json(report: Report) -> str:
    """Write a report as one line of JSON, in the order and with the keys of the schema."""
    return json.dumps(report.model_dump(), ensure_ascii=False, separators=(", ", ": "))


def collect(
    entities: list[tuple[str, str, str]],
    relationships: list[tuple[str, str, str]],
    unparsable: list[str],
    *,
    brief: Brief | None,
    document: str | None,
) -> Parsed:
    """Build the report from raw `(name, type, summary)` and `(source, type, target)` rows, and list the defects.

    Left out of the report: unparsable text, lone surrogates, duplicates (the first one stays), relationships with a
    missing end. Kept but listed: types that the brief does not name (wanted or not), and names that do not occur in the
    document. A defect quotes at most 500 characters.
    """
    defects = [Defect("unparsable", line) for line in unparsable]
    known_entities = {kind.type for kind in brief.entities} if brief else None
    known_relationships = {kind.type for kind in brief.relationships} if brief else None
    kept: dict[str, Entity] = {}
    for name, kind, summary in entities:
        try:
            entity = Entity(name=name, type=kind, summary=summary)
        except ValidationError:
            defects.append(Defect("unparsable", "|".join((name, kind, summary))))
            continue
        if entity.name in kept:
            defects.append(Defect("duplicate", entity.name))
            continue
        kept[entity.name] = entity
        if known_entities is not None and entity.type not in known_entities:
            defects.append(Defect("unknown_type", entity.type))
        if document is not None and entity.name not in document:
            defects.append(Defect("ungrounded", entity.name))
    linked: dict[tuple[str, str, str], Relationship] = {}
    for source, kind, target in relationships:
        try:
            relationship = Relationship(source=source, type=kind, target=target)
        except ValidationError:
            defects.append(Defect("unparsable", "|".join((source, kind, target))))
            continue
        missing = [end for end in (relationship.source, relationship.target) if end not in kept]
        if missing:
            defects.append(Defect("missing_entity", missing[0]))
        elif relationship.key in linked:
            defects.append(Defect("duplicate", " ".join(relationship.key)))
        else:
            linked[relationship.key] = relationship
            if known_relationships is not None and relationship.type not in known_relationships:
                defects.append(Defect("unknown_type", relationship.type))
    report = Report(entities=tuple(kept.values()), relationships=tuple(linked.values()))
    return Parsed(report, tuple(Defect(defect.kind, quote(defect.detail)) for defect in defects))


def quote(text: str, limit: int = 500) -> str:
    """The start of a text, with lone surrogates written out, so that a defect can always be saved as UTF-8."""
    return text[:limit].encode("utf-8", "backslashreplace").decode()


def short_prompt(text: str) -> str:
    """The pared-back prompt of the fine-tuned LM: the question alone, without the brief, and a newline."""
    return f"{ask(text)}\n"


def flatten(messages: Sequence[Mapping[str, str]]) -> str:
    r"""Write chat messages as plain text for an LM without a chat template; it ends with `Report:\n`."""
    ends = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}
    return "".join(message["content"] + ends[message["role"]] for message in messages)
