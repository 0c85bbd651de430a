"""Offline HTML: one report for each executed notebook, and an index that is built from manifests alone."""

import re
from pathlib import Path
from typing import Any

from erlib.chain.manifest import MANIFEST, PACKAGE, ROUND, read_manifest, sha256, write_text

TEMPLATES = PACKAGE / "chain" / "templates"
TEXT_TAGS = {"a", "abbr", "b", "br", "code", "del", "em", "i", "img", "p", "pre", "span", "strong", "sub", "sup"}
BLOCK_TAGS = {"blockquote", "dd", "details", "div", "dl", "dt", "hr", "li", "ol", "summary", "ul"}
TABLE_TAGS = {"caption", "table", "tbody", "td", "th", "thead", "tr"}
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}


def render(notebook: Path, folder: Path, html: Path) -> None:
    """Render an executed notebook with the verdict of the manifest in `folder` on top; no request leaves it."""
    import nbformat
    from jinja2 import FileSystemLoader
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter = HTMLExporter(
        template_file="phase.html.j2",
        extra_loaders=[FileSystemLoader(TEMPLATES)],
        sanitize_html=True,
        embed_images=True,
    )
    exporter.register_filter("clean_html", clean_html)  # nbconvert's own breaks tables and headings
    round_number = _round(folder)
    resources = {
        "manifest": read_manifest(folder),
        "round": round_number,
        "index": "../index.html" if round_number else "index.html",
        "digest": sha256(folder / MANIFEST),
        "css": _css() + HtmlFormatter(style="default").get_style_defs(".highlight"),
        "metadata": {"path": str(notebook.parent)},
    }
    page, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), resources=resources)
    write_text(html, page)


def clean_html(html: str) -> str:
    """Keep harmless HTML: documents are other people's text, so no script, style, form or image from elsewhere."""
    import bleach
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for element in soup(["script", "style"]):  # with their content, which `bleach` would show as text
        element.decompose()
    attributes = {
        "*": ["class", "id"],
        "a": ["href", "title"],
        "img": lambda tag, name, value: name == "alt" or (name == "src" and value.startswith("data:image/")),
    }
    protocols = ["http", "https", "mailto", "data"]
    return bleach.clean(
        str(soup), tags=TEXT_TAGS | BLOCK_TAGS | TABLE_TAGS | HEADINGS, attributes=attributes, protocols=protocols
    )


def is_current(html: Path, folder: Path) -> bool:
    """Tell whether a report was rendered from the manifest that now lies in `folder`."""
    if not html.is_file() or not (folder / MANIFEST).is_file():
        return False
    with html.open(encoding="utf-8") as file:
        return sha256(folder / MANIFEST) in file.read(2000)


def write_index(folder: Path) -> Path:
    """Write `index.html` of a run folder: every phase's status, headline or first failed check, seconds and links.

    Phases stand in the order in which they run: those of the rounds, by round, between those before and after them.
    """
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    found = [path.parent for place in ("", "round-*/") for path in folder.glob(f"{place}[0-9][0-9]_*/{MANIFEST}")]
    found.sort(key=lambda path: (ROUND[0] if _round(path) else path.name[:2], _round(path) or 0, path.name))
    rows: list[dict[str, Any]] = [
        {**manifest, "label": path.relative_to(folder).as_posix(), "round": _round(path)}
        for path in found
        if (manifest := read_manifest(path))
    ]
    index = folder / "index.html"
    write_text(index, environment.get_template("index.html.j2").render(run=folder.name, css=_css(), rows=rows))
    return index


def _round(folder: Path) -> int | None:
    """Read the round of a phase's folder; None outside the rounds."""
    match = re.fullmatch(r"round-(\d+)", folder.parent.name)
    return int(match[1]) if match else None


def _css() -> str:
    return (TEMPLATES / "report.css").read_text(encoding="utf-8")
