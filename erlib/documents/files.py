"""Read documents that nobody vouches for, and the files that a client writes by hand: gold exemplars and the brief.

A new file format is one more generator of rows in `_rows`. Nothing is dropped without a word: a row of the input
becomes a document or a line of `rejects` that says why.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from erlib.documents.corpus import clean
from erlib.documents.delimited import csv_rows, missing_column
from erlib.task.forms import collect
from erlib.task.jsonl import BadRow, Row, encoding_of, read_jsonl, rows
from erlib.task.schema import Brief, Document, Exemplar, Report

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


class TooManyRejects(ValueError):
    """More of the input was rejected than the limit allows; the message names the reasons and the file."""


def read_documents(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    rejects: str | Path,
    text_column: str = "text",
    id_column: str = "id",
    max_chars: int = 20_000,
    max_reject_share: float = 0.05,
    limit: int | None = None,
) -> list[Document]:
    """Read and clean documents from JSONL, CSV or Parquet, `hf:NAME[:SPLIT]` of the datasets library, or mappings.

    Rows are read one at a time and blank lines are no rows. A row without id gets `row-NUMBER`; `date`, `source` and
    `group` are kept where they are given, other columns are left out. Rejected rows go to `rejects` (JSONL: line,
    reason, start of the row). Stops after `limit` documents. Raises `TooManyRejects` when more than `max_reject_share`
    of the rows read were rejected, and `ValueError` when there is no row at all.
    """
    documents: list[Document] = []
    reasons: list[str] = []
    first_with: dict[str, tuple[int, str]] = {}
    with open(rejects, "w", encoding="ascii") as file:  # json.dumps escapes the rest: a row may hold anything
        for row in _rows(source, text_column, id_column):
            if len(documents) == limit:
                break
            try:
                document = _document(row, text_column, id_column, max_chars)
                _check_new(document, row.number, first_with)
                documents.append(document)
            except BadRow as error:
                reasons.append(str(error))
                file.write(json.dumps({"line": row.number, "reason": str(error), "row": _shown(row)}) + "\n")
    name = source if isinstance(source, str | Path) else type(source).__name__
    read = len(documents) + len(reasons)
    if read == 0:
        raise ValueError(f"{name}: holds no documents")
    if len(reasons) > max_reject_share * read:
        kinds = Counter(re.sub(r"(?<=id )'.*'|(?<![\w-])\d[\d,]*", "…", reason) for reason in reasons)
        common = "; ".join(f"{n} × {kind}" for kind, n in kinds.most_common(3))
        raise TooManyRejects(
            f"{name}: {len(reasons)} of {read} rows were rejected, more than max_reject_share={max_reject_share}. Most "
            f"often: {common}. First: {reasons[0]}. All are in {rejects}; fix the input, set text_column and "
            f"id_column to names that it has, or raise max_reject_share."
        )
    return documents


def _shown(row: Row) -> str:
    """The start of a row, for its line among the rejects."""
    return (row.raw or repr(dict(row.fields or {})))[:300]


def _rows(source: str | Path | Iterable[Mapping[str, Any]], text_column: str, id_column: str) -> Iterator[Row]:
    if not isinstance(source, str | Path):
        return (Row(number, fields) for number, fields in enumerate(source, start=1))
    if str(source).startswith("hf:"):
        return _dataset_rows(str(source))
    path = Path(source)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"{path}: documents are read from {', '.join(SUFFIXES)} or hf:NAME[:SPLIT]")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of documents")
    if kind in (".jsonl", ".ndjson"):
        _refuse_array(path)
        return rows(path)
    if kind == ".parquet":
        return _parquet_rows(path, text_column, id_column)
    return csv_rows(path, text_column=text_column, id_column=id_column)


def _refuse_array(path: Path) -> None:
    """Tell a file that is one JSON array from a file of JSON lines: read as lines, every one of its rows is bad."""
    with open(path, encoding=encoding_of(path), errors="replace") as file:
        if re.match(r"\s*\[\s*\{", file.read(1000)):
            raise ValueError(
                f"{path}: this is one JSON array, and documents are read one JSON object a line; "
                f"`jq -c '.[]' {path.name} > documents.jsonl` turns it into such lines"
            )


def _parquet_rows(path: Path, text_column: str, id_column: str) -> Iterator[Row]:
    """Read the columns that make a document, and no other: what nobody reads may hold anything."""
    import pyarrow.lib
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        known = file.schema_arrow.names
        if text_column not in known:
            raise ValueError(missing_column(str(path), text_column, known))
        wanted = [name for name in dict.fromkeys((text_column, id_column, *_OPTIONAL)) if name in known]
        for batch in file.iter_batches(batch_size=1_000, columns=wanted):
            columns = [_values(batch.column(name)) for name in batch.schema.names]
            for values in zip(*columns, strict=True):
                number += 1
                fields = dict(zip(batch.schema.names, values, strict=True))
                faults = [f"{name!r} cannot be read: {value}" for name, value in fields.items() if _is_fault(value)]
                yield Row(number, None, faults[0]) if faults else Row(number, fields)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read, after {number} rows: {error}") from error


def _is_fault(value: Any) -> bool:
    return isinstance(value, Exception)


def _values(column: Any) -> list[Any]:
    """The values of an Arrow column; in place of one that cannot be converted, such as the year 10000, its error."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, TypeError):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, TypeError) as error:
        return error


def _dataset_rows(name: str) -> Iterator[Row]:
    """Rows of `hf:NAME[:SPLIT]`; NAME is a hub name or a local folder, SPLIT is train unless given."""
    import datasets

    dataset, _, split = name.removeprefix("hf:").partition(":")
    rows = datasets.load_dataset(dataset, split=split or "train", streaming=True)
    return (Row(number, fields) for number, fields in enumerate(rows, start=1))


def _document(row: Row, text_column: str, id_column: str, max_chars: int) -> Document:
    if row.reason:
        raise BadRow(row.reason)
    if text_column not in row.fields:
        raise BadRow(f"no column {text_column!r}, only {list(row.fields)[:8]}")
    text, given = row.fields[text_column], row.fields.get(id_column)
    if not isinstance(text, str):
        raise BadRow(f"{text_column!r} is {'empty' if _missing(text) else type(text).__name__}, not text")
    if len(text) > max_chars:  # checked before cleaning, which may be slow on hostile text
        raise BadRow(f"text of {len(text):,} characters, more than max_chars={max_chars:,}")
    text, identifier = clean(text), _identifier(given, row.number, id_column)
    if not text:
        raise BadRow(f"{text_column!r} is empty after cleaning")
    return Document(id=identifier, text=text, **{key: _optional(row.fields.get(key)) for key in _OPTIONAL})


def _identifier(given: Any, number: int, id_column: str) -> str:
    """The id of a row: what is given, as text, or the row's number where nothing is."""
    if _missing(given):
        return f"row-{number}"
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise BadRow(f"{id_column!r} is {type(given).__name__}, neither text nor a whole number")
    identifier = clean(str(given))
    if not identifier:
        raise BadRow(f"{id_column!r} is empty after cleaning")
    return identifier


_OPTIONAL = ("date", "source", "group")


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)  # tables write NaN for none


def _optional(value: Any) -> str | None:
    if _missing(value):
        return None
    return clean(value.isoformat() if hasattr(value, "isoformat") else str(value)) or None


def _check_new(document: Document, number: int, first_with: dict[str, tuple[int, str]]) -> None:
    first, text = first_with.setdefault(document.id, (number, document.text))
    if first != number:
        texts = "the same text" if text == document.text else "another text"
        raise BadRow(f"id {document.id!r} again, {texts} as in row {first}")


def read_splits(path: str | Path) -> dict[str, list[Document]]:
    """Read the documents that phase 02 wrote, by their split: train, validation and test."""
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for row in read_jsonl(path):
        splits[row.pop("split")].append(Document(**row))
    return splits


def numbered_documents(
    path: str | Path, *, text_column: str = "text", id_column: str = "id", max_chars: int = 1_000_000, after: int = 0
) -> Iterator[tuple[int, Document | None, str, str]]:
    """Read and clean the documents after row `after` of a file of any size, one at a time.

    Yields row number, document or None, why there is none, and the start of a bad row. Unlike `read_documents` it
    remembers nothing: an id may come again.
    """
    for row in _rows(path, text_column, id_column):
        if row.number <= after:
            continue
        try:
            yield row.number, _document(row, text_column, id_column, max_chars), "", ""
        except BadRow as error:
            yield row.number, None, str(error), _shown(row)


def read_gold(path: str | Path) -> list[Exemplar]:
    """Read gold exemplars from JSONL: `{"document", "report", "split"}`, or flat `{"id", "text", "entities",
    "relationships"}` with the other fields of a document and `split` where they are known.

    Texts are cleaned as documents are, and names with them. Raises `ValueError` with file, line and field of every
    fault: a record that does not fit the schema, an id or a text that occurs twice, an entity name that does not occur
    in the text.
    """
    exemplars: list[Exemplar] = []
    faults: list[str] = []
    seen: dict[str, int] = {}
    for row in rows(Path(path)):
        try:
            exemplar = _exemplar(row)
        except ValidationError as error:
            faults += [f"{path}:{row.number}: {_place(fault)}{fault['msg']}" for fault in error.errors()]
            continue
        except BadRow as error:
            faults.append(f"{path}:{row.number}: {error}")
            continue
        document = exemplar.document
        for key, value in (("id", document.id), ("text", document.text)):
            if (first := seen.setdefault(f"{key} {value}", row.number)) != row.number:
                faults.append(f"{path}:{row.number}: the {key} {value[:60]!r} is already in line {first}")
        faults += [
            f"{path}:{row.number}: entity {entity.name!r} does not occur in the text; copy its name from there"
            for entity in exemplar.report.entities
            if entity.name not in document.text
        ]
        exemplars.append(exemplar)
    if faults:
        more = f"\n… and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError("\n".join(faults[:20]) + more)
    if not exemplars:
        raise ValueError(f"{path}: holds no exemplars")
    return exemplars


class Labels(NamedTuple):
    """What rows of documents say is in them, by the document's id, and how much of it was left out, by reason."""

    exemplars: dict[str, Exemplar]
    left_out: dict[str, int]


def read_labels(
    path: str | Path, documents: Sequence[Document], *, text_column: str = "text", id_column: str = "id"
) -> Labels:
    """Read the labels of documents from the JSONL that they came from: `entities`, and `relationships` or `relations`.

    An entity has `name` and `type`, and `summary` where there is one; a relationship `source`, `type` and `target`.
    What a report cannot hold is left out and counted: a name that comes again, one that does not occur in the text, a
    relationship without one of its ends. Raises ValueError, with file and line, for a document without labels.
    """
    if Path(path).suffix.lower() not in (".jsonl", ".ndjson"):
        raise ValueError(f"{path}: labels are read from JSONL: each row with text, entities and relationships")
    by_id = {document.id: document for document in documents}
    found: dict[str, Exemplar] = {}
    left_out: Counter[str] = Counter()
    for row in rows(Path(path)):
        if row.fields is None:
            continue
        try:
            document = by_id.get(_identifier(row.fields.get(id_column), row.number, id_column))
        except BadRow:
            continue  # among the rejects, with its reason
        text = row.fields.get(text_column)
        if document is None or document.id in found or not isinstance(text, str) or clean(text) != document.text:
            continue  # so is this one
        entities, links = _labels(row, f"{path}:{row.number}")
        parsed = collect(entities, links, [], brief=None, document=document.text)
        kept = [entity for entity in parsed.report.entities if entity.name in document.text]
        names = {entity.name for entity in kept}
        between = [link for link in parsed.report.relationships if {link.source, link.target} <= names]
        left_out.update(defect.kind for defect in parsed.defects)
        left_out["missing_entity"] += len(parsed.report.relationships) - len(between)
        report = Report(entities=tuple(kept), relationships=tuple(between))
        found[document.id] = Exemplar(document=document, report=report)
    return Labels(found, {kind: number for kind, number in left_out.items() if number})


def _labels(row: Row, place: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Entities (name, type, summary) and relationships (source, type, target) of a labelled row, cleaned."""
    fields = dict(row.fields or {})
    links = fields.get("relationships") or fields.get("relations") or []
    if not isinstance(fields.get("entities"), list) or not isinstance(links, list):
        raise ValueError(
            f"{place}: no list 'entities': the simulated frontier needs documents with labels, rows such as "
            '{"text": "Ada leads Brinvex.", "entities": [{"name": "Ada", "type": "person"}, …], "relationships": '
            '[{"source": "Ada", "type": "leads", "target": "Brinvex"}]}; without labels set `frontier` to an endpoint'
        )
    try:
        entities = [(clean(e["name"]), clean(e["type"]), clean(e.get("summary") or "")) for e in fields["entities"]]
        return entities, [(clean(k["source"]), clean(k["type"]), clean(k["target"])) for k in links]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{place}: an entity needs name and type, a relationship source, type and target: {error!r}"
        ) from None


def _exemplar(row: Row) -> Exemplar:
    if row.fields is None:
        raise BadRow(row.reason)
    fields = dict(row.fields)
    if "document" not in fields:
        if "relations" in fields:  # as benchmarks call them
            fields.setdefault("relationships", fields.pop("relations"))
        report = {key: fields.pop(key) for key in ("entities", "relationships") if key in fields}
        fields = {"split": fields.pop("split", None), "report": report, "document": fields}
        if "entities" not in report:
            raise BadRow("no key 'entities'; a document with nothing to find has an empty list")
    if isinstance(fields["document"], Mapping):
        given = fields["document"].get("id")
        fields["document"] = {**fields["document"], "id": _identifier(given, row.number, "id")}
    return Exemplar.model_validate(_cleaned(Exemplar.model_validate(fields).model_dump()))


def _cleaned(value: Any) -> Any:
    """Clean every text inside the plain form of a record."""
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def read_brief(path: str | Path) -> Brief:
    """Read the client's brief from YAML; raises `ValueError` with file and key, or line, of every fault."""
    import yaml

    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        return Brief.model_validate(fields)
    except ValidationError as error:
        faults = [f"{path}: {_place(fault)}{fault['msg']}" for fault in error.errors()]
        raise ValueError("\n".join(faults)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML in UTF-8: {error}") from None


def _place(fault: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: " if where else ""
