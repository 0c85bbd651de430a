"""The run contract: parameters refused, phases skipped or rerun for a reason, kills survived, reports offline."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from conftest import write_notebook
from filelock import FileLock
from rich.console import Console

from erlib.chain import manifest, run, runner
from erlib.chain.manifest import ROOT, RunError, read_manifest
from erlib.chain.plan import check_params, discover, plan

START = "from erlib.chain import run\nphase = run.start('{name}', globals(), simulated=True)"


def go(chain: Path, **options) -> tuple[int, str]:
    """Run the chain in this process; gives exit status and what was printed."""
    console = Console(file=io.StringIO(), width=300, highlight=False)
    status = runner.run(
        chain / "tiny.yml", notebooks=chain / "notebooks", runs=chain / "runs", console=console, **options
    )
    return status, console.file.getvalue()


def words(printed: str) -> dict[str, str]:
    """The last word on each phase: "02" or "round-1/04" → status and detail."""
    found = re.findall(r"^((?:round-\d+/)?\d\d)_\w+ +(.*?) *$", printed, flags=re.MULTILINE)
    return dict(found)


def outputs(chain: Path) -> dict[str, dict[str, str]]:
    found = sorted((chain / "runs/tiny").rglob("manifest.json"))
    return {shown(path.parent, chain): read_manifest(path.parent)["outputs"] for path in found}


def shown(path: Path, chain: Path) -> str:
    return path.relative_to(chain / "runs/tiny").as_posix()


@pytest.fixture
def rounds(chain: Path) -> Path:
    """A tiny project with two rounds: make → (draw → learn) × 2 → compare; each round goes on from the one before."""
    (chain / "notebooks/02_double.ipynb").unlink()
    (chain / "notebooks/03_total.ipynb").unlink()
    write_notebook(
        chain / "notebooks/04_draw.ipynb",
        'out = "x/04_draw"\nmake_dir = "x/01_make"\nprevious_dir = ""\nround_number = 1\nseed = 0',
        "from pathlib import Path\n" + START.format(name="04_draw"),
        "start = Path(previous_dir) / 'model.txt' if previous_dir else Path(make_dir) / 'part/5.txt'",
        "phase.path('drawn.txt').write_text(f'{start.read_text()} {round_number}')",
        "phase.finish([run.check('round', round_number)], metrics={})",
    )
    write_notebook(
        chain / "notebooks/07_learn.ipynb",
        'out = "x/07_learn"\ndraw_dir = "x/04_draw"\nmost = 9\nround_number = 1\nseed = 0',
        "from pathlib import Path\n" + START.format(name="07_learn"),
        "phase.path('model.txt').write_text('learned ' + (Path(draw_dir) / 'drawn.txt').read_text())",
        "checks = [run.check('learned', 1), run.check('round', round_number, target=f'<= {most}')]",
        "phase.finish(checks, metrics={})",
    )
    write_notebook(
        chain / "notebooks/08_compare.ipynb",
        'out = "x/08_compare"\nlearn_dirs = ["x/07_learn"]\nlearn_dir = "x/07_learn"\nseed = 0',
        "from pathlib import Path\n" + START.format(name="08_compare"),
        "models = [(Path(folder) / 'model.txt').read_text() for folder in learn_dirs]\n"
        "assert models[-1] == (Path(learn_dir) / 'model.txt').read_text()",
        "phase.path('models.txt').write_text('; '.join(models))",
        "phase.finish([run.check('models', len(models))], metrics={})",
    )
    (chain / "tiny.yml").write_text("rounds: 2\nall:\n  seed: 3\n")
    return chain


def edit(notebook: Path, old: str, new: str) -> None:
    text = notebook.read_text()
    assert old in text
    notebook.write_text(text.replace(old, new))


# -- params files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("01_make:\n  cuont: 3\n", "section `01_make`: unknown key `cuont`; did you mean `count`?"),
        ("01_maek:\n  count: 3\n", "unknown section `01_maek`; did you mean `01_make`?"),
        ("all:\n  sede: 3\n", "section `all`: unknown key `sede`; did you mean `seed`?"),
        ("01_make:\n  count: 3.5\n", "section `01_make`: key `count`: expected int like 40, got float 3.5"),
        ("01_make:\n  count: true\n", "key `count`: expected int like 40, got bool True"),
        ("01_make:\n  scale: 1e-5\n", "key `scale`: expected float like 1.5, got str '1e-5'; YAML reads that as text, "
         "write 1.0e-05"),
        ("01_make:\n  scale:\n", "tiny.yml:2: section `01_make`: key `scale`: expected float like 1.5, got NoneType "
         "None; nothing is written after the colon"),
        ("01_make:\n  out: x\n  scale: .nan\n", "line 3: .nan is no number that a parameter can have"),
        ("01_make:\n  scale: -.inf\n", "line 2: -.inf is no number"),
        ("01_make:\n  count: 12:30\n", 'YAML reads 12:30 as the number 750: write "12:30" if it is text, else 750'),
        ("01_make:\n  count: 017\n", "line 2: YAML reads 017 as the number 15"),
        ("01_make:\n  count: 2024-05-01\n", "key `count`: expected int like 40, got date"),
        ("01_make:\n  count: 2024-13-01\n", "tiny.yml: month must be in 1..12"),
        ("03_total:\n  double_dir: No\n", "key `double_dir`: expected str like"),
        ("03_total:\n  double_dir: No\n", "got bool False; that is how YAML reads it: write the text in quotation"),
        ("03_total:\n  double_dir: 2024-05-01\n", "write the text in quotation marks"),
        ("a: &x {count: 3}\n01_make:\n  <<: *x\n", "unknown section `a`"),
        ("01_make:\n  ? [a]\n  : 3\n", "line 2: a key is a word, not a list or a mapping"),
        ("01_make:\n\tcount: 3\n", "tiny.yml"),
        ("all: {}\n---\nall: {}\n", "expected a single document"),
        ("[" * 100_000, "nested too deeply"),
        ("01_make:\n  count: " + "9" * 5000 + "\n", "tiny.yml"),
        ("01_make: \xe9".encode("latin-1"), "tiny.yml: 'utf-8' codec can't decode"),
        ("01_make:\n  out: here\n", "section `01_make`: `out` is set by the runner"),
        ("01_make:\n  count: 3\n  count: 4\n", "line 3: `count` is written twice"),
        ("01_make: 3\n", "section `01_make`: expected `name: value` lines, got 3"),
        ("- 01_make\n", "expected sections"),
        ("skip: [01_mkae]\n", "`skip`: no notebook `01_mkae`; did you mean `01_make`?"),
        ("rounds: 0\n", "`rounds`: expected a whole number from 1 on, got 0"),
        ("rounds: true\n", "`rounds`: expected a whole number from 1 on, got True"),
        ("rounds: 2.0\n", "`rounds`: expected a whole number from 1 on, got 2.0"),
        ("rounds:\n", "`rounds`: expected a whole number from 1 on, got {}"),
        ("round: 2\n", "unknown section `round`; did you mean `rounds`?"),
        ("all:\n  round_number: 2\n", "section `all`: `round_number` is set by the runner; remove it"),
        ("a: [", "tiny.yml"),
    ],
)  # fmt: skip
def test_a_wrong_params_file_is_refused_before_anything_runs(chain: Path, params: str, message: str) -> None:
    (chain / "tiny.yml").write_bytes(params if isinstance(params, bytes) else params.encode())
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        go(chain)
    assert str(chain / "tiny.yml") in str(caught.value)
    assert not (chain / "runs").exists()


@pytest.mark.parametrize("name", ["a{b}", "{0} %s", "é ' x"])
def test_any_name_will_do_for_params_and_folders(chain: Path, name: str) -> None:
    inside = chain / f"in {name}"
    shutil.copytree(chain / "notebooks", inside / name / "notebooks")
    (inside / f"{name}.yml").write_text("skip: [02_double, 03_total]\n")
    folder = inside / "runs" / name
    params, notebooks = inside / f"{name}.yml", inside / name / "notebooks"
    assert runner.run(params, notebooks=notebooks, runs=inside / "runs") == 0
    assert read_manifest(folder / "01_make")["status"] == "done"
    (job, *_) = plan(params, notebooks, folder)
    shutil.rmtree(folder)
    subprocess.run(runner.command(job), shell=True, check=True, cwd=ROOT, capture_output=True)
    assert read_manifest(folder / "01_make")["status"] == "done"


def test_a_long_folder_for_temporary_files_will_do(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = chain / ("t" * (100 - len(str(chain))))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert go(chain, only="01")[0] == 0
    assert not list(long.iterdir())


def test_what_fails_before_the_notebook_starts_is_an_error_with_a_report(chain: Path, monkeypatch) -> None:
    import papermill

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    assert go(chain, only="01")[0] == 1
    manifest = read_manifest(chain / "runs/tiny/01_make")
    assert (manifest["status"], manifest["note"]) == ("error", "OSError: no space left on device")
    assert "no space left on device" in (chain / "runs/tiny/01_make.html").read_text()


def test_a_section_of_one_round_sets_a_phase_there_alone(rounds: Path) -> None:
    keys = {}
    for params in ("rounds: 2\n", "rounds: 2\n04_draw:\n  seed: 5\nround-2/04_draw:\n  seed: 7\n"):
        (rounds / "tiny.yml").write_text(params)
        jobs = {job.label: job for job in plan(rounds / "tiny.yml", rounds / "notebooks", rounds / "runs/tiny")}
        keys[params] = [jobs[f"round-{n}/04_draw"].values["seed"] for n in (1, 2)]
    assert list(keys.values())[1] == [5, 7]
    (rounds / "tiny.yml").write_text("rounds: 2\nround-2/04_draw:\n  seed: 7\n")
    jobs = {job.label: job for job in plan(rounds / "tiny.yml", rounds / "notebooks", rounds / "runs/tiny")}
    first = jobs["round-1/04_draw"]
    assert (first.values["seed"], jobs["round-2/04_draw"].values["seed"]) == (keys["rounds: 2\n"][0], 7)
    for section, said in (
        ("round-3/04_draw", "did you mean `round-2/04_draw`"),
        ("round-1/08_compare", "unknown section"),
    ):
        (rounds / "tiny.yml").write_text(f"rounds: 2\n{section}:\n  seed: 7\n")
        with pytest.raises(RunError, match=said):
            plan(rounds / "tiny.yml", rounds / "notebooks", rounds / "runs/tiny")


def test_all_goes_to_every_notebook_that_has_the_name_and_a_section_overrides_it(chain: Path) -> None:
    (chain / "tiny.yml").write_text("01_make:\n  seed: 5\nall:\n  seed: 3\n  count: 12\n02_double:\n")
    given = check_params(chain / "tiny.yml", discover(chain / "notebooks"))
    assert given == {"01_make": {"seed": 5, "count": 12}, "02_double": {"seed": 3}, "03_total": {"seed": 3}}


def test_a_whole_number_serves_as_a_float_and_folders_of_earlier_phases_are_filled_in(chain: Path) -> None:
    (chain / "tiny.yml").write_text("01_make:\n  scale: 2\n")
    make, double, _ = plan(chain / "tiny.yml", chain / "notebooks", chain / "runs/tiny")
    assert isinstance(make.values["scale"], float)
    assert double.values["make_dir"] == str(chain / "runs/tiny/01_make")


def test_the_command_line_names_the_mistake_and_exits_with_2(chain: Path) -> None:
    (chain / "tiny.yml").write_text("01_make:\n  cuont: 3\n")
    ended = subprocess.run(_command(chain), capture_output=True, text=True)
    assert ended.returncode == 2
    assert "did you mean `count`?" in ended.stderr
    assert "Traceback" not in ended.stderr


# -- skip, rerun, reasons -----------------------------------------------------------------------------------------


def test_a_complete_run_is_skipped_and_each_change_reruns_what_depends_on_it(chain: Path) -> None:
    status, printed = go(chain)
    assert status == 0
    assert all(word.startswith("done") for word in words(printed).values())
    first = outputs(chain)
    assert all(word.startswith("skipped") for word in words(go(chain)[1]).values())

    folder = chain / "runs/tiny"
    (folder / "02_double/doubled.txt").write_text("0")  # tampered with
    plain = words(go(chain, dry_run=True)[1])
    assert plain["02"] == "would run   output doubled.txt was changed"
    assert plain["03"] == "would run   02_double runs before it"
    printed = go(chain)[1]
    assert words(printed)["02"].startswith("done")
    assert words(printed)["03"].startswith("skipped")  # the same bytes came out again
    assert outputs(chain) == first

    (folder / "01_make/part/7.txt").unlink()
    assert words(go(chain, dry_run=True)[1])["01"] == "would run   output part/7.txt is missing"
    shutil.rmtree(folder / "03_total")
    (chain / "tiny.yml").write_text("all:\n  seed: 3\n01_make:\n  scale: 2.0\n")
    plain = words(go(chain, dry_run=True)[1])
    assert plain["01"] == "would run   parameter scale changed: 1.5 → 2.0"
    assert plain["03"] == "would run   not run yet"
    edit(chain / "notebooks/02_double.ipynb", "2 * part", "part + part")
    assert words(go(chain, dry_run=True)[1])["02"] == "would run   the notebook changed"


def test_only_from_skip_and_force_choose_phases(chain: Path) -> None:
    with pytest.raises(RunError, match="02_double reads `make_dir`.*not complete"):
        go(chain, first="2")
    assert list(words(go(chain, only="01")[1])) == ["01"]
    (chain / "tiny.yml").write_text("skip: [03_total]\nall:\n  seed: 3\n")
    assert list(words(go(chain, first="02_double")[1])) == ["02"]
    plain = words(go(chain, dry_run=True, force=True)[1])
    assert plain == {"01": "would run   forced", "02": "would run   forced"}
    assert list(words(go(chain, only="3", dry_run=True)[1])) == ["03"]
    with pytest.raises(RunError, match="no phase `9`"):
        go(chain, only="9")


def test_a_second_run_in_the_same_folder_is_refused(chain: Path) -> None:
    (chain / "runs/tiny").mkdir(parents=True)
    with FileLock(chain / "runs/tiny/.lock"), pytest.raises(RunError, match="another run is at work"):
        go(chain)


def test_a_phase_depends_on_the_modules_it_can_reach_lazy_imports_included(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    sources = {
        "__init__": "",
        "top": "import pack.far\nfrom pack import other, plots",
        "far": "def f():\n    from pack.lazy import g",
        "lazy": "import os",
        "other": "",
        "alone": "",
        "plots": "from pack import alone",  # shows only, and so does what it needs
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    found = manifest.reachable("from pack import top\nimport numpy", package)
    assert [path.stem for path in found] == ["far", "lazy", "other", "top"]


# -- keys: what can change an output, and nothing else -------------------------------------------------------------


@pytest.fixture
def package(chain: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of erlib to change, so that keys are taken of it; 01_make reads `task/metrics`, 02_double the world."""
    copy = chain / "erlib"
    shutil.copytree(manifest.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(manifest, "PACKAGE", copy)
    start = "from erlib.chain import run\nphase = run.start('{name}', globals())"
    write_notebook(
        chain / "notebooks/01_make.ipynb",
        'out = "x/01_make"  # written\ncount = 40  # numbers\nseed = 0  # first',
        f"from erlib import plots\nfrom erlib.task import metrics\n{start.format(name='01_make')}",
        "numbers = range(count)",
        "phase.finish([], metrics={})",
        prose="The numbers are made.",
    )
    write_notebook(
        chain / "notebooks/02_double.ipynb",
        'out = "x/02_double"\nseed = 0',
        f"from erlib.world import posts\n{start.format(name='02_double')}",
    )
    write_notebook(
        chain / "notebooks/03_total.ipynb",
        'out = "x/03_total"\nlocal_model = "embedded"\nseed = 0',
        start.format(name="03_total"),
    )
    return copy


def keys(chain: Path) -> dict[str, str]:
    """Each phase's key, by number."""
    jobs = plan(chain / "tiny.yml", chain / "notebooks", chain / "runs/tiny")
    return {job.name[:2]: manifest.dependencies(job.notebook, job.values)["key"] for job in jobs}


ONLY_SHOWN = [
    "plots",
    "__main__",
    *(f"chain/{name}" for name in ("calls", "pages", "plan", "results", "runner", "tables")),
]
CHANGES = [
    ("erlib/task/metrics.py", "import re", "import re\nEXTRA = 1", ["01"]),
    ("erlib/task/metrics.py", "import re", "# a comment\nimport re", []),
    ("erlib/task/metrics.py", '"""', '"""Said otherwise. ', []),
    ("erlib/task/schema.py", "class Brief", "EXTRA = 1\n\n\nclass Brief", ["01", "02"]),
    ("erlib/chain/verdict.py", "import math", "import math\nEXTRA = 1", ["01", "02", "03"]),
    ("erlib/world/posts.py", "import random", "import random\nEXTRA = 1", ["02"]),
    ("erlib/world/world.yml", "\n", "\n# more\n", ["02"]),
    ("erlib/world/base_model/config.json", "{", "{ ", ["03"]),
    *((f"erlib/{name}.py", "\ndef ", "\nEXTRA = 1\n\n\ndef ", []) for name in ONLY_SHOWN),
    ("erlib/chain/templates/report.css", "body", "html", []),
    ("notebooks/01_make.ipynb", "range(count)", "range(count + 0)", ["01"]),
    ("notebooks/01_make.ipynb", "range(count)", "range(count)  # a comment", []),
    ("notebooks/01_make.ipynb", "# numbers", "# how many numbers", []),
    ("notebooks/01_make.ipynb", "The numbers are made.", "Numbers.", []),
]


def test_a_phase_reruns_for_what_can_change_its_outputs_and_for_nothing_else(package: Path) -> None:
    before = keys(package.parent)
    for name, old, new, rerun in CHANGES:
        path = package.parent / name
        text = path.read_text()
        assert old in text, (name, old)
        path.write_text(text.replace(old, new, 1))
        after = keys(package.parent)
        assert [number for number in before if before[number] != after[number]] == rerun, (name, new)
        path.write_text(text)
    assert keys(package.parent) == before


def test_versions_count_where_the_package_computes(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, installed = keys(chain), manifest.versions()
    monkeypatch.setattr(manifest, "versions", lambda: dict(installed) | {"matplotlib": "9", "jupyterlab": "9"})
    assert keys(chain) == before
    monkeypatch.setattr(manifest, "versions", lambda: dict(installed) | {"torch": "9"})
    assert all(key != before[number] for number, key in keys(chain).items())


def test_what_an_earlier_phase_says_counts_for_those_that_read_it(chain: Path) -> None:
    made = chain / "runs/tiny/01_make"
    made.mkdir(parents=True)
    said = {"outputs": {"x.txt": "0"}, "params": {"seed": 0}, "inputs": {"documents.jsonl": "1"}, "verdict": []}
    manifest.write_manifest(made, said)
    before = keys(chain)
    manifest.write_manifest(made, said | {"seconds": 9, "finished": "later"})
    assert keys(chain) == before
    for change in ({"params": {"seed": 1}}, {"inputs": {"documents.jsonl": "2"}}, {"verdict": [{"check": "x"}]}):
        manifest.write_manifest(made, said | change)
        after = keys(chain)
        assert [number for number in before if before[number] != after[number]] == ["02"], change


def test_a_phase_that_is_read_as_it_is_although_it_would_run_again_is_named(chain: Path) -> None:
    assert go(chain)[0] == 0
    assert "as it is" not in go(chain, first="03")[1]
    edit(chain / "notebooks/02_double.ipynb", "2 * part", "2.0 * part")
    printed = go(chain, first="03", dry_run=True)[1]
    assert "02_double is read as it is, and would run again: the notebook changed" in printed


def test_a_file_named_by_a_parameter_is_an_input(chain: Path) -> None:
    file = chain / "documents.jsonl"
    file.write_text("{}\n")
    notebook = write_notebook(chain / "notebooks/04_read.ipynb", 'out = "x/04_read"\ndocuments = ""\nseed = 0')
    values = {"out": "x/04_read", "documents": str(file), "seed": 0}
    before = manifest.dependencies(notebook, values)
    file.write_text("{} \n")
    after = manifest.dependencies(notebook, values)
    assert before["inputs"].keys() == after["inputs"].keys() == {str(file)}
    assert before["key"] != after["key"]
    assert before["key"] != manifest.dependencies(notebook, values | {"seed": 1})["key"]


# -- rounds -------------------------------------------------------------------------------------------------------

ROUNDS = ["01", "round-1/04", "round-1/07", "round-2/04", "round-2/07", "08"]


def test_rounds_repeat_their_phases_and_the_runner_fills_in_whose_folders_they_read(rounds: Path) -> None:
    folder = rounds / "runs/tiny"
    jobs = {job.label: job for job in plan(rounds / "tiny.yml", rounds / "notebooks", folder)}
    assert [re.sub(r"_\w+$", "", label) for label in jobs] == ROUNDS
    first, second, compare = jobs["round-1/04_draw"], jobs["round-2/04_draw"], jobs["08_compare"]
    assert (first.values["previous_dir"], first.values["round_number"]) == ("", 1)
    assert (second.values["previous_dir"], second.values["round_number"]) == (str(folder / "round-1/07_learn"), 2)
    assert first.values["make_dir"] == second.values["make_dir"] == str(folder / "01_make")
    assert jobs["round-2/07_learn"].values["draw_dir"] == str(folder / "round-2/04_draw")
    assert second.upstream == ["01_make", "round-1/07_learn"]
    assert compare.values["learn_dir"] == str(folder / "round-2/07_learn")
    assert compare.values["learn_dirs"] == [str(folder / f"round-{number}/07_learn") for number in (1, 2)]

    (rounds / "tiny.yml").write_text("08_compare:\n  learn_dirs: [elsewhere]\n")  # `rounds` is one unless it is set
    jobs = plan(rounds / "tiny.yml", rounds / "notebooks", folder)
    assert [job.label for job in jobs] == ["01_make", "round-1/04_draw", "round-1/07_learn", "08_compare"]
    assert jobs[-1].values["learn_dirs"] == ["elsewhere"]
    edit(rounds / "notebooks/08_compare.ipynb", r"learn_dirs = [\"x/07_learn\"]", "learn_dirs = []")
    (rounds / "tiny.yml").write_text("")
    jobs = plan(rounds / "tiny.yml", rounds / "notebooks", folder)
    assert jobs[-1].values["learn_dirs"] == []  # empty in the notebook: the user's to fill


@pytest.mark.slow
def test_rounds_hand_on_rerun_and_are_chosen_by_name(rounds: Path) -> None:
    with pytest.raises(RunError, match="round-1/07_learn reads `draw_dir`.*not complete"):
        go(rounds, only="7")
    with pytest.raises(RunError, match="08_compare reads `learn_dirs` = .*round-1/07_learn, which is not complete"):
        go(rounds, only="08")
    status, printed = go(rounds)
    assert (status, list(words(printed))) == (0, ROUNDS)
    written = (rounds / "runs/tiny/08_compare/models.txt").read_text()
    assert written == "learned 12.0 1; learned learned 12.0 1 2"
    assert all(word.startswith("skipped") for word in words(go(rounds)[1]).values())

    forced = {"force": True, "dry_run": True}
    assert list(words(go(rounds, first="04", **forced)[1])) == ROUNDS[1:]
    assert list(words(go(rounds, first="round-2/4", **forced)[1])) == ROUNDS[3:]
    assert list(words(go(rounds, only="7", **forced)[1])) == ["round-1/07", "round-2/07"]
    assert list(words(go(rounds, only="round-2/07_learn", **forced)[1])) == ["round-2/07"]
    for wrong, meant in {"round-2/07_laern": "round-2/07_learn", "7_learn": "07_learn", "round-3/07_learn": ""}.items():
        with pytest.raises(RunError, match=f"no phase `{wrong}`; did you mean `{meant}"):
            go(rounds, first=wrong)

    (rounds / "runs/tiny/round-1/07_learn/model.txt").write_text("tampered with")
    plain = words(go(rounds, dry_run=True)[1])
    assert plain["round-1/04"].startswith("skipped")
    assert plain["round-1/07"] == "would run   output model.txt was changed"
    assert plain["round-2/04"] == "would run   round-1/07_learn runs before it"
    edit(rounds / "notebooks/04_draw.ipynb", "{round_number}", "{-round_number}")
    assert go(rounds, only="round-1/04")[0] == 0
    assert go(rounds, only="round-1/07")[0] == 0
    reason = words(go(rounds, only="08", dry_run=True)[1])["08"]
    changed = rounds / "runs/tiny/round-1/07_learn/model.txt"
    assert reason == f"would run   input {changed} changed"  # also what only `learn_dirs` names is hashed


@pytest.mark.slow
def test_a_gate_in_a_round_stops_the_run_there_and_the_index_shows_each_round(rounds: Path) -> None:
    (rounds / "tiny.yml").write_text("rounds: 3\n07_learn:\n  most: 0\n")
    status, printed = go(rounds)
    assert (status, list(words(printed))) == (3, ROUNDS[:3])
    assert "✗ missed: round = 1 (target <= 0)" in printed
    (rounds / "tiny.yml").write_text("rounds: 2\n07_learn:\n  most: 1\n")
    status, printed = go(rounds, past_gates=True)
    assert (status, list(words(printed))) == (3, ROUNDS)
    assert words(printed)["round-1/07"].startswith("done")
    assert words(printed)["round-2/07"].startswith("failed gate")

    folder = rounds / "runs/tiny"
    page = BeautifulSoup((folder / "index.html").read_text(), "html.parser")
    rows = [" ".join(cell.text for cell in row("td")[:3]) for row in page.find("table")("tr")[1:]]
    assert rows == [
        *("01_make  done", "04_draw 1 done", "07_learn 1 done", "04_draw 2 done", "07_learn 2 failed gate"),
        "08_compare  done",
    ]
    heads = [row("td")[3].text for row in page.find("table")("tr")[1:]]
    assert (heads[2], heads[4]) == ("learned", "round")  # a missed check comes before the first one
    links = [link["href"] for link in page("a")]
    assert len(links) == 2 * len(rows)
    assert all((folder / link).is_file() for link in links)
    for report in folder.rglob("*.html"):
        if report.name != "index.html":
            link = BeautifulSoup(report.read_text(), "html.parser").find("a")["href"]
            assert (report.parent / link).resolve() == folder / "index.html"
    assert "04_draw, round 2: done" in (folder / "round-2/04_draw.html").read_text()


# -- how phases end -----------------------------------------------------------------------------------------------


def test_a_failed_gate_stops_the_run_after_its_report(chain: Path) -> None:
    (chain / "tiny.yml").write_text("02_double:\n  seed: 1\n03_total:\n  limit: 1.0e+9\n")
    edit(chain / "notebooks/02_double.ipynb", "run.check('parts', len(parts))", "run.check('parts', 1, target='> 3')")
    status, printed = go(chain)
    assert status == runner.EXIT["failed_gate"] == 3
    assert "✗ missed: parts = 1 (target > 3)" in printed
    assert "targets: 1 met, 0 undecided, 1 missed" in printed
    assert "03" not in words(printed)
    assert read_manifest(chain / "runs/tiny/02_double")["status"] == "failed_gate"
    assert "failed gate" in (chain / "runs/tiny/02_double.html").read_text()
    assert words(go(chain, dry_run=True)[1])["02"] == "would run   ended with failed gate last time"
    assert go(chain, first="3")[0] == 3  # going on from a failed gate is the user's decision
    status, lines = go(chain, past_gates=True)
    assert status == 3 and words(lines)["02"].startswith("skipped")  # gone past, and still failed


def test_a_missed_target_that_is_no_gate_is_shown_and_the_run_goes_on(chain: Path) -> None:
    edit(
        chain / "notebooks/02_double.ipynb",
        "run.check('parts', len(parts))",
        "run.check('parts', 1, target='>= 2', gate=False)",
    )
    status, printed = go(chain)
    assert status == runner.EXIT["done"]
    assert "0 met, 0 undecided, 1 missed; ✗ missed (not a gate): parts = 1 (target >= 2)" in printed
    manifest = read_manifest(chain / "runs/tiny/02_double")
    row = manifest["verdict"][0]
    assert (manifest["status"], row["outcome"], row["gate"]) == ("done", "missed", False)
    assert "missed (not a gate)" in (chain / "runs/tiny/index.html").read_text()


def test_errors_dead_kernels_and_forgotten_finishes_end_with_a_manifest_and_a_report(chain: Path) -> None:
    for cell, message in {
        "raise ValueError('a <b>bad</b> row')": "ValueError: a <b>bad</b> row",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "DeadKernelError",
        "pass": "ended without phase.finish",
    }.items():
        write_notebook(
            chain / "notebooks/01_make.ipynb", 'out = "x/01_make"\nseed = 0', START.format(name="01_make"), cell
        )
        status, printed = go(chain, only="1")
        assert status == 1
        assert message in printed
        found = read_manifest(chain / "runs/tiny/01_make")
        assert found["status"] == "error"
        assert message in found["note"]
        assert "<b>bad" not in (chain / "runs/tiny/01_make.html").read_text()
        assert "error" in (chain / "runs/tiny/index.html").read_text()


def test_a_pause_keeps_outputs_and_says_what_is_missing(chain: Path) -> None:
    write_notebook(
        chain / "notebooks/01_make.ipynb",
        'out = "x/01_make"\nseed = 0',
        START.format(name="01_make"),
        "phase.path('a.txt').write_text('kept')\nphase.pause(missing=12, command='make annotate')",
        "raise RuntimeError('not reached')",
    )
    status, printed = go(chain, only="1")
    assert status == runner.EXIT["paused"] == 4
    assert "12 judgements are missing: make annotate" in printed
    found = read_manifest(chain / "runs/tiny/01_make")
    assert (found["status"], found["metrics"], list(found["outputs"])) == ("paused", {"missing": 12}, ["a.txt"])


def test_the_manifest_has_what_a_reviewer_asks_for_and_the_reports_make_no_request(chain: Path) -> None:
    write_notebook(
        chain / "notebooks/01_make.ipynb",
        'out = "x/01_make"\nseed = 7',
        START.format(name="01_make"),
        "import matplotlib.pyplot as plt\nfigure, _ = plt.subplots()\nphase.show(figure, alt='A \"flat\" line')",
        "from IPython.display import HTML\nHTML('<script src=\"https://example.org/x.js\"></script><b>bold</b>')",
        "import numpy as np\nchecks = [run.check('f1', np.float32(.5), low=.4, high=.6, target='>= 0.5')]\n"
        "phase.finish(checks + [run.check('none', float('nan'))], metrics={'f1': np.float64(.5), 'odd': float('inf')})",
    )
    (chain / "tiny.yml").write_text("")
    assert go(chain, only="1")[0] == 0
    found = read_manifest(chain / "runs/tiny/01_make")
    assert found.keys() >= {
        "phase", "status", "params", "verdict", "metrics", "inputs", "outputs", "seconds", "peak_rss_mb", "versions",
        "seed", "commit", "device",
    }  # fmt: skip
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert found["verdict"][0] == {"check": "f1", **interval, "target": ">= 0.5", "outcome": "undecided", "gate": True}
    assert found["metrics"] == {"f1": 0.5, "odd": None}
    assert (found["seed"], found["simulated"]) == (7, True)
    assert found["versions"]["papermill"]

    html = (chain / "runs/tiny/01_make.html").read_text()
    index = (chain / "runs/tiny/index.html").read_text()
    assert 'alt="A &quot;flat&quot; line"' in html or "alt='A \"flat\" line'" in html
    assert html.count("<details>") == 6  # the code is folded away (one cell is papermill's)
    for page in (html, index):
        soup = BeautifulSoup(page, "html.parser")
        assert not soup(["script", "link", "iframe", "form", "object"])
        assert all(image["src"].startswith("data:") for image in soup("img"))
        assert all("@import" not in style.text and "url(" not in style.text for style in soup("style"))
        assert "default-src 'none'" in page
        assert "simulated" in page
    assert "&gt;= 0.5" in index
    table = BeautifulSoup(html, "html.parser").find("table", class_="dataframe")
    assert [cell.text for cell in table.find("tbody")("td")] == [
        "0.5",
        "0.4 to 0.6",
        ">= 0.5",
        "○ undecided",
        "undefined",
        *3 * [""],
    ]


# -- by hand, by papermill ----------------------------------------------------------------------------------------


def test_the_printed_papermill_commands_do_what_the_runner_does(rounds: Path) -> None:
    jobs = plan(rounds / "tiny.yml", rounds / "notebooks", rounds / "runs/tiny")
    printed = go(rounds, dry_run=True)[1]
    for job in jobs[:2]:  # the first round's first phase is the second
        assert runner.command(job) in printed
        subprocess.run(runner.command(job), shell=True, cwd=manifest.ROOT, check=True, capture_output=True)
        assert words(go(rounds, only=job.label)[1]).popitem()[1].startswith("skipped")
        assert job.html.is_file()


def test_cell_by_cell_by_hand(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain / "notebooks")
    cell = {"out": str(chain / "hand/01_make"), "count": 40, "scale": 1.5, "seed": 0, "other": object()}
    phase = run.start("01_make", cell)
    assert Path.cwd() == manifest.ROOT
    phase.path("deep/a.txt").write_text("a")
    monkeypatch.chdir(chain / "notebooks")
    phase = run.start("01_make", cell)  # the cell run again: a fresh folder
    phase.path("b.txt").write_text("b")
    phase.cache("kept").joinpath("c").write_text("c")
    table = phase.finish([run.check("n", 3, target="== 3"), run.check("m", 0.25, low=0.1, high=0.5)], metrics={"n": 3})
    assert table.to_dict("list") == {
        "value": ["3", "0.25"], "95 % interval": ["", "0.1 to 0.5"], "target": ["== 3", ""], "outcome": ["✓ met", ""]
    }  # fmt: skip
    assert list(read_manifest(chain / "hand/01_make")["outputs"]) == ["b.txt"]
    with pytest.raises(RunError, match="has ended already"):
        phase.finish([], metrics={})

    monkeypatch.chdir(chain / "notebooks")
    with pytest.raises(RunError, match="`seed` is not set: run the parameters cell first"):
        run.start("01_make", {"out": "hand/01_make", "count": 1, "scale": 1.0})
    with pytest.raises(RunError, match="must end with /01_make"):
        run.start("01_make", cell | {"out": str(chain)})
    with pytest.raises(RunError, match="`count`: expected int"):
        run.start("01_make", cell | {"count": "many"})
    double = {"out": str(chain / "hand/02_double"), "make_dir": str(chain / "hand/00"), "seed": 0}
    with pytest.raises(RunError, match="`make_dir`.*not complete"):
        run.start("02_double", double)
    write_notebook(chain / "notebooks/08_compare.ipynb", 'out = "x/08_compare"\nlearn_dirs = ["x/07_learn"]\nseed = 0')
    compare = {
        "out": str(chain / "hand/08_compare"),
        "learn_dirs": [str(chain / "hand/01_make"), "y/07_learn"],
        "seed": 0,
    }
    monkeypatch.chdir(chain / "notebooks")
    with pytest.raises(RunError, match="`learn_dirs` = 'y/07_learn' is not complete.*runs/default/round-1/07_learn"):
        run.start("08_compare", compare)


# -- kills --------------------------------------------------------------------------------------------------------


def _command(chain: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "erlib", "run", str(chain / "tiny.yml")]
    return [*words, "--notebooks", str(chain / "notebooks"), "--runs", str(chain / "runs"), *options]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the package catches it."""


def test_killed_before_any_change_to_the_disk_a_phase_is_never_half_complete(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = chain / "runs/tiny/01_make", {"left": 0}

    def work(seed: int) -> None:
        os.chdir(chain / "notebooks")
        phase = run.start("01_make", {"out": str(out), "count": 1, "scale": 1.0, "seed": seed})
        phase.path("a.txt").write_text(f"of seed {seed}")
        phase.finish([], metrics={})

    def counted(change):
        def step(*args, **options):
            steps["left"] -= 1
            if steps["left"] < 0:
                raise Killed
            return change(*args, **options)

        return step

    work(seed=1)
    for owner, name in [(Path, "unlink"), (Path, "mkdir"), (Path, "replace"), (Path, "write_text"), (shutil, "rmtree")]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    for instant in range(20):
        steps["left"] = instant
        try:
            work(seed=2 + instant)
        except Killed:
            found = read_manifest(out)
            seed = found and found["seed"]
            assert seed in (None, 1)  # the old result, whole, or none
            assert found is None or (out / "a.txt").read_text() == "of seed 1"
        else:
            break
        steps["left"] = 1000
        work(seed=1)  # goes on
        assert manifest.damaged(out, read_manifest(out)) is None
    assert 8 < instant < 19
    assert read_manifest(out)["seed"] == 2 + instant


@pytest.mark.slow
def test_killed_at_random_instants_the_run_resumes_to_the_same_result(rounds: Path) -> None:
    undisturbed = rounds / "undisturbed"
    shutil.copytree(rounds, undisturbed, ignore=shutil.ignore_patterns("undisturbed"))
    began = time.monotonic()
    assert subprocess.run(_command(undisturbed), capture_output=True).returncode == 0
    seconds = time.monotonic() - began

    draw = random.Random(20)
    for instant in [draw.uniform(0.1, 0.9) * seconds for _ in range(2)]:
        process = subprocess.Popen(_command(rounds), stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(instant)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for found in (rounds / "runs/tiny").rglob("manifest.json"):  # what says "complete" is complete
            assert json.loads(found.read_text())["status"] == "done"
            assert manifest.damaged(found.parent, json.loads(found.read_text())) is None
    assert subprocess.run(_command(rounds), capture_output=True).returncode == 0
    assert outputs(rounds) == outputs(undisturbed)
    assert not list((rounds / "runs/tiny").rglob("*.tmp"))
    assert {path.suffix for path in (rounds / "notebooks").iterdir()} == {".ipynb"}  # only the notebooks: no sockets
    assert subprocess.run(_command(rounds, "--dry-run"), capture_output=True, text=True).stdout.count(" skipped ") == 6
