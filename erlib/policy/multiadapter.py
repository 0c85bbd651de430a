"""One base in memory, and on it policy, frozen reward model, value model and, with all adapters off, the reference.

Four models cost one model and three LoRA adapters (Hydra-RLHF, 2309.00754). The value model starts as the reward model:
its head first gives what the token before a state added to the normalised reward.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from erlib.lm import models
from erlib.lm.packing import Packed, Rollout, last_states, pack_for, take, token_logprobs
from erlib.rewards.reward_model import HEAD, combine
from erlib.task.schema import ASPECTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# -- the reward model's record --------------------------------------------------------------------------------------


class RewardModel(NamedTuple):
    """A trained reward adapter with its head, `mean` and `std` of its scores at the round's start, its scores (N,) on
    held-out documents, which the guard compares with, and the temperature at which those samples were drawn."""

    adapter: Path
    mean: float
    std: float
    evaluation: np.ndarray
    temperature: float = 1.0


def read_reward_model(folder: Path, *, checkpoint: str) -> RewardModel:
    """Read what phase 06 wrote; ValueError when it belongs to another checkpoint than the one to train."""
    record = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    if record["checkpoint"] != checkpoint:
        raise ValueError(
            f"{folder / 'reward.json'}: this reward model belongs to checkpoint {record['checkpoint'][:12]}, not to "
            f"{checkpoint[:12]}: run phases 04 to 06 of this round again, or point at the round's own phase 06"
        )
    evaluation = np.loadtxt(folder / "evaluation_rewards.csv", skiprows=1, ndmin=1)
    return RewardModel(folder / "adapter", record["mean"], record["std"], evaluation, record["sampling_temperature"])


# -- one base, three adapters ---------------------------------------------------------------------------------------


class MultiAdapter:
    """A causal LM with the adapters `policy` and `value` (trained) and `reward` (frozen), and the two score heads.

    `use` is the only place that switches adapters. Every method that scores leaves gradients to its caller.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        reward: RewardModel,
        *,
        lora_rank: int,
        lora_alpha: int,
        temperature: float,
        seed: int,
    ):
        from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer
        from safetensors.torch import load_file

        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("the model carries an adapter: with adapters off it would not be the checkpoint; merge it")
        models.seed_everything(seed)
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config, adapter_name="policy")
        weights = load_file(reward.adapter / "adapter_model.safetensors")
        head = next((weights.pop(name) for name in list(weights) if name.endswith("score.weight")), None)
        if head is None or head.shape[0] != len(ASPECTS):
            raise ValueError(f"{reward.adapter} has no score head for each aspect: train it with `reward_model.train`")
        head = head.float().sum(dim=0, keepdim=True)  # what is rewarded is the sum over aspects
        for name in ("reward", "value"):
            saved = LoraConfig.from_pretrained(str(reward.adapter))
            saved.modules_to_save, saved.exclude_modules, saved.inference_mode = None, None, False  # the head is here
            self.model.add_adapter(name, saved)
            read = set_peft_model_state_dict(self.model, dict(weights), adapter_name=name)
            missing = [key for key in read.missing_keys if f".{name}." in key]
            if missing or read.unexpected_keys:
                raise ValueError(f"{reward.adapter} does not fit this model: {[*missing, *read.unexpected_keys][:3]}")
        self.layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self.reward_head = head.to(model.device)
        self.value_head = torch.nn.Linear(head.shape[1], 1).to(model.device)
        with torch.no_grad():  # in deviations, as the reward is; 0 in the mean, as the normalised reward is
            self.value_head.weight.copy_(HEAD * head / reward.std)
            self.value_head.bias.zero_()
        for module in model.modules():  # dropout would make old and new log-probabilities differ
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        self.pad, self.temperature, self.device = tokenizer.pad_token_id, temperature, model.device
        self.flags = [(p, ".policy." in name or ".value." in name) for name, p in self.model.named_parameters()]
        self.use("policy")

    def use(self, name: str | None) -> None:
        """Switch to an adapter, or to the reference (None); what is trained and what is frozen stays as it was."""
        for layer in self.layers:
            layer.set_adapter([name] if name else [])
        for parameter, trained in self.flags:  # peft flips these with every switch
            parameter.requires_grad = trained

    def trained(self, group: str) -> dict[str, torch.nn.Parameter]:
        """The trained parameters of `policy` or `value` by name, the value head included."""
        found = {name: p for name, p in self.model.named_parameters() if f".{group}." in name}
        heads = {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return found | (heads if group == "value" else {})

    def frozen_digest(self) -> str:
        """A digest of the bits of everything that must never change: base, reward adapter, reward head."""
        frozen = {
            name: t for name, t in self.model.state_dict().items() if not {"policy", "value"} & {*name.split(".")}
        }
        frozen["reward_head"] = self.reward_head
        rows = [(name, tuple(tensor.shape), checksum(tensor)) for name, tensor in frozen.items()]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A pass without gradients, in evaluation mode; ends with the policy on and every flag as it was."""
        training = self.model.training
        with models.evaluating(self.model):
            yield
        self.use("policy")
        as_before = all(parameter.requires_grad == trained for parameter, trained in self.flags)
        require(as_before and self.model.training == training, "a scoring pass changed requires_grad or the mode")

    def pack(self, rows: Sequence[Rollout]) -> Packed:
        """Rollouts laid out for a forward pass; neighbours of one prompt share its encoding."""
        return pack_for(self.model, rows, pad=self.pad)

    def _states(self, packed: Packed) -> torch.Tensor:
        return last_states(self.model.get_base_model(), packed)

    def logprobs(self, rows: Sequence[Rollout], *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (N, T) of each completion token under softmax(logits / temperature), and entropy if asked."""
        packed = self.pack(rows)
        states = self._states(packed)
        return token_logprobs(
            self.model.get_base_model(), packed, states, temperature=self.temperature, entropy=entropy
        )

    def values(self, rows: Sequence[Rollout]) -> torch.Tensor:
        """Value of the state before each completion token (N, T)."""
        packed = self.pack(rows)
        return self.value_head(take(self._states(packed), packed.before).float()).squeeze(2) * packed.mask

    def rewards(self, rows: Sequence[Rollout]) -> torch.Tensor:
        """Raw score of each completion token (N, T), 0 behind the end (`reward.combine`); their sum is the reward."""
        packed = self.pack(rows)
        head = partial(torch.nn.functional.linear, weight=self.reward_head)
        return combine(self.model.get_base_model(), packed, self._states(packed), heads=head).squeeze(2)


def checksum(tensor: torch.Tensor, *, at_once: int = 1 << 24) -> int:
    """A weighted sum of a tensor's bits, computed where it lies: 15 GB of weights take a minute by way of the CPU.

    Each word of 16 bits counts with an odd factor of its own, modulo 2^64, so that a bit that flips and words that are
    exchanged change it.
    """
    words = tensor.detach().contiguous().flatten()
    words = words.view(torch.int16) if words.element_size() % 2 == 0 else words.view(torch.uint8)
    total = 0
    for start in range(0, len(words), at_once):
        part = words[start : start + at_once].long()
        places = torch.arange(start, start + len(part), device=part.device)
        total += int((part * (places * 0x1E3779B97F4A7C15 | 1)).sum())
    return total % 2**64


def require(holds: bool, invariant: str) -> None:
    """Raise RuntimeError, naming the invariant of training that does not hold."""
    if not holds:
        raise RuntimeError(f"PPO invariant broken: {invariant}")


def check_start(core: MultiAdapter, plain: torch.Tensor, probe: torch.Tensor, *, fresh: bool) -> None:
    """Raise RuntimeError unless the adapters leave the base alone.

    `plain` are its logits on `probe` (1, 3 tokens or more) from before the adapters came.
    """

    def logits(name: str | None) -> torch.Tensor:
        core.use(name)
        return core.model(input_ids=probe, use_cache=False).logits

    ids = probe[0].tolist()
    rows = [Rollout(tuple(ids[:-2]), tuple(ids[-2:]))] * 2
    spread = torch.log_softmax(plain[0, -3:-1].float() / core.temperature, dim=-1)
    wanted = spread.gather(1, probe[0, -2:, None])
    with core.scoring():
        require(torch.equal(logits(None), plain), "reference logits are the merged checkpoint's")
        packed, _ = core.logprobs(rows)
        near = torch.allclose(packed, wanted.T.expand(2, -1), atol=1e-3 if plain.dtype == torch.float32 else 0.3)
        require(near, "packed rows have the log-probabilities that the model gives them alone")
        policy = logits("policy")
        logits("reward")
        require(torch.equal(logits("policy"), policy), "policy, reward, policy leaves the policy's output bit-exact")
        require(not fresh or torch.equal(policy, plain), "a fresh policy is the checkpoint")
