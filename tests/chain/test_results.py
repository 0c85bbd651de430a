"""Results: Markdown from manifests alone, rounds side by side, what is missing said."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from erlib.__main__ import app
from erlib.chain import results, run

MADE = {
    "02_corpus": [("diversity gain: distance to nearest", (0.0427, 0.0332, 0.0527), "> 0")],
    "03_sft": [("share of the entity gap closed", (0.9, 0.7, 1.1), ">= 0.8"), ("entity F1 | after SFT", 0.87, None)],
    "round-1/06_reward_model": [("held-out accuracy", (0.755, 0.706, 0.806), ">= 0.75"), ("agreement", 0.8, None)],
    "round-2/06_reward_model": [("held-out accuracy", (0.6, 0.55, 0.65), ">= 0.75")],
    "10_blind_test": [("documents won to lost", (3.0, 2.5, 4.0), ">= 2"), ("sign test, p", 0.00002, "< 0.001")],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (label, checks) in enumerate(MADE.items(), start=1):
        phase = tmp_path / "tiny" / label
        phase.mkdir(parents=True)
        manifest = {
            "phase": phase.name,
            "status": "failed_gate" if label.startswith("round-2") else "done",
            "simulated": label != "02_corpus",
            "note": "labels of the panel" if "06" in label else "",
            "verdict": [run.check(name, value, target=target)._asdict() for name, value, target in checks],
            "seconds": 1000.4 * number,
            "peak_rss_mb": 1234.5,
            "finished": f"2026-01-0{number}T00:00:00+00:00",
            "commit": "abc123",
            "device": "cpu, 2 cores",
            "seed": 0,
            "versions": {"torch": "2.9.1", "jupyterlab": "4.4"},
        }
        (phase / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "tiny"


def test_results_are_the_manifests_figures(folder: Path) -> None:
    text = results.markdown(folder)
    lines = text.splitlines()
    assert "| 03_sft | share of the entity gap closed | 0.9 | 0.7 to 1.1 | >= 0.8 | ○ undecided |" in lines
    assert (
        "| round-2/06_reward_model | held-out accuracy | 0.6 | 0.55 to 0.65 | >= 0.75 | ✗ missed |" in lines
    )  # the last
    assert "| 10_blind_test | documents won to lost | 3 | 2.5 to 4 | >= 2 | ✓ met |" in lines
    assert "| sign test, p | < 0.001 |  | < 0.001 | ✓ met | gate |" in lines
    assert "| entity F1 \\| after SFT | 0.87 |  |  |  |  |" in lines
    assert "| 12 | false-alarm rate | not in this run |  |  |  |" in lines
    assert "3 met, 2 undecided, 1 missed" in text


def test_a_confirmed_run_has_the_confirmation_among_its_headlines(folder: Path) -> None:
    assert "14" not in [label for label, _ in results.headlines({})]
    phase = folder / "14_confirmation"
    phase.mkdir()
    manifest = json.loads((folder / "10_blind_test/manifest.json").read_text()) | {"phase": "14_confirmation"}
    manifest["verdict"] = [run.check("documents won to lost against the frontier", 2.2, target=">= 2")._asdict()]
    (phase / "manifest.json").write_text(json.dumps(manifest))
    headline = results.markdown(folder).split("## Headline")[1].split("##")[0]
    assert "| 14_confirmation | documents won to lost against the frontier | 2.2 |" in headline


def test_rounds_stand_side_by_side(folder: Path) -> None:
    lines = results.markdown(folder).splitlines()
    assert "## 06_reward_model (simulated): done, failed gate" in lines
    assert "| check | gate | round 1 | round 2 |" in lines
    assert (
        "| held-out accuracy | gate | 0.755 (0.706 to 0.806), target >= 0.75: ○ undecided "
        "| 0.6 (0.55 to 0.65), target >= 0.75: ✗ missed |"
    ) in lines
    assert "| agreement |  | 0.8 |  |" in lines
    assert "round 1: labels of the panel; round 2: labels of the panel" in lines


def test_costs_provenance_and_what_is_simulated_are_told(folder: Path) -> None:
    text = results.markdown(folder)
    lines = text.splitlines()
    assert "| round-1/06_reward_model | 3,001 | 1,234 |" in lines
    assert "| all | 15,006 |  |" in lines
    for line in ("| device | cpu, 2 cores |", "| commit (+: with changes) | abc123 |", "| torch | 2.9.1 |"):
        assert line in lines
    assert "jupyterlab" not in text
    assert "panel of phases 03, 06, 10 are the embedded world's" in text
    assert "## 02_corpus: done" in lines  # not simulated, not labelled


def test_the_command_writes_a_file_or_says_that_there_is_no_run(folder: Path) -> None:
    out = folder.parent / "docs/results.md"
    assert CliRunner().invoke(app, ["results", str(folder), "--out", str(out)]).exit_code == 0
    assert out.read_text() == results.markdown(folder)
    assert results.markdown(folder) in CliRunner().invoke(app, ["results", str(folder)]).output
    empty = folder.parent / "empty"
    empty.mkdir()
    ended = CliRunner().invoke(app, ["results", str(empty)])
    assert ended.exit_code == 2
    assert "no phase with a manifest; run it first" in ended.output


def test_several_runs_stand_side_by_side_with_mean_median_and_range(folder: Path) -> None:
    for name, ratio in (("other", 1.5), ("third", 2.4)):
        again = folder.with_name(name)
        shutil.copytree(folder, again)
        path = again / "10_blind_test/manifest.json"
        manifest = json.loads(path.read_text()) | {"seed": ratio, "seconds": 60.0}
        manifest["verdict"][0] |= run.check("documents won to lost", ratio, target=">= 2")._asdict()
        path.write_text(json.dumps(manifest))
    shutil.rmtree(folder.with_name("third") / "03_sft")
    runs = [folder, folder.with_name("other"), folder.with_name("third")]
    ended = CliRunner().invoke(app, ["results", *map(str, runs)])
    assert ended.exit_code == 0
    lines = ended.output.splitlines()
    assert "# Results of 3 runs" in lines
    assert "| phase | check | target | tiny | other | third | mean | median | lowest to highest |" in lines
    won = "| 10_blind_test | documents won to lost | >= 2 | ✓ 3 | ✗ 1.5 | ✓ 2.4 | 2.3 | 2.4 | 1.5 to 3 |"
    assert lines.count(won) == 2  # a headline and a gate
    assert "| 03_sft | share of the entity gap closed | >= 0.8 | ○ 0.9 | ○ 0.9 |  | 0.9 | 0.9 | 0.9 to 0.9 |" in lines
    early = next(line for line in lines if line.startswith("| round-1/06_reward_model | held-out accuracy"))
    assert early.endswith("| 0.755 | 0.755 | 0.755 to 0.755 |")  # a gate of every round, the headline of the last
    assert "| 03_sft | 2,001 | 2,001 |  |" in lines
    assert "| other | 0, 1.5 | cpu, 2 cores | abc123 |" in lines
