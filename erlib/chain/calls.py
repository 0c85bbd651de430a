"""What the code cells of a notebook call in erlib, for readers of a report: name, module, docstring.

Nothing is imported: names are followed through the cells' import statements, definitions are read from the source.
"""

import ast
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from erlib.chain.manifest import PACKAGE, module_file, plain


class Called(NamedTuple):
    """A function or class of erlib that a cell calls: `metrics.paired` as the cell writes it, and where it is."""

    name: str
    anchor: str
    module: str
    signature: str
    docstring: str

    @property
    def summary(self) -> str:
        """The first sentences of the docstring, up to its first empty line."""
        return " ".join(self.docstring.partition("\n\n")[0].split())


def calls(cells: Sequence[str]) -> list[list[Called]]:
    """Find what each code cell calls, in the order in which it stands there; imports hold for later cells too."""
    names: dict[str, str] = {}  # what a name in the notebook stands for: `metrics` → `erlib.task.metrics`
    found = []
    for source in cells:
        try:
            tree = ast.parse(plain(source))
        except SyntaxError:
            found.append([])
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        nodes.sort(key=lambda node: (node.lineno, node.col_offset))
        written = dict.fromkeys(ast.unparse(node.func) for node in nodes if _is_name(node.func))
        found.append([called for name in written if (called := _resolve(name, names))])
    return found


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_name(node.value))


def _resolve(written: str, names: dict[str, str]) -> Called | None:
    head, _, rest = written.partition(".")
    dotted = ".".join(filter(None, [names.get(head, head), rest]))
    return _definition(dotted, written) if dotted.startswith(f"{PACKAGE.name}.") else None


@cache
def _definition(dotted: str, written: str) -> Called | None:
    path, name = module_file(dotted, PACKAGE), dotted.rpartition(".")[2]
    if path is None:
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:  # passed on from another module, as `run.check` is
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module.startswith(f"{PACKAGE.name}."):
                    return _definition(f"{node.module}.{alias.name}", written)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            module = path.relative_to(PACKAGE.parent).as_posix()
            anchor = f"{module.removesuffix('.py').replace('/', '.')}.{name}"
            return Called(written, anchor, module, _signature(node), ast.get_docstring(node) or "")
    return None


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"
