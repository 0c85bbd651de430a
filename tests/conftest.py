"""Shared pieces of the tests."""

import json
import os
from pathlib import Path

import pytest

from erlib.chain.run import environment

os.environ.update(environment())  # before any test imports a hub library
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run kernels beside pytest on the same cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole chain first: it takes as long as all the rest, which the other worker does meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


def write_notebook(path: Path, *cells: str, prose: str = "") -> Path:
    """Write a notebook of code cells, the first of them tagged `parameters`, behind a cell of prose, if any."""
    code = [
        {
            "cell_type": "code",
            "id": f"cell-{number}",
            "metadata": {"tags": ["parameters"]} if number == 0 else {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for number, source in enumerate(cells)
    ]
    if prose:
        code.insert(0, {"cell_type": "markdown", "id": "prose", "metadata": {}, "source": prose})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": code, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A folder with a tiny three-phase project: notebooks/ (make → double → total), params.yml and no runs yet."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    start = "import time\nfrom pathlib import Path\nfrom erlib.chain import run\nphase = run.start('{name}', globals())"
    write_notebook(
        notebooks / "01_make.ipynb",
        'out = "runs/manual/01_make"  # written\ncount = 40  # numbers\nscale = 1.5  # factor\nseed = 0  # first',
        start.format(name="01_make"),
        "for n in range(count):\n    phase.path(f'part/{n}.txt').write_text(str((seed + n) * scale))\ntime.sleep(.4)",
        "phase.finish([run.check('numbers', count, target='>= 10')], metrics={'count': count})",
    )
    write_notebook(
        notebooks / "02_double.ipynb",
        'out = "runs/manual/02_double"  # written\nmake_dir = "runs/manual/01_make"  # read\nseed = 0  # unused',
        start.format(name="02_double"),
        "parts = [float(p.read_text()) for p in sorted(Path(make_dir).glob('part/*.txt'))]\ntime.sleep(.3)",
        "phase.path('doubled.txt').write_text(' '.join(str(2 * part) for part in parts))",
        "phase.finish([run.check('parts', len(parts))], metrics={'parts': len(parts)})",
    )
    write_notebook(
        notebooks / "03_total.ipynb",
        'out = "runs/manual/03_total"  # written\ndouble_dir = "runs/manual/02_double"  # read\nseed = 0  # unused\n'
        "limit = 1.0  # the gate",
        start.format(name="03_total"),
        "total = sum(map(float, (Path(double_dir) / 'doubled.txt').read_text().split()))",
        "phase.path('total.txt').write_text(str(total))",
        "phase.finish([run.check('total', total, target=f'>= {limit}')], metrics={'total': total})",
    )
    (tmp_path / "tiny.yml").write_text("all:\n  seed: 3\n")
    return tmp_path


@pytest.fixture
def serve(monkeypatch):
    """Start loopback endpoints: `serve(respond)` gives a `servers.Server`."""
    from servers import Server

    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    running = []

    def start(respond):
        running.append(Server(respond))
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()
