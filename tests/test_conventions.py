"""What notebooks, modules, params files and packaging keep to, so that a reader finds the same shape everywhere."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from erlib.chain.manifest import COMPUTING, PACKAGE, ROOT, folders, parameters
from erlib.chain.plan import check_params, discover, rounds, skipped
from erlib.reports import teacher
from erlib.reports.meter import Limits

# A folder imports only the folders before it; `plots` turns DataFrames into figures and knows no other module.
FOLDERS = [
    *("task", "chain", "documents", "lm", "reports", "judgements", "rewards"),
    *("policy", "serving", "watch", "world", "benchmarks"),
]
LIGHT = ["task", "chain", "documents", "watch", "plots", "__main__"]  # these import without torch
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted(PACKAGE.rglob("*.py"))
PARAMS = sorted(path for path in (ROOT / "params").glob("*.yml") if not path.name.startswith("brief"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
}


def stem(path: Path) -> str:
    return path.stem


def cells(notebook: Path) -> list[dict]:
    return [cell | {"source": "".join(cell["source"])} for cell in json.loads(notebook.read_text())["cells"]]


def code_cells(notebook: Path) -> list[dict]:
    return [cell for cell in cells(notebook) if cell["cell_type"] == "code"]


def plain(source: str) -> str:
    """A cell's source without IPython's magics, so that it parses."""
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


# -- notebooks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=stem)
def test_a_notebook_defines_nothing(notebook: Path) -> None:
    for cell in code_cells(notebook):
        tree = ast.parse(plain(cell["source"]))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=stem)
def test_a_notebook_is_stored_without_results_for_the_python3_kernel(notebook: Path) -> None:
    assert json.loads(notebook.read_text())["metadata"]["kernelspec"]["name"] == "python3"
    for cell in code_cells(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=stem)
def test_a_notebook_goes_from_its_question_to_its_verdict(notebook: Path) -> None:
    every, code = cells(notebook), code_cells(notebook)
    title = every[0]["source"]
    assert every[0]["cell_type"] == "markdown"
    assert re.match(rf"# {notebook.stem[:2]} .*\?", title), "the title asks the phase's question"
    assert all(re.search(rf"\b{word}\b", title, re.I) for word in ("reads", "writes", "time", "learn")), title
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert f'run.start("{notebook.stem}", globals()' in code[1]["source"]
    assert "phase.finish(" in code[-1]["source"]
    assert every[-1]["cell_type"] == "markdown"
    assert "Try next" in every[-1]["source"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=stem)
def test_the_parameters_cell_explains_each_literal_and_reads_only_earlier_phases(notebook: Path) -> None:
    for line in code_cells(notebook)[0]["source"].splitlines():
        assert re.match(r"\w+ = .+  # \S", line), f"{line!r} lacks its trailing comment"
    values = parameters(notebook)
    assert values["out"] == f"runs/manual/{notebook.stem}"
    assert isinstance(values["seed"], int)
    earlier = {f"{path.stem[3:]}_dir": path.stem for path in NOTEBOOKS if path.stem < notebook.stem}
    for name, folder in folders(values):
        phase = earlier[name.removesuffix("s")]
        place = r"(round-\d+/)?" if name.endswith("_dirs") else ""
        assert re.fullmatch(rf"runs/manual/{place}{phase}", folder), f"{name} = {folder!r}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=stem)
def test_every_parameter_is_used(notebook: Path) -> None:
    body = "\n".join(plain(cell["source"]) for cell in code_cells(notebook)[1:])
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)} | {"out", "allow_download"}
    used |= {"seed"} if "phase.seed" in body else set()
    if "teacher.connection(phase.params)" in body:
        used |= set(re.findall(r"params\[\"(\w+)\"\]", inspect.getsource(teacher.connection)))
    assert parameters(notebook).keys() <= used


# Settings of functions that notebooks call and that no notebook sets, and why it does not.
UNSET = {
    "level, samples": "intervals are of 95 % everywhere, from resamples enough for two digits",
    "stop, form, by, column": "one form of report holds for the whole recipe",
    "device": "found by itself",
    "chat": "a merged checkpoint keeps the choice that 03 takes from the params",
    "temperature, seed, n, limit, after, dates, expected, seconds": "set where another than the usual is meant",
    "output_tokens": "an expectation, shown before the first request; the budget rests on the worst case",
    "batch_size": "of what is done once on few rows; the result does not depend on it",
    "allow_download, quantisation, compute_dtype, threads, block, wait_seconds": "how, not what; no matter of scale",
}
WORLD = ("world.", "benchmarks.")  # the embedded world is as it is, so that results can be compared


def settings_passed() -> dict[str, tuple[inspect.Signature, set[str]]]:
    """The erlib functions that notebooks call: signature, and the names of the arguments that any notebook gives."""
    found: dict[str, tuple[inspect.Signature, set[str]]] = {}
    for notebook in NOTEBOOKS:
        tree = ast.parse("\n".join(plain(cell["source"]) for cell in code_cells(notebook)))
        known = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("erlib"):
                for alias in node.names:
                    module = importlib.import_module(node.module)
                    whole = f"{node.module}.{alias.name}"
                    known[alias.name] = getattr(module, alias.name, None) or importlib.import_module(whole)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = known.get(node.func.id) if isinstance(node.func, ast.Name) else None
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                function = getattr(known.get(node.func.value.id), node.func.attr, None)
            if not callable(function) or not function.__module__.startswith("erlib."):
                continue
            name = f"{function.__module__.removeprefix('erlib.')}.{function.__qualname__}"
            signature, given = found.setdefault(name, (inspect.signature(function), set()))
            given.update(list(signature.parameters)[: len(node.args)])
            given.update(keyword.arg for keyword in node.keywords if keyword.arg)
    return found


def test_every_setting_of_what_a_notebook_calls_can_be_set_by_params() -> None:
    known = {name for names in UNSET for name in names.split(", ")}
    unset = {
        f"{name}({setting.name})"
        for name, (signature, given) in settings_passed().items()
        for setting in signature.parameters.values()
        if isinstance(setting.default, int | float | str | tuple) and setting.name not in given | known
        if not name.startswith((*WORLD, "plots.", "chain."))
    }
    assert not unset


def test_every_setting_of_the_connection_is_a_parameter_of_the_phases_that_connect() -> None:
    read = set(re.findall(r"params\[\"(\w+)\"\]", inspect.getsource(teacher.connection)))
    for name in ("01_prompts", "02_corpus"):
        assert read <= parameters(ROOT / "notebooks" / f"{name}.ipynb").keys()
    source = inspect.getsource(teacher.connection)
    fields = [field.name for part in (Limits, teacher.Connection) for field in dataclasses.fields(part)]
    left = [name for name in fields if not re.search(rf"\b{name}=", source)]
    assert left == ["backoff"]  # the pauses grow by themselves


def bound(cell: dict) -> set[str]:
    """The names that a cell binds: assignments and imports, without loop variables and `_`, which nobody reads."""
    names: set[str] = set()
    tree = ast.parse(plain(cell["source"]))
    loops = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.For) for inner in ast.walk(node.target)}
    hidden = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.comprehension) for inner in ast.walk(node.target)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in loops | hidden:
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names - {"_"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=stem)
def test_no_name_is_bound_in_two_cells(notebook: Path) -> None:
    places: dict[str, list[int]] = {}
    for number, cell in enumerate(code_cells(notebook)):
        for name in bound(cell):
            places.setdefault(name, []).append(number)
    assert {name: cells for name, cells in places.items() if len(cells) > 1} == {}


@pytest.mark.parametrize("params", PARAMS, ids=stem)
def test_params_files_fit_the_notebooks(params: Path) -> None:
    phases = discover(ROOT / "notebooks")
    check_params(params, phases)
    skipped(params, list(phases))
    assert rounds(params) >= 1


# -- modules ------------------------------------------------------------------------------------------------------


def imported(module: Path) -> set[str]:
    """The dotted names below erlib that a module imports, lazy ones included, those for types only left out."""
    tree = ast.parse(module.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    ignored = {id(inner) for node in typing_only for inner in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in ignored:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in ignored:
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("erlib.") for name in names if name.startswith("erlib.")}


def place(module: Path) -> str:
    """A module as its folder and name: `task/metrics`."""
    return module.relative_to(PACKAGE).with_suffix("").as_posix()


def test_every_folder_has_its_place_and_says_what_comes_in_and_what_goes_out() -> None:
    assert {path.parent.name for path in MODULES} - {PACKAGE.name} == set(FOLDERS)
    for folder in FOLDERS:
        said = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
        assert len([line for line in said.splitlines() if line]) == 3, folder
        assert "In: " in said
        assert "Out: " in said


@pytest.mark.parametrize("module", MODULES, ids=place)
def test_a_folder_imports_only_folders_above_it(module: Path) -> None:
    folders = {name.split(".")[0] for name in imported(module)}
    if module.parent == PACKAGE:  # plots knows nobody, the command line everybody but the world
        assert folders <= (set() if module.stem == "plots" else set(FOLDERS) - {"world"})
    else:
        assert folders <= set(FOLDERS[: FOLDERS.index(module.parent.name) + 1])


def test_the_modules_of_a_folder_import_each_other_in_one_direction() -> None:
    for folder in FOLDERS:
        inside = {path.stem: imported(path) for path in (PACKAGE / folder).glob("*.py")}
        edges = {
            name: {part[1] for each in found if (part := each.split("."))[0] == folder and part[1] in inside}
            for name, found in inside.items()
        }
        graphlib.TopologicalSorter(edges).prepare()  # raises CycleError


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_notebooks_tests_and_the_world_itself_import_the_world(folder: str) -> None:
    if folder not in ("world", "benchmarks"):
        sources = "\n".join(path.read_text() for path in (PACKAGE / folder).glob("*.py"))
        assert "erlib.world" not in sources


@pytest.mark.parametrize("module", MODULES, ids=place)
def test_public_functions_state_their_contract_and_types(module: Path) -> None:
    tree = ast.parse(module.read_text())
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in tree.body:
        functions = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for function in functions:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                where = f"{module.name}:{function.lineno} {function.name}"
                assert function not in tree.body or ast.get_docstring(function), f"{where} has no docstring"
                assert function.returns is not None, f"{where} has no return type"
                typed = [*function.args.args, *function.args.kwonlyargs]
                assert all(each.annotation or each.arg in ("self", "cls") for each in typed), f"{where}: argument types"


def test_what_needs_no_torch_imports_without_it() -> None:
    light = [place(path) for path in MODULES if place(path).split("/")[0] in LIGHT and path.stem != "__init__"]
    names = ["erlib." + name.replace("/", ".") for name in light]
    source = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'sentence_transformers', 'litellm'}"
    ended = subprocess.run(
        [sys.executable, "-c", f"{source}print(sorted({heavy} & set(sys.modules)))"], capture_output=True, text=True
    )
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


# -- packaging and documents --------------------------------------------------------------------------------------


def test_the_pins_fit_the_ranges_and_belong_to_no_machine() -> None:
    extra = PYPROJECT["project"]["optional-dependencies"]["dev"]
    for text in PYPROJECT["project"]["dependencies"] + extra:
        requirement = Requirement(text)
        assert PINS[requirement.name] in requirement.specifier
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"\+|@|file:|://", text.split("\n", 1)[1])


def test_every_dependency_either_computes_and_is_in_the_key_or_is_known_not_to() -> None:
    otherwise = set("filelock httpx ipykernel jupyterlab matplotlib nbconvert papermill psutil rich typer".split())
    computing = {canonicalize_name(name) for name in COMPUTING}
    assert {Requirement(text).name for text in PYPROJECT["project"]["dependencies"]} - otherwise <= computing
    assert computing - {"python"} <= PINS.keys()


def test_conda_users_get_the_same_packages() -> None:
    found = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{PYPROJECT['project']['requires-python']}" in found
    assert {"pip", "cxx-compiler", "make"} <= {item for item in found if isinstance(item, str)}
    assert found[-1] == {"pip": ["-c constraints.txt", "-e .[dev,serve]"]}  # so they are pyproject.toml's


def test_the_readme_names_every_notebook_folder_and_params_file() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in [*FOLDERS, *(path.stem for path in [*NOTEBOOKS, *PARAMS])]:
        assert re.search(rf"\b{re.escape(name)}\b", readme), f"README.md does not name {name}"


def test_the_readme_names_no_file_that_is_not_there() -> None:
    readme = (ROOT / "README.md").read_text()
    folders, own = "(?:erlib|notebooks|params|tests)", "(?!my-|mine)"  # a reader's own files go by these names
    for name in re.findall(rf"\b{folders}/{own}[\w./-]+\.(?:py|ipynb|yml|md)\b", readme):
        assert (ROOT / name).is_file(), f"README.md names {name}"


def test_nothing_names_the_machine_it_was_written_on() -> None:
    suffixes = {".py", ".ipynb", ".yml", ".toml", ".md", ".txt", ".j2", ".css", ""}
    folders = [ROOT / name for name in ("erlib", "notebooks", "params", "tests", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.iterdir())
    for path in files:
        if path.is_file() and path.suffix in suffixes and path.name != Path(__file__).name and ".git" not in path.name:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"/(?:root|home/\w+|Users/\w+|work/(?:main|tmp|shared))/", text), path
