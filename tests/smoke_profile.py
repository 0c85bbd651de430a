"""The smoke profile through the real runner, with notebooks in which every code cell stands twice."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def erlib(*arguments: str, runs: Path, notebooks: Path = ROOT / "notebooks") -> subprocess.CompletedProcess:
    """`python -m erlib run params/smoke.yml` with these arguments."""
    command = [sys.executable, "-m", "erlib", "run", "params/smoke.yml", "--runs", str(runs)]
    command += ["--notebooks", str(notebooks), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)


def manifest(smoke: Path, phase: str) -> dict[str, Any]:
    """The manifest of a phase in a run's folder."""
    return json.loads((smoke / phase / "manifest.json").read_text(encoding="utf-8"))


def write_doubled(folder: Path) -> Path:
    """Write all notebooks with every code cell twice in a row; the parameters cell and those tagged `once` alone."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = list(_doubled(notebook["cells"]))
        (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    return folder


def _doubled(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for cell in cells:
        yield cell
        if cell["cell_type"] == "code" and not {"once", "parameters"} & set(cell["metadata"].get("tags", [])):
            yield cell | {"id": f"{cell['id']}-again", "metadata": {"tags": ["again"]}}


def check_twins(executed: Path) -> None:
    """Each second execution of a cell shows what the first one did."""
    code = [cell for cell in json.loads(executed.read_text())["cells"] if cell["cell_type"] == "code"]
    again = [number for number, cell in enumerate(code) if "again" in cell["metadata"].get("tags", [])]
    assert len(again) > len(code) / 4
    for number in again:
        assert code[number]["source"] == code[number - 1]["source"]
        assert _shown(code[number]) == _shown(code[number - 1]), "".join(code[number]["source"])


def _shown(cell: dict[str, Any]) -> str:
    """What a cell shows, without what differs between executions: styles' ids, addresses, progress, parts of a text."""
    printed = "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")
    text = json.dumps([printed, [o["data"] for o in cell["outputs"] if "data" in o]], sort_keys=True)
    return re.sub(r"T_[0-9a-f]{5}|0x[0-9a-f]+", "", text)
