"""Delimited text (CSV and its kin) row by row: the dialect is found, and no line is swallowed without a word.

A quotation mark that opens a field and is never closed makes a parser read on, to the next quotation mark or to the end
of the file, as one field. Every line that went that way becomes a row of its own with the reason, which names the line
that opened the mark.
"""

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from erlib.task.jsonl import Row, encoding_of

_DELIMITERS = (",", ";", "\t", "|")
_LONGEST_FIELD = 1_000_000  # characters: as far as a mark that was left open can reach
_SHAPES = 100  # rows whose keys are remembered, to tell what a row looks like


def csv_rows(path: Path, *, text_column: str, id_column: str) -> Iterator[Row]:
    """Read delimited text with a header, in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    The delimiter (`,` `;` tab `|`) is the one that gives the header the text column, else the most columns. A field may
    hold line breaks; but where the lines inside it look like rows (as many fields as the header, and a key of the same
    shape as in the rows before), a mark was left open, and each line is a bad row. That cannot be told in a file of one
    column. Raises `ValueError` for a header without the text column, or with a column twice.
    """
    encoding = encoding_of(path)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    with open(path, encoding=encoding, errors=errors, newline="") as file:
        lines = _Lines(file)
        header, delimiter = _header(path, lines, text_column)
        key = header.index(id_column) if id_column in header else int(header[:1] == [text_column] and len(header) > 1)
        shapes: deque[str] = deque(maxlen=_SHAPES)
        csv.field_size_limit(_LONGEST_FIELD)  # of the whole process; nothing else in it reads CSV by this module
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            lines.taken.clear()
            try:
                fields = next(reader)
                problem = ""
            except StopIteration:
                return
            except csv.Error as error:  # the next line is read afresh
                fields, problem = [], f"not {_named(delimiter)}: {error}"
            taken = [line for line in lines.taken if line.strip()]
            if not taken:
                continue
            first = lines.number - len(lines.taken) + 1
            inside = lines.taken[1:]
            if len(inside) and (problem or _swallows(inside, len(header), key, delimiter, shapes)):
                yield from _swallowed(first, lines.taken)
                continue
            if problem:
                yield Row(first, None, problem, lines.taken[0].rstrip())
                continue
            if len(fields) == len(header) > key:
                shapes.append(_shape(fields[key]))
            named = dict(zip(header, [*fields, *[None] * (len(header) - len(fields))], strict=False))
            yield Row(first, named, _fault(fields, len(header), encoding), lines.taken[0].rstrip())


class _Lines:
    """The lines of a file one by one, with their number, and those taken since `taken` was last cleared."""

    def __init__(self, file):
        self._file, self.number, self.taken = file, 0, []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        self.taken.append(line)
        return line


def _header(path: Path, lines: _Lines, text_column: str) -> tuple[list[str], str]:
    first = next((line for line in lines if line.strip()), "")
    if not first:
        return [], ","
    if "\0" in first:
        raise ValueError(f"{path}:{lines.number}: not UTF-8 (UTF-16 without its mark?); save the file as UTF-8")
    found = {}
    for delimiter in _DELIMITERS:
        try:
            (names,) = csv.reader([first], delimiter=delimiter, strict=True)
            found[delimiter] = [name.strip() for name in names]
        except csv.Error:
            continue
    if not found:
        raise ValueError(f"{path}:{lines.number}: the header cannot be read: {first[:80]!r}")
    delimiter = max(found, key=lambda each: (text_column in found[each], len(found[each])))
    header = found[delimiter]
    if len(set(header)) < len(header):
        raise ValueError(f"{path}:{lines.number}: the header names a column twice: {header}")
    if text_column not in header:
        raise ValueError(missing_column(f"{path}:{lines.number}", text_column, header))
    return header, delimiter


def missing_column(where: str, column: str, known: list[str]) -> str:
    """Say which columns there are, and how to name the one that holds the texts."""
    return (
        f"{where}: no column {column!r}; the columns are {', '.join(map(repr, known[:20]))}: set `text_column` to the "
        "one with the texts (`--text-column` of `python -m erlib extract`), and `id_column` to the one with the ids"
    )


def _named(delimiter: str) -> str:
    return "CSV" if delimiter == "," else f"text delimited by {delimiter!r}"


def _swallows(inside: list[str], columns: int, key: int, delimiter: str, shapes: deque[str]) -> bool:
    """Whether the lines inside a field look like rows; of the last one only its beginning can."""
    if columns < 2:
        return False

    def looks_like_a_row(line: str, whole: bool) -> bool:
        fields = line.rstrip("\r\n").split(delimiter)
        enough = len(fields) == columns if whole and '"' not in line else len(fields) > key + 1
        return enough and _shape(fields[key]) in shapes

    return all(looks_like_a_row(line, whole=line is not inside[-1]) for line in inside if line.strip())


def _shape(key: str) -> str:
    """What a key looks like: `A-0` for `doc-17`."""
    return re.sub(r"\d+", "0", re.sub(r"[^\W\d_]+", "A", key.strip()))


def _swallowed(first: int, lines: list[str]) -> Iterator[Row]:
    opened = f"line {first} opens a quotation mark that does not close in its row"
    for number, line in enumerate(lines, start=first):
        said = "" if number == first else ", and this line was read as a part of it"
        yield Row(number, None, f"{opened}{said}; double the mark, or close it", line.rstrip())


def _fault(fields: list[str], columns: int, encoding: str) -> str:
    if len(fields) > columns:
        return "more fields than the header"
    if any(re.search("[\udc80-\udcff]" if encoding == "utf-8-sig" else "\ufffd", value) for value in fields):
        name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        return f"not {name}; save the file as UTF-8"
    return ""
