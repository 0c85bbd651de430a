"""Reports and index: what is shown of a phase, and that it is rendered again without running anything."""

import io
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import write_notebook
from nbformat import NotebookNode
from rich.console import Console
from typer.testing import CliRunner

from erlib.__main__ import app
from erlib.chain import pages, runner
from erlib.chain.calls import calls


def markdown(source: str, *tags: str) -> NotebookNode:
    return NotebookNode(cell_type="markdown", source=source, metadata={"tags": list(tags)})


def code(source: str, *tags: str, outputs: str = "") -> NotebookNode:
    return NotebookNode(cell_type="code", source=source, metadata={"tags": list(tags)}, outputs=outputs)


# -- what a page shows ----------------------------------------------------------------------------------------------


def test_tables_with_several_index_levels_keep_their_spans_and_nothing_else() -> None:
    frame = pd.DataFrame({("reward", "mean"): [1, 2], ("reward", "low"): [3, 4]}, index=[["a", "a"], ["x", "y"]])
    table = BeautifulSoup(pages.clean_html(frame.to_html()), "html.parser")
    assert [cell["rowspan"] for cell in table("th", rowspan=True)] == ["2"]
    assert {cell["colspan"] for cell in table("th", colspan=True)} == {"2"}
    assert "span" not in pages.clean_html('<table><td rowspan="2;x" colspan="-1" onclick="x()">1</td></table>')


def test_prose_is_the_present_one_where_the_code_is_what_was_executed() -> None:
    executed = [
        markdown("failed", "papermill-error-cell-tag"),
        markdown("old"),
        code("seed = 0  # first", "parameters"),
        code("seed = 3", "injected-parameters"),
        code("x = 1", outputs="shown"),
    ]
    present = [
        markdown("new"),
        code("seed = 9  # where it begins", "parameters"),
        markdown("more"),
        code("x = 1  # one"),
    ]
    shown = pages.with_present_prose(executed, present)
    assert [cell.source for cell in shown] == [
        "new", "failed", "seed = 9  # where it begins", "more", "seed = 3", "x = 1  # one"
    ]  # fmt: skip
    assert shown[-1].outputs == "shown"
    for other in (present[:-1], [*present, code("y = 2")], [*present[:-1], code("x = 2")]):
        assert pages.with_present_prose(executed, other) is executed


def test_a_cell_lists_what_it_calls_in_erlib_with_its_docstring() -> None:
    first, second, third = calls(
        [
            "from erlib.task import metrics\nfrom erlib.task.forms import short_prompt as ask\nimport pandas as pd",
            "%matplotlib inline\ntable = pd.DataFrame([metrics.wilson(3, 4)])\nask(str(metrics.wilson(1, 2)))",
            "from erlib.chain import run\nphase.finish([run.check('x', 1)])\nmetrics.no_such_function()",
        ]
    )
    assert first == []
    assert [(each.name, each.module) for each in second] == [
        ("metrics.wilson", "erlib/task/metrics.py"), ("ask", "erlib/task/forms.py")
    ]  # fmt: skip
    assert "Wilson" in second[0].summary and "\n" not in second[0].summary
    assert second[0].signature.startswith("wilson(")
    assert second[1].anchor == "erlib.task.forms.short_prompt"
    assert [(each.name, each.module) for each in third] == [
        ("run.check", "erlib/chain/verdict.py")
    ]  # where it is defined
    assert calls(["not python ("]) == [[]]


@pytest.mark.parametrize(
    ("names", "text"),
    [(["02_b", "01_a", "03_c", "04_d", "04_d"], "01 to 04"), (["01_a", "02_b", "12_l"], "01, 02, 12"), ([], "")],
)
def test_phases_are_named_by_number_neighbours_together(names: list[str], text: str) -> None:
    assert pages.numbers(names) == text


@pytest.mark.parametrize(("seconds", "text"), [(41.4, "41 s"), (719, "12 min"), (3599, "60 min"), (7560, "2 h 06 min")])
def test_durations_read_as_words(seconds: float, text: str) -> None:
    assert pages.duration(seconds) == text


# -- rendered, and rendered again -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One phase with prose, a call of erlib, and a check of each outcome, run once."""
    chain = tmp_path_factory.mktemp("project")
    (chain / "notebooks").mkdir()
    (chain / "tiny.yml").write_text("all:\n  seed: 3\n")
    write_notebook(
        chain / "notebooks/01_make.ipynb",
        'out = "x/01_make"\nseed = 0',
        "from erlib.chain import run\nfrom erlib.task import metrics\n"
        "phase = run.start('01_make', globals(), simulated=True)",
        "share = metrics.wilson(1, 4)",
        "import pandas as pd\npd.DataFrame({'documents': [3.0, 2.5], 'p': [0.00002, 0.04]})",
        "phase.finish([run.check('rows', 3.0, target='> 2'), run.check('share', share, target='> 0.5'),"
        " run.check('sign test, p', 0.2, target='< 0.05', gate=False)], metrics={'sign_test_p': 0.00002})",
        prose="What is made?",
    )
    assert go(chain)[0] == 0
    return chain


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`, to change."""
    return shutil.copytree(made, tmp_path / "project", symlinks=True)


def go(chain: Path) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=300, highlight=False)
    status = runner.run(chain / "tiny.yml", notebooks=chain / "notebooks", runs=chain / "runs", console=console)
    return status, console.file.getvalue()


def test_report_and_index_tell_outcomes_apart_in_words_and_count_them(project: Path) -> None:
    page = BeautifulSoup((project / "runs/tiny/01_make.html").read_text(), "html.parser")
    index = BeautifulSoup((project / "runs/tiny/index.html").read_text(), "html.parser")
    for shown in (page.find("table"), index("table")[1]):
        assert [cell.text.strip() for cell in shown(class_="outcome")] == [
            "✓ met", "○ undecided", "✗ missed (not a gate)"
        ]  # fmt: skip
        assert [cell["class"] for cell in shown(class_="outcome")] == [
            ["outcome", "met"], ["outcome", "undecided"], ["outcome", "missed"]
        ]  # fmt: skip
    assert "1 phase in" in index.text
    assert "1 met, 1 undecided, 1 missed" in index.text
    assert "simulated in phases 01." in index.find(class_="banner").text
    assert "sign_test_p < 0.001" in index.text
    assert index.find("table")("tr")[1]("td")[3].text == "sign test, p"  # the first missed check stands for the phase
    frame = page.find("table", class_="dataframe")
    assert [cell.text for cell in frame("td")] == ["3", "2e-05", "2.5", "0.04"]


def test_folded_code_links_to_docstrings_within_the_page(project: Path) -> None:
    page = BeautifulSoup((project / "runs/tiny/01_make.html").read_text(), "html.parser")
    links = {link.text: link["href"] for link in page.select("details .calls a")}
    assert links["metrics.wilson"] == "#erlib.task.metrics.wilson"
    assert all(page.find(id=href[1:]) for href in links.values())


def test_new_prose_and_templates_are_rendered_without_running_a_phase(project: Path) -> None:
    notebook, html = project / "notebooks/01_make.ipynb", project / "runs/tiny/01_make.html"
    manifest = (project / "runs/tiny/01_make/manifest.json").read_bytes()
    notebook.write_text(notebook.read_text().replace("What is made?", "Which rows are made?"))
    printed = go(project)[1]
    assert "skipped" in printed and "starts" not in printed
    assert "Which rows are made?" in html.read_text()

    notebook.write_text(notebook.read_text().replace("Which rows", "How many rows"))
    command = ["report", str(project / "runs/tiny"), "--notebooks", str(project / "notebooks")]
    ended = CliRunner().invoke(app, command)
    assert (ended.exit_code, ended.output.strip()) == (0, str(project / "runs/tiny/index.html"))
    assert "How many rows are made?" in html.read_text()

    notebook.write_text(notebook.read_text().replace("wilson(1, 4)", "wilson(2, 4)").replace("How many", "All"))
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "How many rows" not in html.read_text() and "What is made?" in html.read_text()  # as it was executed
    assert (project / "runs/tiny/01_make/manifest.json").read_bytes() == manifest


def test_a_report_whose_executed_notebook_is_lost_stays_as_it_is_and_is_named(project: Path) -> None:
    before = (project / "runs/tiny/01_make.html").read_text()
    (project / "runs/tiny/01_make.ipynb").unlink()
    ended = CliRunner().invoke(app, ["report", str(project / "runs/tiny")])
    assert ended.exit_code == 1
    assert "01_make: its executed notebook is lost" in ended.output
    assert (project / "runs/tiny/01_make.html").read_text() == before
    empty = project / "runs/empty"
    empty.mkdir()
    assert CliRunner().invoke(app, ["report", str(empty)]).exit_code == 2


def test_another_result_is_not_rendered_from_an_older_notebook(project: Path) -> None:
    folder = project / "runs/tiny/01_make"
    found = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(found | {"seconds": 1.0}))
    assert not pages.can_render(folder.with_name("01_make.ipynb"), folder, folder.with_name("01_make.html"))
