"""Bulk extraction, file to file: any size in bounded memory, several processes, killed and resumed without loss.

Output is appended block by block in the order of the input. A block's rejects are on disk before its reports, so the
last complete line of the reports says where to go on: all up to it is done, rejects after it are made again.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from erlib.chain.manifest import write_text
from erlib.documents import files
from erlib.task.schema import Brief, Document

Row = tuple[int, Document | None, str, str]


class Done(NamedTuple):
    """How far an extraction has come: row number of the input, reports and rejects written in this call."""

    row: int
    reports: int
    rejects: int


@dataclass(frozen=True)
class Work:
    """How documents are answered: by which engine, in how many processes, how many at once."""

    engine: str  # a name of `engines.ENGINES`
    workers: int = 1  # processes that share the cores; each opens the model
    batch_size: int = 32  # documents at once in each process
    block: int = 256  # documents between two writes to the disk; two blocks per worker are in memory


@dataclass(frozen=True)
class Columns:
    """Where the documents of a file are found, and which are too long to be one."""

    text_column: str = "text"
    id_column: str = "id"
    max_chars: int = 1_000_000  # checked before cleaning, which may be slow on hostile text


def extract(
    documents: Path,
    reports: Path,
    *,
    model: Path,
    work: Work,
    rejects: Path,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    brief: Brief | None = None,
    progress: Callable[[Done], None] = lambda done: None,
) -> Done:
    """Extract from every document of a file into `reports` (JSONL), in input order; bad rows go to `rejects`.

    The same call after a kill goes on where it was, also when the input has grown. Raises ValueError where `reports`
    was begun with another input, model, engine, brief or columns, or `rejects` belongs to other reports, and
    RuntimeError where another process writes them.
    """
    try:
        with FileLock(reports.with_name(f".{reports.name}.lock"), timeout=0):
            _check_begun(documents, reports, rejects, model=model, work=work, columns=columns, brief=brief)
            last = _resume(reports, rejects)
            rows = files.numbered_documents(documents, **asdict(columns), after=last)
            done = Done(last, 0, 0)
            with open(reports, "ab") as good, open(rejects, "ab") as bad:
                for read, found in _in_order(rows, model, work, brief):
                    refused = [
                        {"line": number, "reason": reason, "row": raw} for number, at, reason, raw in read if at is None
                    ]
                    _append(bad, refused)
                    _append(good, found)
                    done = Done(read[-1][0], done.reports + len(found), done.rejects + len(refused))
                    progress(done)
    except Timeout:
        raise RuntimeError(f"another process writes {reports}: wait for it or stop it") from None
    return done


def count_rows(path: Path) -> int:
    """Number of lines (of rows, for Parquet) of a file, blank ones included: what `Done.row` runs up to."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    with open(path, "rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))


# -- files --------------------------------------------------------------------------------------------------------


def _append(file: Any, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines and see them on disk."""
    file.write(b"".join(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def _check_begun(
    documents: Path, reports: Path, rejects: Path, *, model: Path, work: Work, columns: Columns, brief: Brief | None
) -> None:
    """Refuse to go on with another input, model, engine, brief or columns than both files were begun with."""
    from erlib.serving.export import read_settings

    asked = {
        "input": documents.name,
        "weights": read_settings(model).weights,
        "engine": work.engine,
        "columns": asdict(columns),
        "brief": hashlib.sha256(brief.model_dump_json().encode()).hexdigest() if brief else "",
    }
    present = asked | _Input.of(documents)._asdict()
    _check_same(reports.with_name(f".{reports.name}.begun"), present, reports, grows=documents)
    _check_same(rejects.with_name(f".{rejects.name}.begun"), {"reports": str(reports.resolve())}, rejects)


def _check_same(begun: Path, present: dict[str, Any], what: Path, *, grows: Path | None = None) -> None:
    """Refuse to go on with `what` where the record `begun` says that it was begun otherwise; else write the record.

    `grows` is the input whose size and hash the record holds: rows may have come to its end since.
    """
    before = json.loads(begun.read_text(encoding="utf-8")) if begun.is_file() else None
    written = what.exists() and what.stat().st_size > 0
    if written and before is None:
        raise ValueError(f"{what} exists and was not written by this command: move it away or name another file")
    if before and (written or grows is None):
        then = present
        if grows and before.get("whole_lines") and before["bytes"] < present["bytes"]:
            then = present | _Input.of(grows, upto=before["bytes"])._asdict()
        changed = [name for name in present if name != "input" and before.get(name) != then[name]]
        if changed:
            name = "input" if changed[0] in _Input._fields else changed[0]
            raise ValueError(
                f"{what} was begun with another {name}: {before.get(name)!r}, and now {present[name]!r}. Write to "
                "another file, or move this one away"
            )
    write_text(begun, json.dumps(present) + "\n")


class _Input(NamedTuple):
    """What identifies an input file: its content. A first line does not: exports of two days share their header."""

    bytes: int
    sha256: str
    whole_lines: bool  # whether it can grow: its last line has an end

    @classmethod
    def of(cls, path: Path, *, upto: int | None = None) -> "_Input":
        """Read a file, or its first bytes."""
        digest, left, last = hashlib.sha256(), path.stat().st_size if upto is None else upto, b""
        size = left
        with open(path, "rb") as file:
            while piece := file.read(min(left, 1 << 20)):
                digest.update(piece)
                left, last = left - len(piece), piece[-1:]
        return cls(size - left, digest.hexdigest(), last == b"\n" and path.suffix.lower() != ".parquet")


def _resume(reports: Path, rejects: Path) -> int:
    """Cut both files back to what is certainly complete, and give the row number of the last report."""
    last = 0
    for row in _complete_lines(reports, keep=lambda row: True):
        last = row["line"]
    for _ in _complete_lines(rejects, keep=lambda row: row["line"] <= last):
        pass
    return last


def _complete_lines(path: Path, *, keep: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file up to the first that is not to be kept, and cut the file there.

    A last line that a kill cut off goes too. Raises ValueError for any other line that this command did not write.
    """
    if not path.exists():
        return
    end, size = 0, path.stat().st_size
    with open(path, "rb+") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("line"), int):
                if end + len(line) < size:
                    raise ValueError(f"{path}:{number}: this command did not write that line; nothing was changed")
                break
            if not keep(row):
                break
            end += len(line)
            yield row
        file.truncate(end)


# -- processes ----------------------------------------------------------------------------------------------------


def _in_order(
    rows: Iterable[Row], model: Path, work: Work, brief: Brief | None
) -> Iterator[tuple[list[Row], list[dict[str, Any]]]]:
    """Blocks of rows with the reports of their documents, in order; at most two blocks per worker are in memory."""
    pool = open_pool(model, work, brief=brief)
    blocks, waiting = iter(lambda: list(islice(rows, work.block)), []), deque()  # type: ignore[var-annotated]
    try:
        for read in blocks:
            future: Future = pool.submit(_work, [(number, document) for number, document, *_ in read if document])
            waiting.append((read, future))
            if len(waiting) == 2 * work.workers:
                read, future = waiting.popleft()
                yield read, future.result()
        while waiting:
            read, future = waiting.popleft()
            yield read, future.result()
        pool.shutdown()
    except BaseException:  # an interruption too: what is at work is not waited for
        for process in list(pool._processes.values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def open_pool(model: Path, work: Work, *, brief: Brief | None = None) -> ProcessPoolExecutor:
    """Processes that open the model when they start, each with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // work.workers)
    given = (model, work.engine, work.batch_size, threads, brief)
    return ProcessPoolExecutor(work.workers, mp_context=processes(), initializer=_open, initargs=given)


@cache
def processes() -> multiprocessing.context.ForkServerContext:
    """What starts workers: forks of a process that has imported what they need, and nothing else of this one.

    A fork of this process would take over its threads' locks and a GPU that it cannot use.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["erlib.serving.engines", "transformers.models.auto.modeling_auto"])
    return context


def answer(prompts: list[list[int]]) -> list[list[int]]:
    """In a process of `open_pool`: the answers to prompts, in their order."""
    found = {done.index: done.ids for done in _opened[0].complete(prompts)}
    return [found[index] for index in range(len(prompts))]


_opened: list[Any] = []  # of a worker: engine and brief


def follow_parent() -> None:
    """In a worker: end with its parent, however that ended, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _open(model: Path, engine: str, batch_size: int, threads: int, brief: Brief | None) -> None:
    """Open the model in a worker."""
    follow_parent()
    from erlib.serving import engines

    _opened[:] = [engines.open_engine(model, engine=engine, batch_size=batch_size, threads=threads), brief]


def _work(documents: list[tuple[int, Document]]) -> list[dict[str, Any]]:
    """Reports of a block's documents, in its order."""
    from erlib.serving import engines

    engine, brief = _opened
    found = list(engines.extract(engine, [document for _, document in documents], brief=brief))
    rows = []
    for extraction in sorted(found, key=lambda extraction: extraction.index):
        number, document = documents[extraction.index]
        rows.append(
            {
                "line": number,
                "id": document.id,
                **extraction.parsed.report.model_dump(),
                "defects": [defect._asdict() for defect in extraction.parsed.defects],
                "pieces": extraction.pieces,
                "finished": extraction.finished,
                "prompt_tokens": extraction.prompt_tokens,
                "new_tokens": extraction.new_tokens,
            }
        )
    return rows
