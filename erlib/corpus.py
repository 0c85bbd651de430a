"""Read documents that nobody vouches for, clean and deduplicate them, split them by group, and read gold and brief.

Nothing is dropped without a word: a row of the input becomes a document or a line of `rejects` that says why.
"""

import csv
import html
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from erlib.schema import Brief, Document, Exemplar


class TooManyRejects(ValueError):
    """More of the input was rejected than the limit allows; the message names the reasons and the file."""


class _Bad(ValueError):
    """Why one row cannot be a document."""


# -- cleaning -----------------------------------------------------------------------------------------------------

_LINE_END = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
# Control, format (zero-width, bidi, invisible tag letters) and surrogate characters; joiners are the next line's.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0001-\U000e007f]"
)
# Joiners stay between letters of the scripts that need them and inside emoji.
_STRAY_JOINER = re.compile("[\u200c\u200d](?<![\u0600-\u1fff\u2600-\ufefe\U00010000-\U0010ffff].)")
# Only with a semicolon: "?a=1&copy=2" in a URL is no copyright sign.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_BREAK = re.compile(r"</?(?:br|p|div|li|ul|ol|tr|table|blockquote|h[1-6])(?:\s[^<>]*)?/?>", re.IGNORECASE)
# Any other tag, and the marks that tokenizers read as special tokens: </s>, <pad>, <|endoftext|>, [INST].
_TAG = re.compile(r"</?[a-zA-Z][\w:-]*(?:\s[^<>]*)?/?>|<[|\uff5c][^<>]{1,60}[|\uff5c]>|\[/?INST\]")


def clean(text: str) -> str:
    """Remove what a reader does not see, and leave wording, case, URLs and emoji as they are; idempotent.

    Removed: HTML entities, tags, scripts and special-token text; control, zero-width and bidi characters; lone
    surrogates. Every kind of line end becomes a newline, other runs of white space one space, blank lines go.
    """
    for _ in range(10):  # what one round removes may uncover more: "&amp;lt;b&amp;gt;", "<<b>b>"
        before, text = text, _clean_once(text)
        if text == before:
            return text
    return clean(re.sub(r"[<>&\[\]]", " ", text))  # nested deeper than anybody means: not worth a round for each level


def _clean_once(text: str) -> str:
    text = _INVISIBLE.sub("", _LINE_END.sub("\n", text))
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), _STRAY_JOINER.sub("", text))
    text = _TAG.sub("", _BREAK.sub("\n", _HIDDEN.sub(" ", text)))
    return "\n".join(words for line in text.split("\n") if (words := " ".join(line.split())))


# -- reading documents --------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One row of any source: its fields, or None and the reason why they cannot be read."""

    number: int
    fields: Mapping[str, Any] | None
    reason: str = ""
    raw: str = ""


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
        for row in _rows(source):
            if len(documents) == limit:
                break
            try:
                document = _document(row, text_column, id_column, max_chars)
                _check_new(document, row.number, first_with)
                documents.append(document)
            except _Bad as error:
                reasons.append(str(error))
                file.write(json.dumps({"line": row.number, "reason": str(error), "row": _shown(row)}) + "\n")
    name = source if isinstance(source, str | Path) else type(source).__name__
    read = len(documents) + len(reasons)
    if read == 0:
        raise ValueError(f"{name}: holds no documents")
    if len(reasons) > max_reject_share * read:
        kinds = Counter(re.sub(r"(?<=id )'.*'|\d[\d,]*", "…", reason) for reason in reasons)
        common = "; ".join(f"{n} × {kind}" for kind, n in kinds.most_common(3))
        raise TooManyRejects(
            f"{name}: {len(reasons)} of {read} rows were rejected, more than max_reject_share={max_reject_share}. Most "
            f"often: {common}. First: {reasons[0]}. All are in {rejects}; mend the input, set text_column and "
            f"id_column to names that it has, or raise max_reject_share."
        )
    return documents


def _shown(row: _Row) -> str:
    """The start of a row, for its line among the rejects."""
    return (row.raw or repr(dict(row.fields or {})))[:300]


def _rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[_Row]:
    if not isinstance(source, str | Path):
        return (_Row(number, fields) for number, fields in enumerate(source, start=1))
    if str(source).startswith("hf:"):
        return _dataset_rows(str(source))
    path = Path(source)
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: documents are read from {', '.join(readers)} or hf:NAME[:SPLIT]")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of documents")
    return readers[path.suffix.lower()](path)


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    # In binary: text mode and splitlines() also end lines at characters that JSON allows inside strings.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            raw = line.decode("utf-8", "backslashreplace")
            try:
                yield _Row(number, _object(line), raw=raw)
            except _Bad as error:
                yield _Row(number, None, str(error), raw)


def _object(line: bytes) -> dict[str, Any]:
    """Read one JSON object strictly; raises `_Bad` with the reason."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Bad("the file is UTF-16; save it as UTF-8")
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _Bad(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise _Bad(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _Bad("nested too deeply") from None
    except _Bad:
        raise
    except ValueError:
        raise _Bad("a number of thousands of digits") from None
    if not isinstance(row, dict):
        raise _Bad(f"not a JSON object but {type(row).__name__}")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _Bad(f"duplicate key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r}")
    return row


def _no_constant(name: str) -> None:
    raise _Bad(f"{name} is not JSON")


def _csv_rows(path: Path) -> Iterator[_Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise ValueError(f"{path}:1: the header names a column twice: {header}")
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # such as a field of more than 131,072 characters; the next line is read afresh
                yield _Row(reader.reader.line_num, None, f"not CSV: {error}")
                continue
            yield _Row(reader.line_num, fields, _csv_fault(fields))


def _csv_fault(fields: dict[str | None, Any]) -> str:
    if None in fields:
        return "more fields than the header"
    if any(value and re.search("[\udc80-\udcff]", value) for value in fields.values()):
        return "not UTF-8; save the file as UTF-8"
    return ""


def _parquet_rows(path: Path) -> Iterator[_Row]:
    import pyarrow.lib
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1_000):
            for fields in batch.to_pylist():
                number += 1
                yield _Row(number, fields)
    except pyarrow.lib.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file that can be read, after {number} rows: {error}") from error


def _dataset_rows(name: str) -> Iterator[_Row]:
    """Rows of `hf:NAME[:SPLIT]`; NAME is a hub name or a local folder, SPLIT is train unless given."""
    import datasets

    dataset, _, split = name.removeprefix("hf:").partition(":")
    rows = datasets.load_dataset(dataset, split=split or "train", streaming=True)
    return (_Row(number, fields) for number, fields in enumerate(rows, start=1))


def _document(row: _Row, text_column: str, id_column: str, max_chars: int) -> Document:
    if row.reason:
        raise _Bad(row.reason)
    if text_column not in row.fields:
        raise _Bad(f"no column {text_column!r}, only {list(row.fields)[:8]}")
    text, given = row.fields[text_column], row.fields.get(id_column)
    if not isinstance(text, str):
        raise _Bad(f"{text_column!r} is {'empty' if _missing(text) else type(text).__name__}, not text")
    if len(text) > max_chars:  # checked before cleaning, which may be slow on hostile text
        raise _Bad(f"text of {len(text):,} characters, more than max_chars={max_chars:,}")
    if not _missing(given) and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise _Bad(f"{id_column!r} is {type(given).__name__}, neither text nor a whole number")
    text, identifier = clean(text), f"row-{row.number}" if _missing(given) else clean(str(given))
    if not text or not identifier:
        raise _Bad(f"{id_column if text else text_column!r} is empty after cleaning")
    return Document(id=identifier, text=text, **{key: _optional(row.fields.get(key)) for key in _OPTIONAL})


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
        raise _Bad(f"id {document.id!r} again, {texts} as in row {first}")


# -- duplicates ---------------------------------------------------------------------------------------------------

_SHINGLE = 5  # characters
_BANDS, _ROWS = 20, 4  # finds a pair of Jaccard similarity .8 with probability 1 - (1 - .8 ** 4) ** 20 = .99998


class Duplicate(NamedTuple):
    """A document left out, the earlier one that it repeats, and their similarity (1 when only the dress differs)."""

    id: str
    duplicate_of: str
    similarity: float


class Deduplicated(NamedTuple):
    """The documents kept, in their order, and those left out."""

    kept: list[Document]
    dropped: list[Duplicate]


def deduplicate(documents: Sequence[Document], *, threshold: float = 0.8, seed: int = 0) -> Deduplicated:
    """Keep the first of documents that say the same; time and memory grow linearly.

    Compared are 5-character shingles of the text without case, URLs, handles and punctuation, by Jaccard similarity
    above `threshold`; candidates come from MinHash with banding (Broder 1997; Leskovec et al., Mining of Massive
    Datasets, 3.4).
    """
    kept: list[int] = []
    dropped: list[Duplicate] = []
    bands: dict[tuple[int, bytes], int] = {}  # band and its hashes -> first kept document with them
    shingles: dict[int, np.ndarray] = {}
    for index, (hashes, signature) in enumerate(_signatures([document.text for document in documents], seed)):
        keys = [(band, row.tobytes()) for band, row in enumerate(signature.reshape(_BANDS, _ROWS))]
        candidates = sorted({bands[key] for key in keys if key in bands})
        similarities = [_jaccard(hashes, shingles[other]) for other in candidates]
        if similarities and max(similarities) >= threshold:
            original = candidates[int(np.argmax(similarities))]
            dropped.append(Duplicate(documents[index].id, documents[original].id, max(similarities)))
            continue
        kept.append(index)
        shingles[index] = hashes
        for key in keys:
            bands.setdefault(key, index)
    return Deduplicated([documents[index] for index in kept], dropped)


def _signatures(texts: Sequence[str], seed: int, block: int = 500) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each text its shingle hashes (sorted, unique) and its MinHash signature (bands * rows,), uint32 both."""
    rng = np.random.default_rng(seed)
    factors = rng.integers(1, 2**63, size=_BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for start in range(0, len(texts), block):
        sets = [_shingle_hashes(text) for text in texts[start : start + block]]
        borders = np.cumsum([0, *(len(hashes) for hashes in sets[:-1])])
        flat = np.concatenate(sets).astype(np.uint64)
        # Multiply-shift hashing (Dietzfelbinger et al. 1997): the high half of an odd multiple.
        columns = [np.minimum.reduceat((flat * factor) >> np.uint64(32), borders) for factor in factors]
        yield from zip(sets, np.stack(columns, axis=1).astype(np.uint32), strict=True)


_DRESS = re.compile(r"https?://\S+|www\.\S+|@\w+|\brt\b")


def _shingle_hashes(text: str) -> np.ndarray:
    """Sorted unique uint32 hashes of the character shingles of a text without its dress; never empty."""
    plain = re.sub(r"[\W_]+", " ", _DRESS.sub(" ", text.casefold())).strip() or text
    codes = np.frombuffer(plain.ljust(_SHINGLE).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    hashes = np.zeros(len(codes) - _SHINGLE + 1, dtype=np.uint64)
    for offset in range(_SHINGLE):
        hashes = (hashes ^ codes[offset : offset + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# -- splits -------------------------------------------------------------------------------------------------------


def split_by_group(
    documents: Sequence[Document], fractions: Mapping[str, float], *, seed: int
) -> dict[str, list[Document]]:
    """Split documents so that no group is in two parts; a document without group is a group of its own.

    Groups, in random order but the large ones first, go to the part that is furthest from its fraction. The outcome
    does not depend on the order of the documents, which stays within each part. Raises `ValueError` when the fractions
    do not add up to 1 or a part would be empty.
    """
    if abs(sum(fractions.values()) - 1) > 1e-9 or min(fractions.values()) <= 0:
        raise ValueError(f"fractions must be positive and add up to 1, got {dict(fractions)}")
    sizes = Counter(_group(document) for document in documents)
    groups = sorted(sizes)
    shuffled = [groups[index] for index in np.random.default_rng(seed).permutation(len(groups))]
    room = {name: fraction * len(documents) for name, fraction in fractions.items()}
    part_of: dict[tuple[bool, str], str] = {}
    for group in sorted(shuffled, key=lambda g: -sizes[g]):
        part = max(room, key=lambda name: room[name] / fractions[name])
        part_of[group] = part
        room[part] -= sizes[group]
    if empty := set(fractions) - set(part_of.values()):
        raise ValueError(f"{len(documents)} documents in {len(groups)} groups leave {sorted(empty)} empty")
    parts: dict[str, list[Document]] = {name: [] for name in fractions}
    for document in documents:
        parts[part_of[_group(document)]].append(document)
    return parts


def _group(document: Document) -> tuple[bool, str]:
    """The flag keeps the id of a document without group apart from a group of that name."""
    return (True, document.id) if document.group is None else (False, document.group)


# -- files that must be right -------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; raises `ValueError` naming file, line and fault of the first bad line."""
    rows = []
    for row in _jsonl_rows(Path(path)):
        if row.fields is None:
            raise ValueError(f"{path}:{row.number}: {row.reason}")
        rows.append(row.fields)
    return rows


def read_splits(path: str | Path) -> dict[str, list[Document]]:
    """Read the documents that phase 02 wrote, by their split: train, validation and test."""
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for row in read_jsonl(path):
        splits[row.pop("split")].append(Document(**row))
    return splits


def numbered_rows(path: str | Path) -> Iterator[tuple[int, Mapping[str, Any] | None, str]]:
    """Read JSONL that may be bad: line number, object or None, and the fault of each line that is not blank."""
    for row in _jsonl_rows(Path(path)):
        yield row.number, row.fields, row.reason


def numbered_documents(
    path: str | Path, *, text_column: str = "text", id_column: str = "id", max_chars: int = 1_000_000, after: int = 0
) -> Iterator[tuple[int, Document | None, str, str]]:
    """Read and clean the documents after row `after` of a file of any size, one at a time.

    Yields row number, document or None, why there is none, and the start of a bad row. Unlike `read_documents` it
    remembers nothing: an id may come again.
    """
    for row in _rows(path):
        if row.number <= after:
            continue
        try:
            yield row.number, _document(row, text_column, id_column, max_chars), "", ""
        except _Bad as error:
            yield row.number, None, str(error), _shown(row)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any] | BaseModel]) -> None:
    """Write one JSON object a line, UTF-8; the file appears complete or not at all. Raises `ValueError` on NaN."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            plain = row.model_dump(mode="json") if isinstance(row, BaseModel) else row
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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
    for row in _jsonl_rows(Path(path)):
        try:
            exemplar = _exemplar(row)
        except ValidationError as error:
            faults += [f"{path}:{row.number}: {_place(fault)}{fault['msg']}" for fault in error.errors()]
            continue
        except _Bad as error:
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


def _exemplar(row: _Row) -> Exemplar:
    if row.fields is None:
        raise _Bad(row.reason)
    fields = dict(row.fields)
    if "document" not in fields:
        report = {key: fields.pop(key) for key in ("entities", "relationships") if key in fields}
        fields = {"split": fields.pop("split", None), "report": report, "document": fields}
        if "entities" not in report:
            raise _Bad("no key 'entities'; a document with nothing to find has an empty list")
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
