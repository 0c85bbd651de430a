"""Rollouts: completions of the policy, read by policy, reference, reward and value model, and turned into advantages.

Every process knows all rollouts of a step and does its share of the work on them. The `samples` completions of one
prompt are neighbours, a *group*, and stay together: they share the encoding of the prompt (`models.generate`,
`MultiAdapter.pack`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from erlib.lm import models
from erlib.lm.packing import Rollout
from erlib.policy import losses
from erlib.policy.multiadapter import MultiAdapter, RewardModel
from erlib.task.forms import parse_compact

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """What a step samples."""

    prompts_per_step: int = 16  # prompts of a step, each with all its samples
    samples: int = 4  # completions of each prompt; they share its encoding
    max_new_tokens: int = 192  # longest completion
    generation_batch_size: int = 64  # completions at once: memory against speed


@dataclass(frozen=True)
class Shaping:
    """How scores become rewards, and rewards advantages."""

    kl_coef: float = 0.15  # price of a nat of distance from the start, in deviations of the reward; where it begins
    kl_target: float | None = 6.0  # nats per completion that is steered to (1909.08593); None: `kl_coef` stays
    kl_horizon: int = 10_000  # completions in which the controller may change the coefficient by a fifth
    reward_clip: float = 5.0  # deviations beyond which a score counts no further: one outlier must not rule a step
    missing_end_penalty: float = 1.0  # deviations that a completion without its end token loses
    dense_reward: bool = True  # each token gets what it adds to the score: credit falls nearer to what earned it
    whiten_rewards: bool = False  # advantages are whitened anyway
    gamma: float = 1.0  # a report is short: its last token counts as much as its first
    lam: float = 0.95  # of GAE (1506.02438)


class Batch(NamedTuple):
    """The rollouts of a step and all that was measured on them: (N, T) tensors on the CPU."""

    rows: list[Rollout]
    mask: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    token_scores: torch.Tensor
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @property
    def scores(self) -> torch.Tensor:
        """Raw score (N,) of each completion."""
        return self.token_scores.sum(dim=1)


def collect(
    core: MultiAdapter,
    tokenizer: "PreTrainedTokenizerBase",
    accelerator: "Accelerator",
    prompts: Sequence[list[int]],
    *,
    sampling: Sampling,
    rng: np.random.Generator,
) -> list[Rollout]:
    """Sample one completion of each prompt; its draws are its own, whichever process takes it with whichever others."""
    from accelerate.utils import gather_object

    ordered = sorted(prompts, key=len)  # stable: the samples of one prompt stay together and share its encoding
    seed = int(rng.integers(2**31))
    size = min(sampling.generation_batch_size, math.ceil(len(ordered) / accelerator.num_processes))
    size = math.ceil(size / sampling.samples) * sampling.samples
    found = []
    with core.scoring(), models.folded(core.model):
        for start in range(accelerator.process_index * size, len(ordered), accelerator.num_processes * size):
            shard = ordered[start : start + size]
            written = models.generate(
                core.model, tokenizer, shard, max_new_tokens=sampling.max_new_tokens, batch_size=size,
                temperature=core.temperature, seed=[(seed, start + place) for place in range(len(shard))],
            )  # fmt: skip
            rows = [Rollout(tuple(p), c.ids, c.text, c.finished) for p, c in zip(shard, written, strict=True)]
            found.append((start, rows))
    return [row for _, rows in sorted(gather_object(found)) for row in rows]


def blocks(
    rows: list[Rollout], groups: Iterable[int], samples: int, accelerator: "Accelerator", batch_size: int
) -> list[list[int]]:
    """This process's share of the groups as row numbers, `batch_size` groups of similar length together."""

    def rows_of(group: int) -> range:
        return range(group * samples, (group + 1) * samples)

    def width(group: int) -> int:
        return len(rows[group * samples].prompt) + sum(len(rows[index].ids) for index in rows_of(group))

    own = sorted(groups, key=width)[accelerator.process_index :: accelerator.num_processes]
    parts = [own[at : at + batch_size] for at in range(0, len(own), batch_size)]
    return [[index for group in part for index in rows_of(group)] for part in parts]


def score(
    core: MultiAdapter, accelerator: "Accelerator", rows: list[Rollout], *, samples: int, batch_size: int
) -> Batch:
    """Score rollouts with policy, reference, reward and value model, in this order, before anything is trained."""
    from accelerate.utils import gather_object
    from torch.nn.utils.rnn import pad_sequence

    own = blocks(rows, range(len(rows) // samples), samples, accelerator, batch_size)
    exact = core.model.dtype == torch.float32  # else a folded weight is another weight

    def each(name: str | None, measure: Callable[[list[Rollout]], torch.Tensor]) -> list[torch.Tensor]:
        core.use(name)
        found = []
        with models.folded(core.model) if exact else nullcontext():
            for part in own:
                found += zip(part, measure([rows[index] for index in part]).cpu(), strict=True)
        return [value for _, value in sorted(gather_object(found), key=lambda item: item[0])]

    def padded(found: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence([x[: len(row.ids)] for x, row in zip(found, rows, strict=True)], batch_first=True)

    with core.scoring():
        policy = padded(each("policy", lambda part: torch.stack(core.logprobs(part, entropy=True), dim=-1)))
        reference = padded(each(None, lambda part: core.logprobs(part)[0]))
        scores = padded(each("reward", core.rewards))
        values = padded(each("value", core.values))
    mask = padded([torch.ones(len(row.ids)) for row in rows])
    return Batch(rows, mask, policy[..., 0], policy[..., 1], reference, values, scores)


def with_advantages(batch: Batch, reward: RewardModel, *, kl_coef: float, shaping: Shaping) -> Batch:
    """Reward of each token: minus its KL to the reference, and on the last one the score, normalised and clipped.

    `kl_coef` is the controller's present one. With `dense_reward` each token gets what it adds to the score, and the
    last one the rest: the sum is the same.
    """
    clip = shaping.reward_clip
    scores = ((batch.scores - reward.mean) / reward.std).clamp(-clip, clip)
    scores = scores - shaping.missing_end_penalty * torch.tensor([not row.finished for row in batch.rows])
    rewards = -kl_coef * losses.kl_estimates(batch.logprobs, batch.reference)[0] * batch.mask
    if shaping.dense_reward:
        rewards += batch.token_scores / reward.std
        scores = scores - batch.scores / reward.std
    rewards[torch.arange(len(rewards)), batch.mask.sum(dim=1).long() - 1] += scores
    rewards = losses.whiten(rewards, batch.mask, shift_mean=False) if shaping.whiten_rewards else rewards
    advantages, returns = losses.gae(rewards, batch.values, batch.mask, gamma=shaping.gamma, lam=shaping.lam)
    return batch._replace(advantages=losses.whiten(advantages, batch.mask), returns=returns)


def measures(batch: Batch, reward: RewardModel) -> dict[str, float]:
    """What the rollouts of a policy say of it: KL per completion, rewards against the reference, form and length."""
    k1, k3 = losses.kl_estimates(batch.logprobs, batch.reference)
    low, high = np.quantile(reward.evaluation, [0.01, 0.99])
    scores = batch.scores.double().numpy()
    return {
        "kl": float((k1 * batch.mask).sum(dim=1).mean()),
        "kl_k3": float((k3 * batch.mask).sum(dim=1).mean()),
        "entropy": float((batch.entropy * batch.mask).sum() / batch.mask.sum()),
        "reward_mean": float(scores.mean()),
        "reward_std": float(scores.std()),
        **{f"reward_q{q:02d}": float(np.quantile(scores, q / 100)) for q in (5, 25, 50, 75, 95)},
        "reward_normalised": float((scores.mean() - reward.mean) / reward.std),
        "reward_outside": float(((scores < low) | (scores > high)).mean()),
        "eos_rate": float(np.mean([row.finished for row in batch.rows])),
        "length": float(batch.mask.sum(dim=1).mean()),
        "parse_rate": float(np.mean([parse_compact(row.text).valid for row in batch.rows])),
    }
