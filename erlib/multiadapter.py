"""One base in memory, and on it policy, frozen reward model, value model and, with all adapters off, the reference.

Four models cost one model and three LoRA adapters (Hydra-RLHF, 2309.00754). The value model starts as the reward model,
its head scaled so that its first prediction is the normalised reward.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from . import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# -- the reward model's record --------------------------------------------------------------------------------------


class RewardModel(NamedTuple):
    """A trained reward adapter with its head, `mean` and `std` of its scores at the round's start, its scores (N,) on
    held-out documents, which the guard compares with, and whether it reads the prompt again after a completion."""

    adapter: Path
    mean: float
    std: float
    evaluation: np.ndarray
    reread: bool = False


def read_reward_model(folder: Path, *, checkpoint: str) -> RewardModel:
    """Read what phase 06 wrote; ValueError when it belongs to another checkpoint than the one to train."""
    record = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    if record["checkpoint"] != checkpoint:
        raise ValueError(
            f"{folder / 'reward.json'}: this reward model belongs to checkpoint {record['checkpoint'][:12]}, not to "
            f"{checkpoint[:12]}: run phases 04 to 06 of this round again, or point at the round's own phase 06"
        )
    evaluation = np.loadtxt(folder / "evaluation_rewards.csv", skiprows=1, ndmin=1)
    return RewardModel(folder / "adapter", record["mean"], record["std"], evaluation, record["reread"])


# -- one base, three adapters ---------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """One sampled completion: token ids of prompt and completion (with its end), its text, whether it ended itself."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finished: bool


class _Packed(NamedTuple):
    """N rollouts in B lines of L tokens; `before` and `last` are places in the flattened lines (B L)."""

    inputs: dict[str, torch.Tensor]
    actions: torch.Tensor  # (N, T) token ids of the completions, padded on the right
    mask: torch.Tensor  # (N, T) which of them are real
    before: torch.Tensor  # (N, T) place of the state that each token follows
    last: torch.Tensor  # (N,) place of the last real token


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
        if head is None or head.shape[0] != 1:
            raise ValueError(f"{reward.adapter} has no score head of one row: train it with task_type SEQ_CLS")
        for name in ("reward", "value"):
            saved = LoraConfig.from_pretrained(str(reward.adapter))
            saved.task_type, saved.modules_to_save, saved.inference_mode = None, None, False  # the head is held here
            self.model.add_adapter(name, saved)
            read = set_peft_model_state_dict(self.model, dict(weights), adapter_name=name)
            missing = [key for key in read.missing_keys if f".{name}." in key]
            if missing or read.unexpected_keys:
                raise ValueError(f"{reward.adapter} does not fit this model: {[*missing, *read.unexpected_keys][:3]}")
        self.layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self.reward_head = head.float().to(model.device)
        self.value_head = torch.nn.Linear(head.shape[1], 1).to(model.device)
        with torch.no_grad():  # the value of a complete answer begins as its normalised reward
            self.value_head.weight.copy_(head.float() / reward.std)
            self.value_head.bias.fill_(-reward.mean / reward.std)
        for module in model.modules():  # dropout would make old and new log-probabilities differ
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        self.tokenizer, self.pad, self.reread = tokenizer, tokenizer.pad_token_id, reward.reread
        self.temperature, self.device = temperature, model.device
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
        """sha256 over the bytes of everything that must never change: base, reward adapter, reward head."""
        digest = hashlib.sha256(self.reward_head.cpu().numpy().tobytes())
        for name, tensor in self.model.state_dict().items():
            if ".policy." not in name and ".value." not in name:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A pass without gradients, in evaluation mode; ends with the policy on and every flag as it was."""
        training = self.model.training
        with models.evaluating(self.model):
            yield
        self.use("policy")
        as_before = all(parameter.requires_grad == trained for parameter, trained in self.flags)
        require(as_before and self.model.training == training, "a scoring pass changed requires_grad or the mode")

    def pack(self, rows: Sequence[Rollout]) -> _Packed:
        """Lay rollouts out for a forward pass: neighbours with one prompt share a line, and so its encoding.

        A line is padded on the left. Its mask lets a completion see the prompt and itself, and positions go on from the
        prompt in each of them, so that no completion notices the others.
        """
        lines = [list(line) for _, line in itertools.groupby(rows, key=lambda row: row.prompt)]
        width = max(len(line[0].prompt) + sum(len(row.ids) for row in line) for line in lines)
        ids, positions = torch.full((len(lines), width), self.pad), torch.zeros((len(lines), width), dtype=torch.long)
        part = torch.full((len(lines), width), -1)  # -1 padding, 0 prompt, 1, 2, … the completions
        shape = (len(rows), max(len(row.ids) for row in rows))
        actions, before, mask = torch.zeros((2, *shape), dtype=torch.long).unbind() + (torch.zeros(shape),)
        last, index = torch.zeros(len(rows), dtype=torch.long), 0
        for number, line in enumerate(lines):
            prompt = line[0].prompt
            at = width - len(prompt) - sum(len(row.ids) for row in line)
            end = number * width + at + len(prompt) - 1
            for place, tokens in enumerate([prompt, *(row.ids for row in line)]):
                here, n = slice(at, at + len(tokens)), len(tokens)
                ids[number, here], part[number, here] = torch.tensor(tokens), place
                positions[number, here] = torch.arange(n) + (len(prompt) if place else 0)
                if place:
                    actions[index, :n], mask[index, :n] = ids[number, here], 1
                    before[index, :n] = torch.tensor([end, *range(number * width + at, number * width + at + n - 1)])
                    last[index], index = number * width + at + n - 1, index + 1
                at += n
        seen = torch.ones(width, width).tril().bool() & (part[:, None] >= 0)
        seen &= (part[:, None] == 0) | (part[:, None] == part[:, :, None])
        dtype = self.model.dtype
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
        inputs = {"input_ids": ids, "attention_mask": bias, "position_ids": positions}
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return _Packed(inputs, *(x.to(self.device) for x in (actions, mask, before, last)))

    def _states(self, packed: _Packed) -> torch.Tensor:
        """Last hidden states of the backbone, flattened (B L, H)."""
        backbone = self.model.get_base_model().base_model
        return backbone(**packed.inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def logprobs(self, rows: Sequence[Rollout], *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (N, T) of each completion token under softmax(logits / temperature), and entropy if asked."""
        packed = self.pack(rows)
        real = packed.mask.bool()
        logits = self.model.get_base_model().get_output_embeddings()(self._states(packed)[packed.before[real]])
        spread = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        chosen = spread.gather(1, packed.actions[real][:, None]).squeeze(1)
        zeros = torch.zeros_like(packed.mask)
        found = zeros.masked_scatter(real, chosen)
        return found, zeros.masked_scatter(real, -(spread.exp() * spread).sum(dim=-1)) if entropy else zeros

    def values(self, rows: Sequence[Rollout]) -> torch.Tensor:
        """Value of the state before each completion token (N, T)."""
        packed = self.pack(rows)
        return self.value_head(self._states(packed)[packed.before].float()).squeeze(2) * packed.mask

    def rewards(self, rows: Sequence[Rollout]) -> torch.Tensor:
        """Raw score of each completion (N,), read at its last real token or after the prompt's second reading."""
        if self.reread:
            rows = [row._replace(ids=(*row.ids, *models.again(self.tokenizer, row.prompt))) for row in rows]
        packed = self.pack(rows)
        return (self._states(packed)[packed.last].float() @ self.reward_head.T).squeeze(1)


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
    rows = [Rollout(tuple(ids[:-2]), tuple(ids[-2:]), "", True)] * 2
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
