"""Policies side by side: curves of reward against distance, tables for the diagnosis, costs, and a sampled KL."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch

from erlib.lm import models
from erlib.policy import alternatives, comparison
from erlib.task import metrics
from erlib.task.forms import short_prompt
from erlib.world import pretrain

MEASURES = {"reward": "reward (deviations)", "utility": "true utility"}


def drawn(rewards, *, worth=1.0):
    """Samples with these rewards, a list a document; the true utility is `worth` times the reward."""
    rows = [(f"d{place}", f"report {value}", value) for place, values in enumerate(rewards) for value in values]
    frame = pd.DataFrame(rows, columns=["document", "text", "reward"])
    return frame.assign(utility=worth * frame["reward"])


START = drawn([[0.0, 2.0], [1.0, 3.0]])
POLICIES = {
    ("start", 0): START,
    ("DPO", 3): drawn([[1.0], [2.0]]),
    ("DPO", 6): drawn([[2.0, 2.0], [4.0, 2.0]]),
    ("PPO", 4): drawn([[3.0, 3.0], [3.0, 5.0]], worth=-1.0),
}
KL = {
    point: metrics.Interval(nats, nats - 0.1, nats + 0.1)
    for point, nats in {("DPO", 3): 0.5, ("DPO", 6): 1.5, ("PPO", 4): 2.0}.items()
}


# -- reward against distance --------------------------------------------------------------------------------------


def test_every_curve_starts_at_the_start_and_goes_through_its_points():
    table = comparison.curves(POLICIES, kl=KL, measures=MEASURES, best_of=[2], seed=0)
    reward = table[table["measure"] == "reward (deviations)"]
    points = {name: line[["step", "kl", "value"]].to_numpy().tolist() for name, line in reward.groupby("method")}
    assert points["DPO"] == [[0, 0.0, 1.5], [3, 0.5, 1.5], [6, 1.5, 2.5]]
    assert points["PPO"] == [[0, 0.0, 1.5], [4, 2.0, 3.5]]
    assert points["best of n"] == [[0, 0.0, 1.5], [2, pytest.approx(math.log(2) - 0.5), 2.5]]


def test_points_have_the_interval_of_a_mean_over_documents():
    table = comparison.curves(POLICIES, kl=KL, measures=MEASURES, best_of=[], seed=3).set_index(
        ["method", "step", "measure"]
    )
    found = table.loc[("DPO", 6, "true utility"), ["value", "low", "high"]].tolist()
    assert found == pytest.approx(list(metrics.bootstrap_mean([2.0, 3.0], seed=3)))


def test_utility_is_the_sum_of_the_aspects_and_nan_where_nobody_knows_it():
    texts = {"d0": "Ardox", "d1": "Belum"}
    worth = {("Ardox", "report 0.0"): -1.0, ("Ardox", "report 2.0"): -2.0}

    def utility(document, report):
        return {"entities": worth.get((document, report), 0.0), "summaries": -0.5}

    frame = START.drop(columns="utility")
    assert comparison.valued(frame, texts, utility)["utility"].tolist() == [-1.5, -2.5, -0.5, -0.5]
    assert comparison.valued(frame, texts, None)["utility"].isna().all()
    assert "utility" not in frame


# -- diagnosis ----------------------------------------------------------------------------------------------------


def ended(**others):
    return {"start": START, "DPO": POLICIES["DPO", 6], "RLOO": POLICIES["DPO", 6], "PPO": POLICIES["PPO", 4]} | others


def test_the_diagnosis_gets_means_over_the_samples_of_each_document():
    greedy = drawn([[1.0], [1.0]])
    table = comparison.per_document(ended(), greedy, best_of=2)
    assert table["start, reward"].tolist() == [1.0, 2.0]
    assert table["PPO, reward"].tolist() == [3.0, 4.0]
    assert table["PPO, utility"].tolist() == [-3.0, -4.0]
    assert table["start greedy, utility"].tolist() == [1.0, 1.0]
    assert table["best-of-n by reward, utility"].tolist() == [2.0, 3.0]
    answers = alternatives.diagnose(table, seed=0)
    assert answers.loc[answers["question"].str.startswith("Does PPO leave"), "holds"].tolist() == [False]


def test_best_of_n_by_reward_and_by_truth_differ_where_the_reward_misleads():
    misled = START.assign(utility=-START["reward"])
    table = comparison.per_document(ended(start=misled), drawn([[1.0], [1.0]]), best_of=2)
    assert table["best-of-n by reward, utility"].tolist() == [-2.0, -3.0]
    assert table["best-of-n by truth, utility"].tolist() == [0.0, -1.0]


def test_where_the_truth_is_not_known_its_questions_stay_open():
    unknown = {name: frame.assign(utility=np.nan) for name, frame in ended().items()}
    table = comparison.per_document(unknown, drawn([[1.0], [1.0]]).assign(utility=np.nan), best_of=2)
    answers = alternatives.diagnose(table, seed=0)
    assert answers.set_index("question")["holds"].notna().sum() == 1
    assert answers.loc[answers["holds"].notna(), "question"].item() == "Does PPO raise the reward?"


# -- costs --------------------------------------------------------------------------------------------------------


def test_ppo_costs_what_its_log_adds_up_to_without_the_row_that_only_measures():
    log = pd.DataFrame(
        {
            "seconds_rollout": [2.0, 3.0, 9.0],
            "seconds_update": [1.0, 1.5, None],
            "length": [10.0, 12.0, 99.0],
            "peak_memory_mb": [100.0, 120.0, 500.0],
        }
    )
    found = comparison.cost_of_ppo(log, completions=8)
    assert found == comparison.Cost(seconds=7.5, tokens=176.0, peak_mb=120.0)
    table = comparison.costs({"PPO": found, "DPO": comparison.Cost(1.0, 2.0, 3.0)})
    assert table.loc["PPO"].tolist() == [7.5, 176.0, 120.0]
    assert table.loc["DPO", "seconds"] == 1.0


# -- distance -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    """Two tiny models with different weights and their tokenizer."""
    texts = [short_prompt(f"Ardox {number}.") for number in range(8)]
    tokenizer = pretrain.train_tokenizer(texts, vocab_size=300)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = [pretrain.new_model(tokenizer, seed=seed, max_position_embeddings=128, **shape).eval() for seed in (0, 1)]
    return (*made, tokenizer, texts)


def test_the_kl_of_a_model_from_itself_is_zero_and_from_another_that_of_the_distributions(two):
    one, other, tokenizer, prompts = two
    asking = {"max_new_tokens": 6, "batch_size": 4, "seed": 0}
    assert comparison.sampled_kl(one, one, tokenizer, prompts, **asking).tolist() == [0.0] * len(prompts)
    found = comparison.sampled_kl(one, other, tokenizer, prompts, **asking)
    assert found.shape == (len(prompts),)
    assert (found > 0).all()

    sampled = models.generate(one, tokenizer, prompts, temperature=1.0, **asking)
    for place in (0, len(prompts) - 1):
        prompt, ids = models.encode_prompt(tokenizer, prompts[place]), list(sampled[place].ids)
        with torch.no_grad():
            p, q = (
                torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double(), dim=-1)
                for model in (one, other)
            )
        assert found[place] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def test_the_kl_of_a_policy_is_that_of_the_adapter_that_is_on(two):
    from peft import LoraConfig, get_peft_model

    one, other, tokenizer, prompts = two
    asking = {"max_new_tokens": 6, "batch_size": 4, "seed": 0}
    policy = get_peft_model(copy.deepcopy(one), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert comparison.sampled_kl(policy, one, tokenizer, prompts, **asking).max() < 1e-9  # a new adapter adds nothing
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    assert comparison.sampled_kl(policy, one, tokenizer, prompts, **asking).min() > 1e-3
