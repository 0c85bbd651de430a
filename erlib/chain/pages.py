"""Offline HTML: one report for each executed notebook, and an index that is built from manifests alone."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from erlib.chain import tables
from erlib.chain.calls import calls
from erlib.chain.manifest import MANIFEST, PACKAGE, ROUND, is_tagged, meaning, read_manifest, sha256, write_text
from erlib.chain.verdict import counts

TEMPLATES = PACKAGE / "chain" / "templates"
PAPERMILL_TAGS = ("injected-parameters", "papermill-error-cell-tag")
TEXT_TAGS = {"a", "abbr", "b", "br", "code", "del", "em", "i", "img", "p", "pre", "span", "strong", "sub", "sup"}
BLOCK_TAGS = {"blockquote", "dd", "details", "div", "dl", "dt", "hr", "li", "ol", "summary", "ul"}
TABLE_TAGS = {"caption", "table", "tbody", "td", "th", "thead", "tr"}
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}


def render(notebook: Path, folder: Path, html: Path, *, source: Path | None = None) -> None:
    """Render an executed notebook with the verdict of the manifest in `folder` on top; no request leaves the page.

    `source` is the notebook as it is now: where its code is what was executed, its prose stands in the report.
    """
    import nbformat
    from jinja2 import FileSystemLoader
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter = HTMLExporter(
        template_file="phase.html.j2",
        extra_loaders=[FileSystemLoader(TEMPLATES)],
        sanitize_html=True,
        embed_images=True,
        filters={"clean_html": clean_html, **_filters()},  # nbconvert's own `clean_html` breaks tables and headings
    )
    executed = nbformat.read(notebook, as_version=4)
    if source is not None:
        executed.cells = with_present_prose(executed.cells, nbformat.read(source, as_version=4).cells)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    for cell, called in zip(code, calls([cell.source for cell in code]), strict=True):
        cell.metadata["erlib_calls"] = called
    called = {each.anchor: each for cell in code for each in cell.metadata["erlib_calls"]}
    round_number = _round(folder)
    resources = {
        "manifest": read_manifest(folder),
        "round": round_number,
        "index": "../index.html" if round_number else "index.html",
        "of_manifest": sha256(folder / MANIFEST),
        "rendered_from": _rendered_from(source),
        "called": [called[anchor] for anchor in sorted(called)],
        "css": _css() + HtmlFormatter(style="default").get_style_defs(".highlight"),
        "metadata": {"path": str(notebook.parent)},
    }
    page, _ = exporter.from_notebook_node(executed, resources=resources)
    write_text(html, page)


def with_present_prose(executed: list[Any], present: list[Any]) -> list[Any]:
    """Put executed cells into the prose of the present notebook, if its code is the same; else give them unchanged.

    Layout and comments of code do not count (`manifest.meaning`), nor does the parameters cell, whose values papermill
    wrote into a cell of its own; cells that papermill added keep their place.
    """
    before: list[list[Any]] = [[]]  # what papermill put before each code cell, and behind the last
    ran: list[Any] = []
    for cell in executed:
        if any(is_tagged(cell, tag) for tag in PAPERMILL_TAGS):
            before[-1].append(cell)
        elif cell.cell_type == "code":
            ran.append(cell)
            before.append([])
    if [_meaning(cell) for cell in ran] != [_meaning(cell) for cell in present if cell.cell_type == "code"]:
        return executed
    cells: list[Any] = []
    pairs = zip(before, ran, strict=False)
    for cell in present:
        if cell.cell_type == "code":
            added, executed_cell = next(pairs)
            executed_cell.source = cell.source
            cells += [*added, executed_cell]
        else:
            cells.append(cell)
    return cells + before[-1]


def _meaning(cell: Any) -> str:
    if is_tagged(cell, "parameters"):
        return "parameters"
    try:
        return meaning(cell.source)
    except SyntaxError:
        return str(cell.source)


def _filters() -> dict[str, Any]:
    return {"number": tables.number, "interval": tables.interval, "outcome": tables.outcome, "tally": tables.tally}


def clean_html(html: str) -> str:
    """Keep harmless HTML: documents are other people's text, so no script, style, form or image from elsewhere."""
    import bleach
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for element in soup(["script", "style"]):  # with their content, which `bleach` would show as text
        element.decompose()
    attributes = {
        "*": ["class", "id"],
        "td": _is_harmless_in_a_table,  # tables with several index levels span rows
        "th": _is_harmless_in_a_table,
        "a": ["href", "title"],
        "img": lambda tag, name, value: name == "alt" or (name == "src" and value.startswith("data:image/")),
    }
    protocols = ["http", "https", "mailto", "data"]
    return bleach.clean(
        str(soup), tags=TEXT_TAGS | BLOCK_TAGS | TABLE_TAGS | HEADINGS, attributes=attributes, protocols=protocols
    )


def _is_harmless_in_a_table(tag: str, name: str, value: str) -> bool:
    return name in ("class", "id") or (name in ("rowspan", "colspan") and bool(re.fullmatch(r"[0-9]{1,4}", value)))


def is_current(html: Path, folder: Path, source: Path) -> bool:
    """Tell whether a report is of the manifest in `folder`, the present prose, templates and modules that render it."""
    return _is_of(html, sha256(folder / MANIFEST)) and _is_of(html, _rendered_from(source))


def can_render(executed: Path, folder: Path, html: Path) -> bool:
    """Tell whether an executed notebook is of the manifest in `folder`, so that its report can be rendered again."""
    return _is_of(html, sha256(folder / MANIFEST)) or _is_whole(executed, folder)


def _is_of(html: Path, digest: str) -> bool:
    if not html.is_file():
        return False
    with html.open(encoding="utf-8") as file:
        return digest in file.read(2000)


def _is_whole(executed: Path, folder: Path) -> bool:
    """Tell whether the executed notebook is of the present manifest, and not cut off by a kill while it was written."""
    import nbformat

    try:
        newer = executed.stat().st_mtime >= (folder / MANIFEST).stat().st_mtime
        cells = nbformat.read(executed, as_version=4).cells
    except (OSError, ValueError, AttributeError):
        return False
    status = {cell.metadata.get("papermill", {}).get("status") for cell in cells if cell.cell_type == "code"}
    return newer and status == {"completed"}


def _rendered_from(source: Path | None) -> str:
    """Hash what a report is made of beside its manifest and executed notebook."""
    shows = [PACKAGE / "chain" / f"{name}.py" for name in ("calls", "pages", "tables")]
    files = [*shows, *sorted(TEMPLATES.iterdir()), *([source] if source else [])]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def phases(folder: Path) -> list[Path]:
    """List the phase folders of a run that have a manifest, in the order in which they ran.

    Those of the rounds stand, by round, between those before and after them.
    """
    found = [path.parent for place in ("", "round-*/") for path in folder.glob(f"{place}[0-9][0-9]_*/{MANIFEST}")]
    found = [path for path in found if read_manifest(path)]
    return sorted(found, key=lambda path: (ROUND[0] if _round(path) else path.name[:2], _round(path) or 0, path.name))


def render_again(folder: Path, notebooks: Path) -> Iterator[tuple[Path, bool]]:
    """Render every report of a run and its index, without running a phase: (phase folder, whether it was rendered).

    A phase whose executed notebook is lost or of another result keeps the report that it has.
    """
    for phase in phases(folder):
        executed, html = phase.with_name(f"{phase.name}.ipynb"), phase.with_name(f"{phase.name}.html")
        source = notebooks / executed.name
        possible = executed.is_file() and can_render(executed, phase, html)
        if possible:
            render(executed, phase, html, source=source if source.is_file() else None)
        yield phase, possible
    write_index(folder)


def write_index(folder: Path) -> Path:
    """Write `index.html` of a run folder: every phase's status, headline or first missed check, seconds and links."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    environment.filters.update(_filters())
    rows: list[dict[str, Any]] = []
    for path in phases(folder):
        manifest = read_manifest(path) or {}
        row = {**manifest, "label": path.relative_to(folder).as_posix(), "round": _round(path)}
        rows.append(row | {"head": _headline(manifest["verdict"]), "counts": counts(manifest["verdict"])})
    page = environment.get_template("index.html.j2").render(
        run=folder.name,
        css=_css(),
        rows=rows,
        seconds=duration(sum(row["seconds"] for row in rows)),
        checks=tables.tally([check for row in rows for check in row["verdict"]]),
        simulated=numbers([row["phase"] for row in rows if row["simulated"]]),
    )
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _headline(verdict: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first missed check, else the first undecided one, else the first."""
    order: list[str | None] = ["missed", "undecided"]
    return min(verdict, key=lambda row: order.index(row["outcome"]) if row["outcome"] in order else 2, default=None)


def duration(seconds: float) -> str:
    """Write a duration: "41 s", "12 min", "1 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def numbers(names: Iterable[str]) -> str:
    """Name phases by number, neighbours together: "01 to 03, 05, 12"."""
    groups: list[list[int]] = []
    for number in sorted({int(name[:2]) for name in names}):
        if groups and groups[-1][-1] == number - 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    parts = [f"{g[0]:02} to {g[-1]:02}" if len(g) > 2 else ", ".join(f"{n:02}" for n in g) for g in groups]
    return ", ".join(parts)


def _round(folder: Path) -> int | None:
    """Read the round of a phase's folder; None outside the rounds."""
    match = re.fullmatch(r"round-(\d+)", folder.parent.name)
    return int(match[1]) if match else None


def _css() -> str:
    return (TEMPLATES / "report.css").read_text(encoding="utf-8")
