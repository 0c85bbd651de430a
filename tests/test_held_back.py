"""The notebooks that `make run` holds back, and that read no other phase, in the smoke profile."""

import pytest
import smoke_profile

from erlib.lm import models

pytestmark = pytest.mark.slow


def finished(phase, tmp_path):
    """Run a phase with every cell twice; gives its metrics."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    smoke_profile.write_doubled(notebooks)
    ended = smoke_profile.erlib("--only", phase, runs=tmp_path, notebooks=notebooks)
    assert ended.returncode in (0, 3), ended.stdout + ended.stderr
    smoke_profile.check_twins(tmp_path / "smoke" / f"{phase}.ipynb")
    return smoke_profile.manifest(tmp_path / "smoke", phase)["metrics"]


def test_the_base_model_is_trained_from_scratch(tmp_path):
    assert finished("00_base_model", tmp_path)["parameters"] > 0
    models.load(tmp_path / "smoke/00_base_model/model")


@pytest.mark.skipif(not (smoke_profile.ROOT / ".venv-peer/bin/python").exists(), reason="needs TRL 1.12.0: make peer")
def test_the_benchmark_measures_both_sides(tmp_path):
    assert finished("13_benchmarks", tmp_path)
