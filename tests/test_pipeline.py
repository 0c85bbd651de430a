"""The whole chain in the smoke profile, with two rounds, through the real runner, as a user starts it.

Its notebooks are copies in which every code cell stands twice, but for those tagged `once` (training, start and end of
a phase): one run shows that the chain holds together and that a cell can be run twice.
"""

import json
import re
from itertools import combinations, pairwise

import pytest
import smoke_profile
from smoke_profile import erlib, manifest

from erlib.chain import results
from erlib.documents import reserve
from erlib.judgements import annotation, sampling
from erlib.lm import models
from erlib.lm.checkpoints import fingerprint, require_merged
from erlib.serving import export

ROUNDS = ("round-1", "round-2")
EACH_ROUND = ("04_sampling", "05_annotation", "06_reward_model", "07_ppo")
CHAIN = [
    *("01_prompts", "02_corpus", "03_sft"),
    *(f"{place}/{phase}" for place in ROUNDS for phase in EACH_ROUND),
    *("08_alternatives", "09_rounds", "10_blind_test", "11_inference", "12_drift"),
]
PHASES = [*CHAIN, "14_confirmation"]
METRICS = {
    "01_prompts": {"frontier_entity_f1", "frontier_relationship_f1", "local_entity_f1", "selected_minus_random"},
    "02_corpus": {"recall_at_k", "giant_component_share", "isolated_share", "diversity_gain"},
    "03_sft": {"base_entity_f1", "sft_entity_f1", "sft_relationship_f1", "frontier_entity_f1", "gap_closed"},
    "04_sampling": {"temperature", "pairs", "leaks", "identical_pairs_dropped"},
    "05_annotation": {"agreement", "alpha", "tie_rate", "labels"},
    "06_reward_model": {
        "accuracy", "accuracy_low", "accuracy_high", "agreement", "ceiling_low", "ceiling_high", "ece"
    },
    "07_ppo": {
        "kl", "reward_mean", "gold_entity_f1", "gold_relationship_f1", "parse_rate", "guard_events", "step_seconds"
    },
    "08_alternatives": {"ppo_to_dpo_seconds", "ppo_reward", "ppo_kl", "dpo_reward", "rloo_reward", "best_of_n_reward"},
    "09_rounds": {
        "round_2_kl_from_sft_policy", "round_1_documents_won_against_sft", "round_2_documents_won_against_frontier",
        "round_2_win_ratio_before", "round_2_pairs_the_reward_model_gets_right_of_the_round_before",
    },
    "10_blind_test": {
        "policy_win_rate", "frontier_win_rate", "tie_rate", "n", "sign_test_p", "policy_gold_entity_f1",
        "frontier_gold_entity_f1",
    },
    "11_inference": {
        "ttft_ms_p50", "ttft_ms_p95", "tokens_per_second", "documents_per_hour", "speedup_over_naive", "f1_loss_4bit"
    },
    "12_drift": {
        "false_alarm_rate", "detection_delay_topic", "detection_delay_length", "detection_delay_structure"
    },
    "14_confirmation": {
        "policy_win_rate", "win_ratio", "n", "policy_entity_f1", "frontier_entity_f1", "base_entity_f1"
    },
}  # fmt: skip
KEYS = {
    "phase", "status", "params", "verdict", "metrics", "inputs", "outputs", "seconds", "peak_rss_mb", "versions", "seed"
}  # fmt: skip
VERDICT = {"check", "value", "low", "high", "target", "outcome", "gate"}

pytestmark = pytest.mark.slow  # minutes


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    return smoke_profile.write_doubled(tmp_path_factory.mktemp("notebooks"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, notebooks):
    folder = tmp_path_factory.mktemp("runs")
    finished = erlib("--past-gates", runs=folder, notebooks=notebooks)
    assert finished.returncode in (0, 3), finished.stdout + finished.stderr
    confirmed = erlib("--only", "14", runs=folder, notebooks=notebooks)
    assert confirmed.returncode in (0, 3), confirmed.stdout + confirmed.stderr
    return folder


@pytest.fixture(scope="module")
def smoke(runs):
    return runs / "smoke"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- what every phase leaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_ends_with_a_complete_manifest(smoke, phase):
    found = manifest(smoke, phase)
    assert found.keys() >= KEYS
    assert found["phase"] == phase.split("/")[-1]
    assert found["status"] in ("done", "failed_gate")
    assert found["metrics"].keys() >= METRICS[found["phase"]]
    assert found["verdict"] and all(row.keys() >= VERDICT for row in found["verdict"])
    assert found["simulated"] is True


@pytest.mark.parametrize("phase", PHASES)
def test_reports_load_nothing_and_describe_every_figure(smoke, phase):
    page = (smoke / f"{phase}.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=\s*["']([^"']+)""", page)
    assert not [url for url in loaded if not url.startswith(("data:", "#"))]
    images = re.findall(r"<img[^>]*>", page)
    assert images and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert "simulated" in page


def test_index_shows_every_phase(smoke):
    page = (smoke / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<a href="([^"]+)\.html">', page) == PHASES


def test_the_results_of_the_run_have_every_headline(smoke):
    found = {phase: manifest(smoke, phase) for phase in PHASES}
    assert len(results.headlines(found)) == 11  # three of them of the confirmation
    assert all(row is not None for _, row in results.headlines(found))
    assert "not in this run" not in results.markdown(smoke)


def test_the_fine_tuned_model_loads_with_plain_transformers(smoke):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smoke / "03_sft" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Document:\nBrinvex Labs has acquired Tamulia.\nReport:\n", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=24, do_sample=False)
    assert written.shape[1] > ids["input_ids"].shape[1]


# -- every cell twice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_a_cell_that_is_run_twice_shows_the_same(smoke, phase):
    smoke_profile.check_twins(smoke / f"{phase}.ipynb")


# -- what the rounds hand on --------------------------------------------------------------------------------------


def starts(smoke):
    """The merged checkpoint that each round starts from: SFT's, then that of the round before."""
    return dict(zip(ROUNDS, (smoke / "03_sft/merged", smoke / "round-1/07_ppo/merged"), strict=True))


@pytest.mark.parametrize("place", ROUNDS)
def test_every_record_of_a_round_is_of_the_checkpoint_that_the_round_starts_from(smoke, place):
    checkpoint = require_merged(starts(smoke)[place])
    samples = sampling.read_samples(smoke / place / "04_sampling/samples.jsonl", checkpoint=checkpoint)
    pairs = sampling.read_pairs(smoke / place / "04_sampling/pairs.jsonl", checkpoint=checkpoint)
    labels = annotation.read_preferences(smoke / place / "05_annotation/preferences.jsonl", checkpoint=checkpoint)
    assert json.loads((smoke / place / "06_reward_model/reward.json").read_text())["checkpoint"] == checkpoint
    merge = json.loads((smoke / place / "07_ppo/merged/merge.json").read_text())
    assert merge["base"] == checkpoint != merge["merged"]

    drawn = {sample.document.id: sample.completions for sample in samples}
    splits = {sample.document.id: sample.split for sample in samples}
    asked = {pair.id: pair for pair in pairs}
    judged = rows(smoke / place / "05_annotation/judgements.jsonl")
    on_trial = {judgement["pair_id"] for judgement in judged if judgement["kind"] == "trial"}
    assert labels and {label.pair_id for label in labels} == asked.keys() - on_trial
    for label in labels:
        pair = asked[label.pair_id]
        a, b = (drawn[pair.document_id][place_of] for place_of in (pair.a, pair.b))
        assert (label.a, label.b, label.a_ids, label.b_ids) == (a.text, b.text, a.ids, b.ids)
        assert label.split == pair.split == splits[pair.document_id]


def test_a_round_refuses_the_records_of_another(smoke):
    later = require_merged(starts(smoke)["round-2"])
    for read, path in {
        sampling.read_samples: "04_sampling/samples.jsonl",
        sampling.read_pairs: "04_sampling/pairs.jsonl",
        annotation.read_preferences: "05_annotation/preferences.jsonl",
    }.items():
        with pytest.raises(ValueError, match=rf"{path}.*{later[:12]}"):
            read(smoke / "round-1" / path, checkpoint=later)


def test_no_document_is_used_twice(smoke):
    used = {f"{place}: sampling": {row["document"]["id"] for row in rows(smoke / place / "04_sampling/samples.jsonl")}
            for place in ROUNDS}  # fmt: skip
    used |= {f"{place}: comparison": {row["document"]["id"] for row in rows(smoke / place / "07_ppo/samples.jsonl")}
             for place in ROUNDS}  # fmt: skip
    used["reports"] = {row["document"]["id"] for row in rows(smoke / "02_corpus/reports.jsonl")}
    used["blind test"] = {row["document_id"] for row in rows(smoke / "10_blind_test/comparisons.jsonl")}
    for one, other in combinations(used.values(), 2):
        assert one and other and not one & other
    groups = {row["id"]: (row["split"], row["group"]) for row in rows(smoke / "02_corpus/documents.jsonl")}
    assert {groups[i][0] for i in used["blind test"]} == {"test"}
    assert {groups[i][0] for name in used if "round" in name for i in used[name]} == {"train"}


def test_the_record_of_documents_grows_from_phase_to_phase_and_names_what_was_used(smoke):
    folders = [smoke / "02_corpus", *(smoke / place / phase for place in ROUNDS for phase in ("04_sampling", "07_ppo"))]
    records = [reserve.read(folder) for folder in folders]
    for before, after in pairwise(records):
        assert before.items() < after.items()
    sampled = {row["document"]["id"] for row in rows(smoke / "round-2/04_sampling/samples.jsonl")}
    assert sampled <= {name for name, purpose in records[-1].items() if purpose == "round 2: sampling"}
    last = [reserve.read(smoke / phase) for phase in ("08_alternatives", "09_rounds", "10_blind_test")]
    assert all(records[-1].items() < each.items() for each in last)
    reserve.merged(*last)  # raises on an overlap


def test_the_guard_has_its_reference_and_the_policy_in_four_bits_loads(smoke):
    for place in ROUNDS:
        table = (smoke / place / "06_reward_model/evaluation_rewards.csv").read_text().splitlines()
        assert table[0] == "reward" and len(table) > 10
    model, _ = models.load(smoke / "10_blind_test/policy_nf4")
    assert model.is_loaded_in_4bit
    packed = json.loads((smoke / "10_blind_test/policy_nf4/quantisation.json").read_text())
    assert packed["checkpoint"] == require_merged(smoke / "round-2/07_ppo/merged")


# -- inference ----------------------------------------------------------------------------------------------------


def test_the_exported_model_is_the_last_policy_and_every_32_bit_engine_gives_its_answers(smoke):
    folder = smoke / "model"
    settings = export.read_settings(folder)
    assert settings.weights == require_merged(smoke / "round-2/07_ppo/merged") == fingerprint(folder)
    assert folder.resolve() == (smoke / "11_inference/model").resolve()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "**Simulated**" in card and "| 10_blind_test | share won |" in card
    checks = {row["check"]: row for row in manifest(smoke, "11_inference")["verdict"]}
    assert checks["same answers as batched generate"]["value"] == 1.0


# -- drift --------------------------------------------------------------------------------------------------------


def test_drift_watches_the_last_policy_with_the_last_reward_model_and_opens_tickets(smoke):
    inputs = manifest(smoke, "12_drift")["params"]
    assert inputs["ppo_dir"].endswith("round-2/07_ppo")
    assert inputs["reward_model_dir"].endswith("round-2/06_reward_model")
    tickets = sorted((smoke / "12_drift/tickets").glob("*.json"))
    assert tickets
    for path in tickets:
        ticket = json.loads(path.read_text(encoding="utf-8"))
        assert ticket["repeat_from"] in {phase.split("/")[-1] for phase in PHASES}
        assert ticket["alarms"] and all(alarm["statistic"] > alarm["threshold"] for alarm in ticket["alarms"])
        assert path.with_suffix(".txt").read_text(encoding="utf-8").count("\n  | ") >= len(ticket["documents"]) > 0
    thresholds = (smoke / "12_drift/thresholds.csv").read_text(encoding="utf-8").splitlines()
    assert len(thresholds) == 11  # a header and ten detectors


# -- confirmation -------------------------------------------------------------------------------------------------


def test_the_policy_is_confirmed_on_documents_that_its_run_has_not_read(smoke):
    checks = {row["check"]: row for row in manifest(smoke, "14_confirmation")["verdict"]}
    assert checks["texts that a run knew"]["value"] == 0
    assert checks["runs confirmed"]["value"] == 1
    compared = rows(smoke / "14_confirmation/comparisons.jsonl")
    assert {row["document_id"].split("/")[0] for row in compared} == {"smoke"}
    known = {row["text"] for row in rows(smoke / "02_corpus/documents.jsonl")}
    assert compared and not known & {row["document"] for row in compared}


# -- again --------------------------------------------------------------------------------------------------------


def test_a_second_run_has_nothing_to_do(runs, notebooks):
    again = erlib("--past-gates", "--dry-run", runs=runs, notebooks=notebooks)
    assert again.stdout.count("same key, outputs intact") == len(CHAIN), again.stdout


# 03 and 07 are left out: test_sft and test_ppo show that training repeats bit for bit.
@pytest.mark.parametrize("phase", ["02_corpus", *(f"round-2/{phase}" for phase in EACH_ROUND[:3])])
def test_a_phase_whose_cells_run_once_makes_the_same_files(runs, smoke, phase):
    before = manifest(smoke, phase)["outputs"]
    forced = erlib("--only", phase, "--force", runs=runs)
    assert forced.returncode in (0, 3), forced.stdout + forced.stderr
    after = manifest(smoke, phase)["outputs"]
    assert after == before
