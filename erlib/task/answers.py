"""Read the JSON answers of LMs: what is plainly meant is taken, what had to be repaired is listed, nothing is guessed.

An answer may think first, repeat the format, or draft: the last whole report in it counts. What nearly keeps to the
form is repaired, each repair a defect of the kind `repaired`, which leaves the answer valid. Of an answer that breaks
off the complete items are kept, and it is unparsable.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import json_repair
from pydantic import BaseModel, ValidationError

from erlib.task.forms import collect, quote
from erlib.task.schema import Brief, Defect, Entity, Parsed, Relationship

_KEYS = ("entities", "relationships")
_COLUMNS: dict[str, tuple[type[BaseModel], tuple[str, str, str]]] = {
    "entities": (Entity, ("name", "type", "summary")),
    "relationships": (Relationship, ("source", "type", "target")),
}
_LONGEST_REPAIR = 20_000  # characters: a longer answer is no report, and repairing takes its time
_MOST_OBJECTS = 1_000  # that an answer is searched for
_DEEPEST = 3  # objects around a report


def parse_json(text: str, *, brief: Brief | None = None, document: str | None = None) -> Parsed:
    """Read any text as a JSON report; `forms.collect` has the defects that the report itself may have."""
    repairs: list[str] = []
    body = _spoken(text)
    found = _whole(body, repairs) or _repaired(body, repairs)
    unparsable: list[str] = []
    if found is None:
        unparsable.append(body[_beginning(body) :])
        found = {key: _complete_items(body, key) for key in _KEYS}
    elif found.get("entities") is None:
        unparsable.append(body)
    for key in found.keys() - {*_KEYS}:
        repairs.append(f"left out: {_dump({key: found[key]})}")
    rows = {key: list(_rows(found.get(key), key, unparsable, repairs)) for key in _KEYS}
    entities, relationships = _reconciled(rows["entities"], rows["relationships"], brief, repairs)
    report, defects = collect(entities, relationships, unparsable, brief=brief, document=document)
    return Parsed(report, (*defects, *(Defect("repaired", quote(repair)) for repair in sorted(repairs))))


# -- which part is the answer -------------------------------------------------------------------------------------

_THOUGHT = r"(?:think\w*|reason\w*|reflect\w*|scratchpad)"
_OPENS = re.compile(rf"<{_THOUGHT}>", re.IGNORECASE)
_CLOSES = re.compile(rf"</{_THOUGHT}>", re.IGNORECASE)
_NEXT_QUESTION = re.compile(r"^[ \t]*Document:[ \t]*$", re.MULTILINE)


def _spoken(text: str) -> str:
    """What an answer says after, or else before, it has thought, and before it goes on with a question of its own."""
    if _decoded(text.strip(), strict=True) is not None:
        return text.strip()  # nothing but JSON, whatever stands inside its texts
    ends = [0, *(match.end() for match in _CLOSES.finditer(text))]
    before = _before(_OPENS, text)
    after = _before(_OPENS, text[ends[-1] :])  # what begins to think again has not answered
    spoken = after if "{" in after or not before.strip() else before
    asked = _before(_NEXT_QUESTION, spoken)
    return asked.strip() if "{" in asked else spoken.strip()


def _before(mark: re.Pattern[str], text: str) -> str:
    found = mark.search(text)
    return text[: found.start()] if found else text


def _whole(body: str, repairs: list[str]) -> dict[str, Any] | None:
    """The last report that can be read whole, with its keys in the schema's case."""
    reports = []
    for found in _objects(body):
        if (report := _inside(found)) is not None:
            reports.append((report, report is not found))
    if not reports:
        return None
    report, wrapped = reports[-1]
    if len(reports) > 1:
        repairs.append(f"the last of {len(reports)} reports")
    if wrapped:
        repairs.append("taken out of the object around it")
    return _lowered(report, repairs)


def _objects(body: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text that stand in no other one."""
    position = 0
    for _ in range(_MOST_OBJECTS):
        position = body.find("{", position)
        if position < 0:
            return
        try:
            found, position = _DECODER.raw_decode(body, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        if isinstance(found, dict):
            yield found


def _inside(found: Any, depth: int = _DEEPEST) -> dict[str, Any] | None:
    """The report that an object is, or that one of its values is."""
    if not isinstance(found, dict):
        return None
    if any(str(key).strip().lower() in _KEYS for key in found):
        return found
    inner = [_inside(value, depth - 1) for value in found.values()] if depth else []
    return next((report for report in inner if report is not None), None)


def _lowered(found: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """The same with its keys in lower case, where that makes no two of them the same."""
    lowered = {str(key).strip().lower(): value for key, value in found.items()}
    if lowered.keys() == found.keys() or len(lowered) < len(found):
        return found
    repairs.append(f"keys in another case: {', '.join(sorted(found.keys() - lowered.keys()))}")
    return lowered


# -- what nearly is JSON ------------------------------------------------------------------------------------------

_STRING = r'"(?:\\.|[^"\\])*"'
_COMMA_BEFORE_END = re.compile(rf"({_STRING})|,(?=\s*[\]}}])", re.DOTALL)
_STRUCTURE = re.compile(rf"{_STRING}|'(?:\\.|[^'\\])*'|[{{}}\[\]]", re.DOTALL)


def _repaired(body: str, repairs: list[str]) -> dict[str, Any] | None:
    """The report of a text that is nearly JSON and comes to its end; None where it breaks off."""
    body = body[_beginning(body) :]
    if not body.startswith("{") or len(body) > _LONGEST_REPAIR:
        return None
    for how, candidate, strict in (
        ("a line break inside a text", body, False),
        ("a comma before a closing bracket", _COMMA_BEFORE_END.sub(lambda match: match[1] or "", body), False),
    ):
        found = _inside(_decoded(candidate, strict=strict))
        if found is not None:
            repairs.append(how)
            return _lowered(found, repairs)
    if not _balanced(body) or _says_a_key_twice(body):
        return None
    try:
        found = _inside(json_repair.loads(body, skip_json_loads=True))
    except (ValueError, RecursionError):
        return None
    if found is not None:
        repairs.append("JSON that was not written as JSON is")
        return _lowered(found, repairs)
    return None


_DUPLICATE = "duplicate key"


def _balanced(body: str) -> bool:
    """Whether every bracket outside of texts is closed, and the last one ends the text but for a code fence."""
    depth, end = 0, 0
    for match in _STRUCTURE.finditer(body):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match[0], 0)
        if depth == 0 and match[0] in "}]":
            end = match.end()
            break
    return end > 0


def _beginning(body: str) -> int:
    """Where the first object begins that names a key of the schema, else 0."""
    opening = re.search(r"""\{\s*["']?(?:entities|relationships)["']?\s*:""", body, re.IGNORECASE)
    return opening.start() if opening else max(0, body.find("{"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that says a key twice: Python would keep the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(_DUPLICATE)
    return found


def _says_a_key_twice(body: str) -> bool:
    try:
        _LOOSE.raw_decode(body)
    except (ValueError, RecursionError) as error:
        return str(error) == _DUPLICATE
    return False


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_LOOSE = json.JSONDecoder(object_pairs_hook=_unique, strict=False)


def _decoded(text: str, *, strict: bool) -> dict[str, Any] | None:
    """The object that a text begins with (is, where strict); None where it does not."""
    try:
        found, end = (_DECODER if strict else _LOOSE).raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and (end == len(text) or not strict) else None


# -- items --------------------------------------------------------------------------------------------------------

_BETWEEN_ITEMS = re.compile(r"\s*,?\s*")


def _complete_items(body: str, key: str) -> list[Any]:
    """The items of the list under `key` that can be read before the text breaks off or turns wrong."""
    items: list[Any] = []
    opening = re.search(rf'"{key}"\s*:\s*\[\s*', body)
    position = opening.end() if opening else len(body)
    while position < len(body):
        try:
            item, position = _LOOSE.raw_decode(body, position)
        except (ValueError, RecursionError):
            break
        items.append(item)
        position = _BETWEEN_ITEMS.match(body, position).end()
    return items


def _rows(found: Any, key: str, unparsable: list[str], repairs: list[str]) -> Iterator[tuple[str, str, str]]:
    """The items of a list as rows; what is none goes to `unparsable`, and its neighbours stay."""
    record, columns = _COLUMNS[key]
    for item in found if isinstance(found, list) else [] if found is None else [found]:
        try:
            fields = record.model_validate(_tidied(item, key, repairs) if isinstance(item, dict) else item)
        except ValidationError:
            unparsable.append(_dump(item))
            continue
        yield tuple(getattr(fields, column) for column in columns)


def _tidied(item: dict[str, Any], key: str, repairs: list[str]) -> dict[str, Any]:
    """An item without what the schema does not have, and with texts where it has texts."""
    known = _COLUMNS[key][1]
    item = _lowered(item, repairs)
    for extra in sorted(map(str, item.keys() - {*known})):
        repairs.append(f"left out of an item: {extra}")
    kept = {name: value for name, value in item.items() if name in known}
    if "summary" in kept and not isinstance(kept["summary"], str):
        kept["summary"] = _as_text(kept["summary"], repairs)
    return kept


def _as_text(value: Any, repairs: list[str]) -> Any:
    """A summary that was written as none, as a list of facts, or as a number."""
    if value is None:
        repairs.append("a summary of null")
        return ""
    if isinstance(value, list) and all(isinstance(fact, str) for fact in value):
        repairs.append("a summary as a list")
        return "; ".join(value)
    if isinstance(value, int | float):
        repairs.append("a summary as a number")
        return str(value)
    return value


Rows = list[tuple[str, str, str]]


def _reconciled(entities: Rows, relationships: Rows, brief: Brief | None, repairs: list[str]) -> tuple[Rows, Rows]:
    """Types as the brief writes them and ends as the entities are named, where only case and white space differ."""
    names = [name for name, _, _ in entities]
    kinds = [kind.type for kind in brief.entities] if brief else []
    links = [kind.type for kind in brief.relationships] if brief else []
    entities = [(name, _same(kind, kinds, "a type", repairs), summary) for name, kind, summary in entities]
    linked = []
    for source, kind, target in relationships:
        ends = [_same(end, names, "an end", repairs) for end in (source, target)]
        linked.append((ends[0], _same(kind, links, "a type", repairs), ends[1]))
    return entities, linked


def _same(text: str, known: list[str], what: str, repairs: list[str]) -> str:
    """The one known text that differs from this one in case and white space at most; else the text itself."""
    if text in known:
        return text
    near = {other for other in known if _plain(other) == _plain(text)}
    if len(near) != 1:
        return text
    repairs.append(f"{what} in another case: {text}")
    return near.pop()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _dump(item: Any) -> str:
    try:
        return json.dumps(item, ensure_ascii=False)
    except RecursionError:
        return "(nested too deeply)"
