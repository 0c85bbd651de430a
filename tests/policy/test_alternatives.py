"""DPO and RLOO on a tiny model, what is dropped and counted, best-of-n against enumeration, and the diagnosis."""

import functools
import itertools
import math
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erlib.judgements.annotation import Preference
from erlib.lm import models
from erlib.policy import alternatives, comparison
from erlib.task.forms import short_prompt
from erlib.task.schema import Document
from erlib.world import pretrain

NAMES = ["Kor", "Vel", "Tamu", "Osti", "Brin", "Zan", "Mel", "Dro"]
DOCUMENTS = [Document(id=f"d{i}", text=f"{NAMES[i % 8]} is here, </s> {i}.") for i in range(32)]
PROMPTS = [short_prompt(document.text) for document in DOCUMENTS]


def report(index):
    return f"{NAMES[index % 8]}|organisation"


@functools.cache
def trained_tokenizer():
    return pretrain.train_tokenizer([prompt + report(i) + "none" for i, prompt in enumerate(PROMPTS)], vocab_size=320)


def sampled(text):
    """Token ids of a report as a policy samples them, with the end token."""
    return tuple(models.encode_completion(trained_tokenizer(), text))


def pair(index, *, a, b, preferred):
    """The label of one pair of reports of document `index`."""
    return Preference(
        pair_id=f"d{index}#0-1",
        document_id=f"d{index}",
        split="train",
        checkpoint="c",
        prompt=PROMPTS[index],
        a=a,
        b=b,
        a_ids=sampled(a),
        b_ids=sampled(b),
        preference=preferred,
        score={"A": 1.0, "tie": 0.0, "B": -1.0}[preferred],
        votes=(preferred,),
        aspects={},
    )


PAIRS = [
    pair(i, a=report(i), b="none", preferred="A") if i % 2 else pair(i, a="none", b=report(i), preferred="B")
    for i in range(32)
]


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


@pytest.fixture
def model(tokenizer):
    return new_model(tokenizer)


def new_model(tokenizer):
    """A random model that is sure of what it says, so that LoRA has something to change."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = pretrain.new_model(tokenizer, seed=0, max_position_embeddings=128, **shape).eval()
    model.lm_head.weight.data.mul_(10)
    return model


def weights(model):
    """The base weights by their names without adapters."""
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora" not in name
    }


def margins(model, tokenizer):
    """Log-probability of each chosen report minus that of the rejected one."""
    chosen, rejected = (
        [float(found.sum()) for found in models.completion_logprobs(model, tokenizer, PROMPTS, texts)]
        for texts in ([report(i) for i in range(32)], ["none"] * 32)
    )
    return np.subtract(chosen, rejected)


# -- rows ---------------------------------------------------------------------------------------------------------


def test_the_preferred_report_is_chosen_and_special_tokens_stay_text(tokenizer):
    found = alternatives.encode(PAIRS, tokenizer, max_tokens=100)
    assert len(found.rows) == 32
    for index, row in enumerate(found.rows):
        assert tokenizer.decode(row["prompt_ids"]) == "<s>" + PROMPTS[index]
        assert tokenizer.decode(row["chosen_ids"]) == report(index) + "</s>"
        assert tokenizer.decode(row["rejected_ids"]) == "none</s>"
        assert sum(ids.count(tokenizer.eos_token_id) for ids in row.values()) == 2  # not the one in the document


def test_what_teaches_nothing_is_dropped_and_counted(tokenizer):
    others = [
        pair(0, a="none", b=report(0), preferred="tie"),
        pair(1, a="none", b="none", preferred="A"),
        pair(2, a="none", b="Kor|" * 100, preferred="A"),
    ]
    found = alternatives.encode([*PAIRS, *others], tokenizer, max_tokens=100)
    assert len(found.rows) == len(PAIRS)
    assert found.dropped == {"tie": 1, "identical": 1, "too long": 1}


# -- DPO ----------------------------------------------------------------------------------------------------------


def load_policy(model, base, folders):
    """Saved adapters on fresh base weights."""
    fresh = type(model)(model.config)
    fresh.load_state_dict(base)
    return alternatives.with_adapters(fresh, folders)


def divided(kind, values):
    """Settings of one method and of both, from their fields by name."""
    own = {field.name for field in fields(kind)}
    shared = {name: value for name, value in values.items() if name not in own}
    return kind(**{name: value for name, value in values.items() if name in own}), alternatives.Tuning(**shared)


def dpo(model, tokenizer, out, **changes):
    rows = alternatives.encode(PAIRS, tokenizer, max_tokens=100).rows
    values = {"batch_size": 8, "epochs": 4, "learning_rate": 2e-2, "lora_rank": 4, "points": 2}
    settings, tuning = divided(alternatives.DPO, values | changes)
    return alternatives.dpo(model, tokenizer, rows, out=out, settings=settings, tuning=tuning)


def test_dpo_raises_the_margin_and_leaves_the_reference_alone(model, tokenizer, tmp_path):
    before, base = margins(model, tokenizer), weights(model)
    trained = dpo(model, tokenizer, tmp_path)
    assert list(trained.adapters) == [8, 16]
    policy = load_policy(model, base, {"middle": trained.adapters[8], "end": trained.adapters[16]})
    middle = margins(policy, tokenizer)
    policy.set_adapter("end")
    assert (margins(policy, tokenizer) > before + 1).all()
    assert before.mean() < middle.mean() < margins(policy, tokenizer).mean()
    with policy.disable_adapter():
        assert np.array_equal(margins(policy, tokenizer), before)
    after = weights(model)  # the base that was trained on is the base still
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], base[name]) for name in base)


def test_dpo_starts_at_its_reference_and_counts_its_cost(model, tokenizer, tmp_path):
    trained = dpo(model, tokenizer, tmp_path, epochs=1)
    assert trained.log["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trained.log["rewards/margins"].iloc[-1] > 0
    rows = alternatives.encode(PAIRS, tokenizer, max_tokens=100).rows
    assert trained.tokens == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert trained.seconds > 0
    assert trained.peak_mb > 50


def test_the_same_seed_gives_the_same_adapter(tokenizer, tmp_path):
    def run(name, seed):
        folder = dpo(new_model(tokenizer), tokenizer, tmp_path / name, epochs=1, points=1, seed=seed).adapters[4]
        return [(folder / file).read_bytes() for file in ("adapter_model.safetensors", "adapter_config.json")]

    assert run("one", 1) == run("again", 1)
    assert run("one", 1)[0] != run("other", 2)[0]


# -- RLOO ---------------------------------------------------------------------------------------------------------


def even(prompts, completions):
    """A reward that any policy can learn: three times the share of even token ids."""
    return np.array([3 * np.mean([token % 2 == 0 for token in ids]) for ids in completions])


def rloo(model, tokenizer, out, *, score=even, prompts=PROMPTS, **changes):
    values = {"max_new_tokens": 12, "prompts_per_step": 8, "learning_rate": 2e-2, "lora_rank": 4, "points": 1}
    settings, tuning = divided(alternatives.RLOO, values | changes)
    return alternatives.rloo(model, tokenizer, prompts, score, out=out, settings=settings, tuning=tuning)


def test_rloo_raises_the_reward_and_leaves_the_base_alone(model, tokenizer, tmp_path):
    base = weights(model)
    settings = {"samples": 4, "max_new_tokens": 12, "seed": 5}
    before = alternatives.draw(model, tokenizer, DOCUMENTS, even, **settings)
    trained = rloo(model, tokenizer, tmp_path, prompts=PROMPTS * 4, learning_rate=4e-2)
    policy = load_policy(model, base, {"end": trained.adapters[16]})
    after = alternatives.draw(policy, tokenizer, DOCUMENTS, even, **settings)
    assert after["reward"].mean() > before["reward"].mean() + 0.3
    distance = {"max_new_tokens": 12, "batch_size": 64, "seed": 5}
    assert comparison.sampled_kl(policy, new_model(tokenizer), tokenizer, PROMPTS, **distance).mean() > 0.1
    assert trained.tokens == round(trained.log["completions/mean_length"].sum() * 32)
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(model).items())


def test_rloo_scores_ids_and_penalises_a_missing_end(model, tokenizer, tmp_path):
    seen = []

    def score(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return np.zeros(len(prompts))

    model.generation_config.update(min_new_tokens=40, repetition_penalty=50.0)  # must not come back
    values = {"samples": 2, "missing_end_penalty": 3.0, "max_new_tokens": 40}
    trained = rloo(model, tokenizer, tmp_path, score=score, **values)
    assert sorted(prompt for prompt, _ in seen) == sorted(PROMPTS * 2)
    ended = np.array([ids[-1] == tokenizer.eos_token_id for _, ids in seen])
    assert 0 < ended.sum() < len(ended)
    assert min(len(ids) for _, ids in seen) < 30
    assert all(ids.count(tokenizer.eos_token_id) <= 1 for _, ids in seen)
    assert trained.log["reward"].iloc[0] == pytest.approx(-3.0 * (~ended[:16]).mean())


def test_rloo_refuses_prompts_that_would_be_lost(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="31 prompts are not whole steps of 8"):
        rloo(model, tokenizer, tmp_path, prompts=PROMPTS[1:])


def test_rloo_reads_prompts_as_the_rest_of_the_recipe_does(model, tokenizer, tmp_path, monkeypatch):
    read = []
    generate = models.generate
    monkeypatch.setattr(models, "generate", lambda *args, **how: (read.extend(args[2]), generate(*args, **how))[1])
    tokenizer.split_special_tokens = False  # trl's own way would turn the text of a special token into that token
    try:
        rloo(model, tokenizer, tmp_path, prompts=[f"{prompt} </s>" for prompt in PROMPTS])
    finally:
        tokenizer.split_special_tokens = True
    assert read and all(tokenizer.eos_token_id not in ids for ids in read)


def test_rloo_is_the_same_for_the_same_seed(tokenizer, tmp_path):
    def run(name):
        folder = rloo(new_model(tokenizer), tokenizer, tmp_path / name, prompts=PROMPTS[:16], seed=3).adapters[2]
        return (folder / "adapter_model.safetensors").read_bytes()

    assert run("one") == run("again")


# -- what a policy writes -----------------------------------------------------------------------------------------


def test_rewards_in_deviations_from_the_start():
    score = alternatives.normalised(even, mean=1.5, std=0.5)
    assert score(["p", "p"], [[1, 2], [1, 3]]) == pytest.approx([0.0, -3.0])
    with pytest.raises(ValueError, match="same reward"):
        alternatives.normalised(even, mean=0.0, std=0.0)


# -- best of n ----------------------------------------------------------------------------------------------------


def drawn(rewards, utilities):
    rows = [
        (f"d{document}", reward, utility)
        for document, pairs in enumerate(zip(rewards, utilities, strict=True))
        for reward, utility in zip(*pairs, strict=True)
    ]
    return pd.DataFrame(rows, columns=["document", "reward", "utility"])


def test_the_best_of_n_is_the_maximum():
    frame = drawn([[1.0, 5.0, 3.0], [7.0, 2.0, 2.0]], [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert list(alternatives.best(frame)["utility"]) == [0.2, 0.4]
    assert list(alternatives.best(frame, n=1)["reward"]) == [1.0, 7.0]
    assert list(alternatives.best(frame, column="utility")["reward"]) == [3.0, 2.0]


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(-5, 5)), min_size=1, max_size=6, unique_by=lambda x: x[0]))
def test_expected_best_is_the_mean_over_all_draws(values):
    rewards, utilities = zip(*values, strict=True)
    frame = drawn([rewards], [utilities])
    for n in range(1, len(values) + 1):
        subsets = list(itertools.combinations(range(len(values)), n))
        wanted = np.mean([utilities[max(subset, key=lambda i: rewards[i])] for subset in subsets])
        assert alternatives.expected_best(frame, "utility", n=n) == pytest.approx([wanted])


def test_expected_best_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="best of 3"):
        alternatives.expected_best(drawn([[1, 2]], [[1, 2]]), "reward", n=3)


def test_the_kl_of_best_of_n_is_below_its_bound():
    """For a uniform continuous score the KL is exact; a discrete one stays below."""
    assert alternatives.best_of_n_kl(1) == 0
    levels = 50
    for n in (2, 4, 16):
        chance = np.array([((k + 1) / levels) ** n - (k / levels) ** n for k in range(levels)])
        exact = float((chance * np.log(chance * levels)).sum())
        assert 0.9 * alternatives.best_of_n_kl(n) < exact < alternatives.best_of_n_kl(n)


# -- the diagnosis ------------------------------------------------------------------------------------------------

HEALTHY = {
    "start greedy, utility": 0.0,
    "start, utility": -0.2,
    "start, reward": 0.0,
    "best-of-n by truth, utility": 1.0,
    "best-of-n by reward, utility": 0.5,
    "PPO, reward": 2.0,
    "PPO, utility": 0.7,
    "DPO, utility": 0.5,
    "RLOO, utility": 0.6,
}


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, None),
        ({"best-of-n by truth, utility": 0.0}, "SFT"),
        ({"best-of-n by reward, utility": -0.2}, "reward model"),
        ({"PPO, reward": 0.0, "PPO, utility": -0.2}, "PPO"),
        ({"PPO, utility": -0.5}, "reward model"),
        ({"PPO, utility": 0.2}, "PPO"),
    ],
)
def test_the_diagnosis_names_what_is_at_fault(changes, first):
    noise = np.random.default_rng(0).normal(scale=0.1, size=(60, len(HEALTHY)))
    measured = pd.DataFrame(list((HEALTHY | changes).values()) + noise, columns=list(HEALTHY))
    suspects = [name for name in alternatives.diagnose(measured, seed=0)["suspect"] if name]
    assert (suspects[0].split(":")[0] if suspects else None) == first


def test_the_diagnosis_says_so_where_the_truth_is_not_known():
    measured = pd.DataFrame([HEALTHY] * 5).assign(**{name: np.nan for name in HEALTHY if "utility" in name})
    found = alternatives.diagnose(measured, seed=0)
    assert list(found.loc[found["holds"].notna(), "question"]) == ["Does PPO raise the reward?"]
    assert not found["suspect"].any()
