"""JSON Lines that must be right: strict reading with line and fault of each bad line, whole-or-nothing writing."""

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel


class BadRow(ValueError):
    """Why one row cannot be used."""


class Row(NamedTuple):
    """One row of any source: its fields, or None and the reason why they cannot be read."""

    number: int
    fields: Mapping[str, Any] | None
    reason: str = ""
    raw: str = ""


def rows(path: str | Path) -> Iterator[Row]:
    """Read one JSON object per line, one at a time; a row that is none says why."""
    # In binary: text mode and splitlines() also end lines at characters that JSON allows inside strings.
    encoding = encoding_of(path)
    wide = encoding != "utf-8-sig"
    with open(path, encoding=encoding, errors="replace", newline="\n") if wide else open(path, "rb") as file:
        for number, line in enumerate((line.encode() for line in file) if wide else file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            raw = line.decode("utf-8", "backslashreplace")
            try:
                yield Row(number, _object(line), raw=raw)
            except BadRow as error:
                yield Row(number, None, str(error), raw)


# In this order: the mark of UTF-32 starts as that of UTF-16 does.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
_MARKS |= {codecs.BOM_UTF16_BE: "utf-16"}


def encoding_of(path: str | Path) -> str:
    """The encoding that a file's byte order mark names, UTF-8 without one."""
    with open(path, "rb") as file:
        start = file.read(4)
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8-sig")


def _object(line: bytes) -> dict[str, Any]:
    """Read one JSON object strictly; raises `BadRow` with the reason."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise BadRow("nested too deeply") from None
    except BadRow:
        raise
    except ValueError:
        raise BadRow("a number of thousands of digits") from None
    if not isinstance(row, dict):
        raise BadRow(f"not a JSON object but {type(row).__name__}")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BadRow(f"duplicate key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r}")
    return row


def _no_constant(name: str) -> None:
    raise BadRow(f"{name} is not JSON")


# -- files that must be right -------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read one JSON object per line; raises `ValueError` naming file, line and fault of the first bad line."""
    objects = []
    for row in rows(path):
        if row.fields is None:
            raise ValueError(f"{path}:{row.number}: {row.reason}")
        objects.append(row.fields)
    return objects


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any] | BaseModel]) -> None:
    """Write one JSON object per line, UTF-8; the file appears complete or not at all. Raises `ValueError` on NaN."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            plain = row.model_dump(mode="json") if isinstance(row, BaseModel) else row
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
