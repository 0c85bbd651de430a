"""What the documents name exists."""

import ast
import re
import tomllib
from pathlib import Path

from erlib.chain.manifest import PACKAGE, ROOT


def defined(module: Path) -> set[str]:
    tree = ast.parse(module.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_map_of_functions_names_what_there_is() -> None:
    named = re.findall(r"`([a-z_]+)\.([a-z_]+)(?:\.(\w+))?`", (ROOT / "docs" / "api.md").read_text())
    assert len(named) > 50
    for folder, name, function in named:
        module = PACKAGE / folder / f"{name}.py"
        assert module.is_file(), f"docs/api.md: {folder}.{name}"
        assert not function or function in defined(module), f"docs/api.md: {folder}.{name}.{function}"


def test_commands_are_written_as_they_are_called() -> None:
    assert "scripts" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    for path in [*texts, *PACKAGE.rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        short = re.search(r"`erlib (?:run|report|results|extract|serve)\b", text) if path.name != "LOG.md" else None
        assert not short, f"{path}: there is no command `erlib`, only `python -m erlib`"
        for command in re.findall(r"python -m erlib (\w+)", text):
            assert command in {"run", "report", "results", "extract", "serve"}, f"{path}: python -m erlib {command}"
