"""One base with three adapters: what each of them says, and that none of them disturbs the others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from erlib.lm import models
from erlib.lm.packing import Rollout, pack
from erlib.policy.multiadapter import MultiAdapter, RewardModel, check_start, checksum, read_reward_model
from erlib.rewards import reward_model

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


class Tokens:
    """As much of a tokenizer as a base of 20 token ids needs."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, vocab_size=20, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def reward_adapter(folder: Path, *, heads: int = 3) -> PeftModel:
    """Write an adapter with random weights and its heads, as reward training does; gives the model it was made on."""
    scorer = base()
    torch.manual_seed(1)
    scorer.score = torch.nn.Linear(SHAPE["hidden_size"], heads, bias=False)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["score"], modules_to_save=["score"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    trained = get_peft_model(scorer, lora)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trained.save_pretrained(folder)
    return trained.eval()


@pytest.fixture
def core(tmp_path: Path) -> MultiAdapter:
    reward_adapter(tmp_path / "adapter")
    return adapters(tmp_path / "adapter")


def adapters(folder: Path, mean: float = 0.0, std: float = 1.0) -> MultiAdapter:
    reward = RewardModel(folder, mean, std, np.zeros(1))
    return MultiAdapter(base(), Tokens(), reward, lora_rank=4, lora_alpha=8, temperature=0.7, seed=0)


def rollouts() -> list[Rollout]:
    """Two prompts with samples of different length, one of them alone."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, 20, size=n).tolist()) for n in (9, 4)]
    return [
        Rollout(prompts[which], (*rng.integers(3, 20, size=n).tolist(), 2), "", True)
        for which, n in ((0, 3), (0, 7), (0, 1), (1, 5))
    ]


def disturb_policy(core: MultiAdapter) -> None:
    for name, parameter in core.trained("policy").items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def alone(logits: torch.Tensor, row: Rollout) -> torch.Tensor:
    spread = torch.log_softmax(logits[0, len(row.prompt) - 1 : -1] / 0.7, dim=-1)
    return spread.gather(1, torch.tensor(row.ids)[:, None]).squeeze(1)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5)


def test_rows_that_share_a_line_get_what_they_get_alone(core: MultiAdapter) -> None:
    disturb_policy(core)
    rows = rollouts()
    with core.scoring():
        packed, entropy = core.logprobs(rows, entropy=True)
        for line, row in enumerate(rows):
            logits = core.model(input_ids=torch.tensor([[*row.prompt, *row.ids]])).logits
            n = len(row.ids)
            assert close(packed[line, :n], alone(logits, row))
            assert not packed[line, n:].any()
            spread = torch.log_softmax(logits[0, len(row.prompt) - 1 : -1] / 0.7, dim=-1)
            assert close(entropy[line, :n], -(spread.exp() * spread).sum(-1))
    width = core.pack(rows).inputs["input_ids"].shape
    assert tuple(width) == (2, 9 + 4 + 8 + 2)  # the prompt of three rows is read once


def test_the_reward_is_what_phase_06_measured(tmp_path: Path) -> None:
    """The scores of the model on which 06 was trained, and the value model begins as their head, in deviations."""
    scorer = reward_adapter(tmp_path / "adapter")
    core = adapters(tmp_path / "adapter", mean=0.5, std=2.0)
    rows = rollouts()
    with torch.no_grad():
        wanted = reward_model.token_scores(scorer, pack(rows, pad=0, dtype=torch.float32, config=scorer.config))
        alone = [
            reward_model.token_scores(scorer, pack([row], pad=0, dtype=torch.float32, config=scorer.config)).sum()
            for row in rows
        ]
        head = [scorer.get_base_model().score(state(scorer, row)).sum().item() for row in rows]
        with core.scoring():
            core.use("reward")
            found = core.rewards(rows)
            assert close(found, wanted.sum(dim=2))
            assert close(found.sum(dim=1), torch.stack(alone))
            assert all(not found[line, len(row.ids) :].any() for line, row in enumerate(rows))
            core.use("value")  # read one token before an end that is appended
            longer = [row._replace(ids=(*row.ids, 0)) for row in rows]
            first = core.values(longer)[torch.arange(4), torch.tensor([len(row.ids) for row in rows])]
            assert close(first, torch.tensor(head) / 8 / 2.0)


def state(scorer: PeftModel, row: Rollout) -> torch.Tensor:
    """The last hidden state (H,) of a rollout."""
    ids = torch.tensor([[*row.prompt, *row.ids]])
    return scorer(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]


def test_adapters_off_is_the_base_and_a_fresh_policy_is_too(core: MultiAdapter) -> None:
    plain, row = base(), rollouts()[0]
    ids = torch.tensor([[*row.prompt, *row.ids]])
    with torch.no_grad():
        wanted = plain(input_ids=ids, use_cache=False).logits
    check_start(core, wanted, ids, fresh=True)
    disturb_policy(core)
    check_start(core, wanted, ids, fresh=False)
    with pytest.raises(RuntimeError, match="a fresh policy is the checkpoint"):
        check_start(core, wanted, ids, fresh=True)
    with pytest.raises(RuntimeError, match="reference logits are the merged checkpoint's"):
        check_start(core, wanted + 1e-6, ids, fresh=False)


def test_a_switch_that_leaves_an_adapter_on_is_noticed(core: MultiAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([rollouts()[0].prompt])
    with torch.no_grad():
        plain = base()(input_ids=ids, use_cache=False).logits
    use = core.use
    monkeypatch.setattr(core, "use", lambda name: use(name or "reward"))
    with pytest.raises(RuntimeError, match="reference logits"):
        check_start(core, plain, ids, fresh=True)


def test_gradients_reach_the_adapter_in_use_and_nothing_else(core: MultiAdapter) -> None:
    policy, value = core.trained("policy"), core.trained("value")
    assert {"value_head.weight", "value_head.bias"} <= value.keys()
    core.logprobs(rollouts())[0].sum().backward()
    with_gradient = {name for name, p in core.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient
    assert with_gradient <= policy.keys()
    core.model.zero_grad()
    core.use("value")
    core.values(rollouts()).sum().backward()
    with_gradient = {name for name, p in core.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient
    assert with_gradient <= value.keys()


@pytest.mark.parametrize("training", [True, False])
def test_a_scoring_pass_leaves_mode_and_flags(core: MultiAdapter, training: bool) -> None:
    core.model.train(training)
    flags = {name: parameter.requires_grad for name, parameter in core.model.named_parameters()}
    assert {name for name, flag in flags.items() if flag} == {
        name for name in flags if ".policy." in name or ".value." in name
    }
    with core.scoring():
        for name in ("reward", None, "value"):
            core.use(name)
            core.rewards(rollouts())
    assert core.model.training is training
    assert flags == {name: parameter.requires_grad for name, parameter in core.model.named_parameters()}


def test_the_digest_sees_the_frozen_parts_only(core: MultiAdapter) -> None:
    before = core.frozen_digest()
    disturb_policy(core)
    assert core.frozen_digest() == before
    with torch.no_grad():
        core.reward_head[0, 0] += 1e-6
    assert core.frozen_digest() != before


def test_a_model_with_an_adapter_is_refused(core: MultiAdapter, tmp_path: Path) -> None:
    for model in (core.model, core.model.get_base_model()):
        with pytest.raises(ValueError, match="merge it"):
            MultiAdapter(
                model, Tokens(), RewardModel(tmp_path, 0, 1, np.zeros(1)),
                lora_rank=4, lora_alpha=8, temperature=1.0, seed=0,
            )  # fmt: skip


def test_a_reward_adapter_without_head_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base(), lora).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="has no score head for each aspect: train it"):
        adapters(tmp_path / "headless")
    reward_adapter(tmp_path / "one", heads=1)
    with pytest.raises(ValueError, match="has no score head for each aspect: train it"):
        adapters(tmp_path / "one")


def test_a_reward_model_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    record = {"checkpoint": "a" * 64, "mean": 0.1, "std": 2.0, "accuracy": 0.8, "low": 0.7, "high": 0.9}
    record["sampling_temperature"] = 0.6
    (tmp_path / "reward.json").write_text(json.dumps(record))
    (tmp_path / "evaluation_rewards.csv").write_text("reward\n0.5\n-1.25\n")
    found = read_reward_model(tmp_path, checkpoint="a" * 64)
    assert (found.mean, found.std, found.temperature) == (0.1, 2.0, 0.6)
    assert found.evaluation.tolist() == [0.5, -1.25]
    with pytest.raises(ValueError, match=r"reward.json.*aaaaaaaaaaaa.*bbbbbbbbbbbb.*phases 04 to 06"):
        read_reward_model(tmp_path, checkpoint="b" * 64)


def test_dropout_is_off_for_good(tmp_path: Path) -> None:
    reward_adapter(tmp_path / "adapter")
    model = base()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    reward = RewardModel(tmp_path / "adapter", 0.0, 1.0, np.zeros(1))
    core = MultiAdapter(model, Tokens(), reward, lora_rank=4, lora_alpha=8, temperature=1.0, seed=0)
    core.model.train()
    assert torch.equal(core.logprobs(rollouts())[0], core.logprobs(rollouts())[0])


def test_a_folded_adapter_says_the_same_and_leaves_the_weights_as_they_were(core: MultiAdapter) -> None:
    disturb_policy(core)
    before = {name: tensor.clone() for name, tensor in core.model.state_dict().items()}
    ids = torch.tensor([[3, 7, 5, 11]])
    with core.scoring():
        for name in ("policy", "reward", None):
            core.use(name)
            wanted = core.model(input_ids=ids).logits
            with models.folded(core.model):
                assert close(core.model(input_ids=ids).logits, wanted)
                changed = [not torch.equal(core.model.state_dict()[key], before[key]) for key in before]
                assert any(changed) == (name is not None)
            assert torch.equal(core.model(input_ids=ids).logits, wanted)
        core.use("policy")
        with pytest.raises(KeyError), models.folded(core.model):
            raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in core.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_checksum_sees_a_flipped_bit_and_exchanged_words_in_whole_or_in_parts(dtype: torch.dtype) -> None:
    tensor = torch.arange(1000).to(dtype).reshape(20, 50)
    before = checksum(tensor)
    assert checksum(tensor.clone(), at_once=64) == before
    flipped, exchanged = tensor.clone(), tensor.clone()
    flipped.view(torch.uint8)[7, 3] ^= 1
    exchanged[[2, 3]] = exchanged[[3, 2]]
    assert len({before, checksum(flipped), checksum(exchanged)}) == 3
