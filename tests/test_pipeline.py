"""The whole chain in the smoke profile, through the real runner, as a user starts it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PHASES = ["01_prompts", "02_corpus", "03_sft"]
METRICS = {
    "01_prompts": {"frontier_entity_f1", "frontier_relationship_f1", "local_entity_f1", "selected_minus_random"},
    "02_corpus": {"recall_at_k", "giant_component_share", "isolated_share", "diversity_gain"},
    "03_sft": {"base_entity_f1", "sft_entity_f1", "sft_relationship_f1", "frontier_entity_f1", "gap_closed"},
}
KEYS = {
    "phase", "status", "params", "verdict", "metrics", "inputs", "outputs", "seconds", "peak_rss_mb", "versions", "seed"
}  # fmt: skip


VERDICT = {"check", "value", "low", "high", "target", "ok"}


def erlib(*arguments, runs):
    command = [sys.executable, "-m", "erlib", "run", "params/smoke.yml", "--runs", str(runs), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    finished = erlib("--past-gates", runs=folder)
    assert finished.returncode in (0, 3), finished.stdout + finished.stderr
    return folder


def manifest(runs, phase):
    return json.loads((runs / "smoke" / phase / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_ends_with_a_complete_manifest(runs, phase):
    found = manifest(runs, phase)
    assert found.keys() >= KEYS
    assert found["status"] in ("done", "failed_gate")
    assert found["metrics"].keys() >= METRICS[phase]
    assert found["verdict"] and all(row.keys() >= VERDICT for row in found["verdict"])
    assert found["simulated"] is True


@pytest.mark.parametrize("phase", PHASES)
def test_reports_load_nothing_and_describe_every_figure(runs, phase):
    page = (runs / "smoke" / f"{phase}.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=\s*["']([^"']+)""", page)
    assert not [url for url in loaded if not url.startswith(("data:", "#"))]
    images = re.findall(r"<img[^>]*>", page)
    assert images and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert "simulated" in page


def test_index_shows_every_phase(runs):
    page = (runs / "smoke" / "index.html").read_text(encoding="utf-8")
    for phase in PHASES:
        assert phase in page and f"{phase}.html" in page


def test_the_fine_tuned_model_loads_with_plain_transformers(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs / "smoke" / "03_sft" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Brinvex Labs has acquired Tamulia.\n=>\n", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=24, do_sample=False)
    assert written.shape[1] > ids["input_ids"].shape[1]


def test_a_second_run_has_nothing_to_do_and_a_forced_one_makes_the_same_files(runs):
    before = {phase: manifest(runs, phase)["outputs"] for phase in PHASES}
    again = erlib("--past-gates", "--dry-run", runs=runs)
    assert again.stdout.count("same key, outputs intact") == len(PHASES), again.stdout
    for phase in PHASES:
        forced = erlib("--only", phase, "--force", runs=runs)
        assert forced.returncode in (0, 3), forced.stdout + forced.stderr
        assert manifest(runs, phase)["outputs"] == before[phase]
