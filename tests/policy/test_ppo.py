"""PPO on a language model of twelve words: known optima, invariants, resume, guard, and two processes for one."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from erlib.lm import models
from erlib.lm.packing import Rollout
from erlib.policy import losses, ppo, rollouts
from erlib.policy.multiadapter import MultiAdapter, RewardModel
from erlib.rewards.reward_model import HEAD, LIKELIHOOD

WORDS = ["<pad>", "<s>", "</s>", "kor", "vel", "tamu", "osti", "brin", "zan", "mel", "dro", "none"]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = ["kor vel", "tamu osti brin zan", "mel", "dro dro kor"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special, padding_side="left")


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, initializer_range=0.25,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def reward_model(folder: Path, head: torch.Tensor, *, std: float = 0.0, **changes: Any) -> RewardModel:
    """A saved reward adapter with this head (1, H), its LoRA weights of size `std`; the guard's reference is wide."""
    scorer = base()
    scorer.score = torch.nn.Linear(SHAPE["hidden_size"], 3, bias=False)
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["score"], modules_to_save=["score"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    trained = get_peft_model(scorer, lora)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
        if "score" in name:
            parameter.data.copy_(head / 3)  # an aspect a row; their sum is the reward
    trained.save_pretrained(folder)
    evaluation = np.random.default_rng(0).normal(0, 1, 300)
    return RewardModel(folder, 0.0, 1.0, evaluation)._replace(**changes)


def word_probabilities(model: torch.nn.Module, prompt: str) -> torch.Tensor:
    """The distribution (V,) of the first word after a prompt."""
    with torch.no_grad():
        ids = torch.tensor([models.encode_prompt(tokenizer(), prompt)])
        return model(input_ids=ids).logits[0, -1].softmax(-1)


def head_for(prompt: str, rewards: torch.Tensor) -> torch.Tensor:
    """The score head (1, H) that gives one-word completions of the prompt these rewards (V,)."""
    start = models.encode_prompt(tokenizer(), prompt)
    with torch.no_grad():
        rows = torch.tensor([[*start, word] for word in range(len(WORDS))])
        states = base().model(input_ids=rows).last_hidden_state[:, -1]
        left = rewards - LIKELIHOOD * word_probabilities(base(), prompt).log()  # what the head has to add
        return torch.linalg.lstsq(states, left[:, None] / HEAD).solution.T


def train(folder: Path, reward: RewardModel, prompts: list[str] = PROMPTS, **changes: Any) -> ppo.Trained:
    values = {
        "harness": lambda model: {"gold_entity_f1": 0.5}, "steps": 4, "prompts_per_step": 4, "samples": 4,
        "max_new_tokens": 6, "learning_rate": 5e-3, "value_learning_rate": 5e-3, "epochs": 2, "mini_batch_size": 2,
        "micro_batch_size": 1, "generation_batch_size": 8, "lora_rank": 4, "lora_alpha": 8, "guard_window": 1000,
        "checkpoint_every": 1, "seed": 3,
    }  # fmt: skip
    values |= changes
    return ppo.train(
        base(), tokenizer(), prompts, reward=reward, out=folder / "policy", checkpoints=folder / "checkpoints",
        harness=values.pop("harness"), settings=settings(**values),
    )  # fmt: skip


def settings(**values: Any) -> ppo.Settings:
    """Settings of fields by their names, whichever group they belong to; an unknown one is an error."""
    groups = {
        "sampling": ppo.Sampling, "shaping": ppo.Shaping, "update": ppo.Update, "adapter": ppo.Adapter,
        "upkeep": ppo.Upkeep,
    }  # fmt: skip
    given = {
        name: kind(**{field.name: values.pop(field.name) for field in fields(kind) if field.name in values})
        for name, kind in groups.items()
    }
    return ppo.Settings(**given, **values)


def bandit(folder: Path, rewards: torch.Tensor, **changes: Any) -> ppo.Trained:
    """Train on the one decision which word to say after `mel`."""
    reward = reward_model(folder / "reward", head_for("mel", rewards), **changes.pop("reward", {}))
    values = {
        "steps": 30, "prompts_per_step": 8, "samples": 8, "max_new_tokens": 1, "missing_end_penalty": 0.0,
        "mini_batch_size": 4, "micro_batch_size": 4, "epochs": 4, "kl_target": None, "learning_rate": 1e-2,
        "generation_batch_size": 64, "checkpoint_every": 5, "harness_every": 1000,
    }  # fmt: skip
    return train(folder, reward, ["mel"], **(values | changes))


@pytest.fixture
def random_reward(tmp_path: Path) -> RewardModel:
    torch.manual_seed(5)
    return reward_model(tmp_path / "reward", torch.randn(1, 32), std=0.2)


# -- it learns ----------------------------------------------------------------------------------------------------


def test_a_bandit_ends_with_the_best_word(tmp_path: Path) -> None:
    rewards = torch.zeros(len(WORDS))
    rewards[7] = 1.0
    before = word_probabilities(base(), "mel")
    trained = bandit(tmp_path, rewards, kl_coef=0.0)
    after = word_probabilities(trained.model, "mel")
    assert before[7] < 0.2
    assert after[7] > 0.9
    assert trained.log["reward_mean"].iloc[-1] > trained.log["reward_mean"].iloc[0] + 0.6
    assert trained.log["explained_variance"].dropna().iloc[-1] > -1


def test_with_a_kl_coefficient_the_known_optimum_is_approached(tmp_path: Path) -> None:
    beta, rewards = 0.5, torch.linspace(-1, 1, len(WORDS))
    reference = word_probabilities(base(), "mel")
    optimum = torch.softmax(reference.log() + rewards / beta, dim=-1)
    trained = bandit(tmp_path, rewards, kl_coef=beta, target_kl=1.0)
    reached = word_probabilities(trained.model, "mel")
    assert (reference - optimum).abs().sum() / 2 > 0.3
    assert (reached - optimum).abs().sum() / 2 < 0.12  # total variation
    exact = float((optimum * (optimum / reference).log()).sum())
    assert trained.log["kl"].tail(5).mean() == pytest.approx(exact, rel=0.4)


# -- what must stay, and what is logged ------------------------------------------------------------------------------


def test_reward_adapter_head_and_base_stay_and_the_policy_moves(tmp_path: Path, random_reward: RewardModel) -> None:
    file = random_reward.adapter / "adapter_model.safetensors"
    saved = file.read_bytes()
    trained = train(tmp_path, random_reward)
    weights = trained.model.state_dict()
    for name, tensor in base().state_dict().items():
        kept = weights.get(f"base_model.model.{name}")
        kept = weights[f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight"] if kept is None else kept
        assert torch.equal(kept, tensor), name
    for name, tensor in load_file(file).items():
        if "lora" in name:
            assert torch.equal(weights[name.replace(".weight", ".reward.weight")], tensor), name
    assert file.read_bytes() == saved
    policy = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in policy.items() if "lora_B" in name)
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_the_log_has_a_row_for_each_policy_that_was_sampled(tmp_path: Path, random_reward: RewardModel) -> None:
    log = train(tmp_path, random_reward, warmup_steps=2, harness_every=2).log
    assert log["step"].tolist() == [0, 1, 2, 3, 4]
    assert log["kl"].tolist()[:3] == [0.0] * 3  # the policy waits for the critic
    assert log["kl_k3"].iloc[3] > 0
    assert log["grad_norm"].isna().tolist() == [True, True, False, False, True]
    assert log["gold_entity_f1"].notna().tolist() == [True, False, True, False, True]
    assert log["learning_rate"].tolist()[:4] == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])
    wanted = {
        "entropy", "clip_fraction", "max_ratio", "approx_kl", "explained_variance", "reward_mean", "reward_std",
        "reward_q05", "reward_q50", "reward_q95", "reward_outside", "eos_rate", "length", "parse_rate", "kl_coef",
        "seconds_generation", "seconds_scoring", "seconds_update", "peak_memory_mb", "skipped", "mini_batches",
    }  # fmt: skip
    assert wanted <= set(log.columns)
    assert (log["mini_batches"].dropna() == 4).all()


def test_the_policy_saved_is_the_policy_trained(tmp_path: Path, random_reward: RewardModel) -> None:
    from peft import PeftModel

    trained = train(tmp_path, random_reward)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "policy").eval()
    for prompt in PROMPTS:
        assert torch.equal(word_probabilities(loaded, prompt), word_probabilities(trained.model, prompt))


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"whiten_rewards": True}])
def test_options_run(tmp_path: Path, random_reward: RewardModel, changes: dict) -> None:
    log = train(tmp_path, random_reward, steps=2, **changes).log
    assert log["grad_norm"].iloc[1] > 0


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, random_reward: RewardModel) -> None:
    for name, value in (("plain", False), ("checkpointed", True)):
        train(tmp_path / name, random_reward, steps=2, gradient_checkpointing=value)
    a, b = (load_file(tmp_path / name / "policy" / "adapter_model.safetensors") for name in ("plain", "checkpointed"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


# -- parts --------------------------------------------------------------------------------------------------------


def scored(rows: int = 3) -> rollouts.Batch:
    """Three completions of 2, 3 and 1 tokens; the last one did not end."""
    lengths = [2, 3, 1][:rows]
    found = [Rollout((1, 3), tuple([4] * n), "", index < 2) for index, n in enumerate(lengths)]
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0]])
    zeros, scores = torch.zeros(3, 3), torch.tensor([[2.5, 0.5, 0], [1, 1, -3], [100, 0, 0]])
    return rollouts.Batch(found, mask, -0.5 * mask, zeros, -0.7 * mask, zeros, scores)


def test_the_score_lands_on_the_last_real_token_and_the_kl_on_each() -> None:
    reward = RewardModel(Path(), 1.0, 2.0, np.zeros(1))
    shaping = rollouts.Shaping(
        reward_clip=5.0, missing_end_penalty=1.5, dense_reward=False, whiten_rewards=False, gamma=1.0, lam=1.0
    )
    found = rollouts.with_advantages(scored(), reward, kl_coef=0.1, shaping=shaping)
    kl = 0.1 * 0.2  # coefficient times (-.5 + .7)
    last = [(3 - 1) / 2, (-1 - 1) / 2, 5.0 - 1.5]  # normalised, clipped, less the penalty for a missing end
    wanted = [
        [last[0] - 2 * kl, last[0] - kl, 0],
        [last[1] - 3 * kl, last[1] - 2 * kl, last[1] - kl],
        [last[2] - kl, 0, 0],
    ]
    assert torch.allclose(found.returns, torch.tensor(wanted), atol=1e-6)
    assert torch.equal(found.advantages, losses.whiten(found.returns, found.mask))
    # Dense, the sum from the first token on is the same; from a later one on it lacks what earlier tokens added.
    dense = rollouts.with_advantages(scored(), reward, kl_coef=0.1, shaping=replace(shaping, dense_reward=True)).returns
    before = torch.tensor([[0, 2.5, 0], [0, 1, 2], [0, 0, 0]]) / 2
    assert torch.allclose(dense, found.returns - before, atol=1e-6)


@pytest.fixture
def ready(random_reward: RewardModel) -> tuple:
    """An adapter stack, an optimiser, an accelerator and a batch with advantages."""
    core = MultiAdapter(base(), tokenizer(), random_reward, lora_rank=4, lora_alpha=8, temperature=1.0, seed=0)
    groups = [{"params": list(core.trained(name).values())} for name in ("policy", "value")]
    accelerator = Accelerator(cpu=True)
    prompts = [models.encode_prompt(tokenizer(), prompt) for prompt in PROMPTS for _ in range(2)]
    rng = np.random.default_rng(0)
    sampling = rollouts.Sampling(generation_batch_size=8, max_new_tokens=5)
    rows = rollouts.collect(core, tokenizer(), accelerator, prompts, rng=rng, sampling=sampling)
    batch = rollouts.score(core, accelerator, rows, samples=2, batch_size=2)
    batch = batch._replace(advantages=torch.randn(batch.mask.shape) * batch.mask, returns=batch.values + 1)
    return core, torch.optim.Adam(groups, lr=2e-2, eps=1e-5), accelerator, batch


def test_the_samples_of_a_prompt_share_its_encoding_and_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = base(), []
    forward = model.forward

    def counted(**inputs: Any) -> Any:
        read.append(inputs["input_ids"].shape[0])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counted)
    ids = [models.encode_prompt(tokenizer(), prompt) for prompt in PROMPTS]
    asked = [prompt for prompt in ids for _ in range(3)]
    options = {"max_new_tokens": 4, "temperature": 1.0, "seed": 2, "batch_size": 12, "stop": ()}
    together = models.generate(model, tokenizer(), asked, **options)
    assert read[0] == len(PROMPTS)  # prompts are read once; what follows is a line for each sample
    assert max(read[1:]) > len(PROMPTS)
    alone = models.generate(base(), tokenizer(), asked, **options | {"batch_size": 1})
    assert [c.ids for c in together] == [c.ids for c in alone]


UPDATE = ppo.Update(epochs=2, mini_batch_size=2, micro_batch_size=1, target_kl=10.0)


def update(ready: tuple, **changes: Any) -> dict[str, float]:
    rng, chosen = np.random.default_rng(0), replace(UPDATE, **changes)
    return ppo._update(*ready, rng=rng, train_policy=True, first=True, samples=2, update=chosen)


def policy_bytes(ready: tuple) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in ready[0].trained("policy").values())


def test_an_update_trains_both_and_only_them(ready: tuple) -> None:
    in_optimiser = {id(parameter) for group in ready[1].param_groups for parameter in group["params"]}
    trained = ready[0].trained("policy") | ready[0].trained("value")
    assert in_optimiser == {id(parameter) for parameter in trained.values()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    figures = update(ready)
    assert figures["grad_norm"] > 0
    assert (figures["mini_batches"], figures["skipped"], figures["stopped_early"]) == (4, 0, 0)
    assert all(not torch.equal(before[name], parameter) for name, parameter in trained.items() if "lora_B" in name)


def test_mini_batches_of_a_runaway_ratio_are_skipped_and_counted(ready: tuple) -> None:
    before = policy_bytes(ready)
    figures = update(ready, ratio_threshold=0.5)
    assert (figures["mini_batches"], figures["skipped"]) == (0, 4)
    assert policy_bytes(ready) == before


def test_target_kl_ends_the_epochs(ready: tuple) -> None:
    figures = update(ready, target_kl=1e-9)
    assert figures["stopped_early"] == 1
    assert figures["mini_batches"] < 4


def test_stale_old_log_probabilities_are_noticed(ready: tuple) -> None:
    batch = ready[3]._replace(logprobs=ready[3].logprobs - 0.1)
    with pytest.raises(RuntimeError, match="every ratio is 1"):
        update((*ready[:3], batch))


def test_a_policy_without_gradient_is_noticed(ready: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    core = ready[0]
    real = core.logprobs

    def switched(rows: list, **options: bool) -> tuple:  # peft's trap: another adapter on before the backward pass
        core.use("policy")
        found = real(rows, **options)
        for layer in core.layers:
            layer.set_adapter(["reward"])
        return tuple(x.detach().requires_grad_() for x in found)

    monkeypatch.setattr(core, "logprobs", switched)
    with pytest.raises(RuntimeError, match="gradient norm is above 0"):
        update(ready)


def test_micro_batches_do_not_change_the_gradient(ready: tuple) -> None:
    core, _, accelerator, batch = ready
    found = []
    for size in (1, 4):
        core.model.zero_grad()
        shape = {"train_policy": True, "samples": 2, "update": replace(UPDATE, micro_batch_size=size)}
        ppo._gradients(core, accelerator, batch, [0, 1, 2, 3], **shape)
        found.append(torch.cat([p.grad.flatten() for p in core.trained("policy").values()]))
    assert found[0].abs().max() > 0
    assert torch.allclose(*found, atol=1e-6)


def test_prompts_are_drawn_once_each_before_any_comes_again() -> None:
    prompts = [[index] for index in range(5)]
    drawn = ppo._draw(prompts, 0, 12, seed=0)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == prompts
    assert drawn[:5] != drawn[5:10]
    assert ppo._draw(prompts, 7, 3, seed=0) == drawn[7:10]


# -- resume -------------------------------------------------------------------------------------------------------


class KillError(Exception):
    """Ends a run as a kill would."""


def kill_at(step: int) -> ppo.Harness:
    calls: list[int] = []

    def harness(model: torch.nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) > step:
            raise KillError
        return {"gold_entity_f1": 0.5}

    return harness


def lasting(log: pd.DataFrame) -> pd.DataFrame:
    """The log without what differs from run to run."""
    return log[[column for column in log if not column.startswith(("seconds", "peak"))]]


def policy(folder: Path) -> bytes:
    return (folder / "policy" / "adapter_model.safetensors").read_bytes()


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, random_reward: RewardModel) -> None:
    whole = train(tmp_path / "whole", random_reward, harness_every=1)
    for step in (1, 3):
        folder = tmp_path / str(step)
        with pytest.raises(KillError):
            train(folder, random_reward, harness=kill_at(step), harness_every=1)
        assert not (folder / "policy").exists()
        if step == 3:  # the newest checkpoint is cut short: the one before it serves
            newest = max((folder / "checkpoints").rglob("step-*.safetensors"))
            assert newest.name == "step-000003.safetensors"
            newest.write_bytes(newest.read_bytes()[:-100])
        resumed = train(folder, random_reward, harness_every=1)
        assert policy(folder) == policy(tmp_path / "whole")
        pd.testing.assert_frame_equal(lasting(resumed.log), lasting(whole.log), check_exact=True)


def test_another_setting_never_resumes(tmp_path: Path, random_reward: RewardModel) -> None:
    with pytest.raises(KillError):
        train(tmp_path, random_reward, harness=kill_at(1), harness_every=1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    with pytest.raises(KillError):
        train(tmp_path, random_reward, harness=kill_at(1), harness_every=1, clip_range=0.3)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_old_checkpoints_go_but_those_an_alarm_may_condemn_stay(tmp_path: Path) -> None:
    for step in range(0, 12, 2):
        (tmp_path / f"step-{step:06d}.safetensors").touch()
    ppo._prune(tmp_path, settled=7)
    assert [int(path.stem[5:]) for path in sorted(tmp_path.iterdir())] == [4, 6, 8, 10]


# -- guard --------------------------------------------------------------------------------------------------------


def start_rewards(rewards: torch.Tensor) -> np.ndarray:
    """Rewards of 300 samples of the start, and a little noise: what the guard compares with."""
    rng = np.random.default_rng(0)
    probabilities = word_probabilities(base(), "mel").double()  # in 32 bits, their sum is 1 on some machines only
    drawn = rng.choice(len(WORDS), size=300, p=(probabilities / probabilities.sum()).numpy())
    return rewards.numpy()[drawn] + rng.normal(0, 0.05, 300)


def test_a_broken_reward_model_is_caught_restored_and_then_ends_the_round(tmp_path: Path) -> None:
    rewards = torch.linspace(-1, 1, len(WORDS))
    evaluation, rare = start_rewards(rewards), int(word_probabilities(base(), "mel").argmin())
    rewards[rare] = 6.0  # hardly met in the evaluation, and then not as highly thought of
    trained = bandit(
        tmp_path, rewards, kl_coef=0.7, target_kl=1.0, guard_window=3, checkpoint_every=2, steps=40,
        reward={"evaluation": evaluation},
    )  # fmt: skip
    assert [event["action"] for event in trained.events] == ["restored", "ended"]
    first, second = trained.events
    assert "outliers" in first["reason"]
    assert first["restored_step"] <= first["step"] - 3
    assert second["restored_step"] <= second["step"] - 3
    assert trained.log["lr_scale"].unique().tolist() == [1.0, 0.25]
    restored = trained.log.index[trained.log["lr_scale"] == 0.25][0]
    assert trained.log["step"][restored] == first["restored_step"]
    assert trained.log["step"].max() < 40
    caught = trained.log["reward_mean"][restored - 1]
    kept = float(word_probabilities(trained.model, "mel") @ rewards)
    assert kept < caught  # the policy that is handed on is one from before
    assert word_probabilities(trained.model, "mel")[rare] < 0.1


def test_an_honest_improvement_trips_nothing(tmp_path: Path) -> None:
    rewards = torch.linspace(-1, 1, len(WORDS))
    trained = bandit(
        tmp_path, rewards, kl_coef=0.5, guard_window=3, steps=15, target_kl=1.0,
        reward={"evaluation": start_rewards(rewards)},
    )  # fmt: skip
    assert trained.events == []
    assert trained.log["reward_mean"].iloc[-1] > trained.log["reward_mean"].iloc[0] + 0.3


# -- processes ----------------------------------------------------------------------------------------------------


def processes_run(folder: Path) -> None:
    """What both launches below train: every batch of the two processes together is that of the one."""
    torch.manual_seed(5)
    reward = reward_model(folder / f"reward-{os.environ.get('RANK', 0)}", torch.randn(1, 32), std=0.2)
    train(folder, reward, steps=2, warmup_steps=0)


def test_two_processes_take_the_same_step_as_one(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ppo.__file__).parents[2])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    processes_run(tmp_path / "one")
    one, two = (load_file(tmp_path / name / "policy" / "adapter_model.safetensors") for name in ("one", "two"))
    assert max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name) > 1e-3
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-5), name


if __name__ == "__main__":
    debug_launcher(processes_run, (Path(sys.argv[1]),), num_processes=2)


@pytest.mark.parametrize(
    ("exact", "largest", "mean", "clipped", "unmoved"),
    [
        (True, 1.0005, 1.0001, 0.0, True),
        (True, 1.01, 1.0001, 0.0, False),
        (False, 1.6, 1.01, 0.01, True),  # one odd token in bfloat16
        (False, 1.6, 1.01, 0.2, False),
        (False, 1.6, 1.2, 0.01, False),
    ],
)
def test_ratios_before_the_first_update_are_1_to_the_precision_of_the_weights(exact, largest, mean, clipped, unmoved):
    found = {"max_ratio": largest, "mean_ratio": mean, "clip_fraction": clipped}
    assert ppo._unmoved(found, exact=exact) == unmoved
