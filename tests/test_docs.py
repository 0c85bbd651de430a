"""What the documents name exists."""

import ast
import re
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
