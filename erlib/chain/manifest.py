"""What a phase's result depends on, and whether it is intact: notebooks' parameters, hashes, manifests.

A phase may be skipped when its key (the hash of `dependencies`) stands in the manifest of its folder and every output
still has the hash that is written there. The key covers what can change an output and nothing else: not prose, comments
and docstrings of functions, not the modules and packages that only show.
"""

import ast
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent
MANIFEST = "manifest.json"
ROUND = ("04", "05", "06", "07")  # the phases of one RLHF round, by number; each round has a folder of its own


# These show and start what the others compute: no output of a phase depends on them.
SHOWING = {
    "__main__.py",
    "plots.py",
    *(f"chain/{name}.py" for name in ("calls", "pages", "plan", "results", "runner", "tables")),
}
# The packages whose version can change an output, as `constraints.txt` spells them; all versions stand in the manifest.
COMPUTING = set(
    (
        "accelerate annoy bitsandbytes datasets dspy dspy-ai huggingface_hub json_repair litellm nervaluate networkx "
        "numpy openvino openvino-genai openvino-tokenizers pandas patsy peft pyarrow pydantic pydantic_core python "
        "PyYAML RapidFuzz regex safetensors scikit-learn scipy sentence-transformers statsmodels tokenizers torch "
        "transformers trl"
    ).split()
)


# The parameter that names the file of people's judgements. It grows with every phase that people work for: what a phase
# took from it stands in its outputs, and what it may take later is no reason to run again.
KEPT = "kept_judgements"


class RunError(Exception):
    """A mistake that the user can fix; the message says where and how."""


# -- files and hashes ---------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hash one file's bytes (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """Hash every file below `folder` except its manifest: relative path → sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files if path != folder / MANIFEST}


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or, when killed, leave the old one as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json` into a phase's folder."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Read a phase's manifest; None where there is no readable one, which means that the phase is not complete."""
    try:
        return json.loads((ROOT / folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def damaged(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Name the first output that is missing or differs from its hash in the manifest; None when all are intact."""
    for name, digest in manifest["outputs"].items():
        path = folder / name
        if not path.is_file():
            return f"output {name} is missing"
        if sha256(path) != digest:
            return f"output {name} was changed"
    return None


def shown(path: Path) -> str:
    """Write a path relative to the repository root where it lies below it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


# -- notebooks and parameters -------------------------------------------------------------------------------------


def read_cells(notebook: Path) -> list[dict[str, Any]]:
    """Read a notebook's cells, each with its source as one text."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def is_tagged(cell: Mapping[str, Any], tag: str) -> bool:
    """Tell whether a cell has a tag."""
    return tag in cell["metadata"].get("tags", [])


def parameters(notebook: Path) -> dict[str, Any]:
    """Read the literals of the cell tagged `parameters`: name → default."""
    source = [cell["source"] for cell in read_cells(notebook) if is_tagged(cell, "parameters")]
    if len(source) != 1:
        raise RunError(f"{notebook}: expected one cell tagged `parameters`, found {len(source)}")
    values: dict[str, Any] = {}
    for statement in ast.parse(source[0]).body:
        try:
            (target,) = statement.targets
            values[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            line = ast.unparse(statement)
            raise RunError(f"{notebook}: the parameters cell may hold only `name = literal`, not: {line}") from None
    return values


def closest(name: str, known: Sequence[str]) -> str:
    """Word a did-you-mean for an unknown name, or list the known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"


def checked(value: Any, default: Any) -> Any:
    """Give `value` in the type of its `default` (whole numbers become floats); TypeError says what is wrong."""
    wanted = type(default)
    if default is None or (type(value) is wanted and wanted is not list):
        return value
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is list and isinstance(value, list):
        return [checked(item, default[0]) for item in value] if default else value
    got = f"{type(value).__name__} {value!r}{_hint(value, wanted)}"
    raise TypeError(f"expected {wanted.__name__} like {default!r}, got {got}")


def _hint(value: Any, wanted: type) -> str:
    """How to write what was meant: YAML 1.1 reads `No` as false, 2024-05-01 as a date, `1e-5` (no point) as text."""
    if value is None:
        return "; nothing is written after the colon"
    if wanted is str and isinstance(value, bool | int | float | datetime.date):
        return "; that is how YAML reads it: write the text in quotation marks"
    if wanted is list:
        return "; write the values in brackets, [a, b]"
    if wanted not in (int, float) or not isinstance(value, str):
        return ""
    try:
        return f"; YAML reads that as text, write {yaml.safe_dump(wanted(float(value))).split()[0]}"
    except (ValueError, OverflowError):
        return ""


# -- what a phase depends on --------------------------------------------------------------------------------------


def plain(source: str) -> str:
    """Leave IPython's magics out of a cell's source, so that it parses."""
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


@cache
def meaning(source: str) -> str:
    """Reduce source to what a result can depend on: no comment, no layout, no docstring of a function.

    Docstrings of classes stay: libraries such as DSPy make prompts of them.
    """
    tree = ast.parse(plain(source))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    magics = [line.strip() for line in source.splitlines() if line.lstrip().startswith(("%", "!"))]
    return "\n".join([ast.dump(tree), *magics])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _imports(source: str, package: str) -> frozenset[str]:
    """Dotted names below `package` that a piece of source imports, anywhere in it; the last part may be a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if name.startswith(f"{package}."))


def module_file(name: str, package: Path) -> Path | None:
    """Find the file of a dotted name below the package's parent, or of what holds it; None for a folder's docstring."""
    path = package.parent.joinpath(*name.split("."))
    for candidate in (path, path.parent):
        if candidate.with_suffix(".py").is_file():
            return candidate.with_suffix(".py")
    return None


def reachable(source: str, package: Path) -> list[Path]:
    """List the files of a package that `source` can reach through imports, lazy ones included, but for `SHOWING`."""
    found: set[Path] = set()
    waiting = set(_imports(source, package.name))
    while waiting:
        path = module_file(waiting.pop(), package)
        if path and path not in found and path.relative_to(package).as_posix() not in SHOWING:
            found.add(path)
            waiting |= _imports(path.read_text(encoding="utf-8"), package.name)
    return sorted(found)


@cache
def _strings(source: str) -> frozenset[str]:
    constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return frozenset(value for value in constants if isinstance(value, str))


def _data(module: Path) -> Iterator[Path]:
    """The data files that lie beside a module and that its source names, such as `world.yml`."""
    names = _strings(module.read_text(encoding="utf-8"))
    for path in module.parent.iterdir():
        if path.is_file() and path.suffix != ".py" and path.name in names:
            yield path


def code_cells(notebook: Path) -> list[str]:
    """List the sources of a notebook's code cells, without the parameters cell, whose values are parameters."""
    return [
        cell["source"]
        for cell in read_cells(notebook)
        if cell["cell_type"] == "code" and not is_tagged(cell, "parameters")
    ]


def _source(cells: Sequence[str], values: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the erlib modules that code cells can reach, of the data that those read, and of the base model."""
    found: dict[str, str] = {}
    for module in reachable("\n".join(plain(cell) for cell in cells), PACKAGE):
        found[module.relative_to(PACKAGE).as_posix()] = _hash(meaning(module.read_text(encoding="utf-8")))
        found |= {path.relative_to(PACKAGE).as_posix(): sha256(path) for path in _data(module)}
    if "embedded" in values.values() or any(re.search(r"""["']embedded["']""", cell) for cell in cells):
        base = PACKAGE / "world" / "base_model"
        found |= {f"world/base_model/{name}": digest for name, digest in hash_folder(base).items()}
    return found


@cache
def versions() -> Mapping[str, str]:
    """Installed versions of Python and of every package that `constraints.txt` pins."""
    names = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a pin for another platform
    return MappingProxyType(found)


def folders(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the earlier phases' folders that parameters name (`*_dir`, or a list in `*_dirs`): (parameter, folder)."""
    named = [(key, value) for key, value in values.items() if key.endswith(("_dir", "_dirs"))]
    return [(key, path) for key, value in named for path in (value if isinstance(value, list) else [value]) if path]


def _inputs(values: Mapping[str, Any]) -> dict[str, str]:
    """Hash what the parameters point at: earlier phases (`folders`) and existing files or folders.

    Of a phase its outputs count, and what its manifest says: later phases read parameters, verdicts, and through them
    the files that it read.
    """
    found: dict[str, str] = {}
    for _, folder in folders(values):
        manifest = read_manifest(folder) or {}
        found |= {f"{shown(ROOT / folder)}/{file}": digest for file, digest in manifest.get("outputs", {}).items()}
        said = [manifest.get(part) for part in ("params", "inputs", "verdict")]
        found[f"{shown(ROOT / folder)}: parameters and verdict"] = _hash(json.dumps(said, sort_keys=True))
    for name, value in values.items():
        if name in ("out", KEPT) or name.endswith(("_dir", "_dirs")):
            continue
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text:
                continue
            path = ROOT / text
            if path.is_file():
                found[shown(path)] = sha256(path)
            elif path.is_dir():
                found |= {f"{shown(path)}/{file}": digest for file, digest in hash_folder(path).items()}
    return found


def dependencies(notebook: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Collect all that a phase's result may depend on; its hash, `key`, decides whether the phase can be skipped.

    `versions` has every pinned package, for the record; the key covers those that compute (`COMPUTING`).
    """
    cells = code_cells(notebook)
    try:
        found = {
            "params": {name: value for name, value in values.items() if name != "out"},
            "inputs": _inputs(values),
            "notebook": _hash("\n".join(meaning(cell) for cell in cells)),
            "source": _source(cells, values),
            "versions": dict(versions()),
        }
    except SyntaxError as error:
        raise RunError(f"{notebook}: a code cell or a module does not parse: {error}") from None
    keyed = found | {"versions": {name: found["versions"].get(name) for name in sorted(COMPUTING)}}
    return {"key": _hash(json.dumps(keyed, sort_keys=True)), **found}
