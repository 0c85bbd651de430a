"""The closed forms of PPO: KL estimators and controller, advantages, whitening, the clipped losses.

Tensors are (B, T), one row per completion; `mask` is 1 on its tokens and 0 on the padding to the right of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

LOG_RATIO_LIMIT = 20.0  # exp(20) is still a float; a log-ratio beyond it is a broken one


def kl_estimates(logprobs: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Schulman's estimators of KL(policy, reference) per token in nats: k1, unbiased, and k3, never negative."""
    k1 = logprobs - reference
    return k1, torch.expm1(-k1) + k1


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates (1506.02438) and returns (advantage + value); nothing follows the last token."""
    values, rewards = values * mask, rewards * mask
    advantages, following, carried = torch.zeros_like(values), torch.zeros_like(values[:, 0]), 0.0
    for t in reversed(range(values.shape[1])):
        carried = (rewards[:, t] + gamma * following - values[:, t] + gamma * lam * carried) * mask[:, t]
        advantages[:, t], following = carried, values[:, t]
    return advantages, advantages + values


def whiten(x: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Scale the masked entries to variance 1, and to mean 0 or, unless `shift_mean`, to the mean that they had."""
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean).square() * mask).sum() / mask.sum()
    scaled = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (scaled if shift_mean else scaled + mean) * mask


class PolicyLoss(NamedTuple):
    """Sums over the masked tokens, so that parts of a batch add up; `max_ratio` is their largest ratio."""

    loss: torch.Tensor
    clipped: torch.Tensor
    ratio: torch.Tensor
    approx_kl: torch.Tensor
    max_ratio: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    dual_clip: float,
) -> PolicyLoss:
    """PPO's clipped loss; where the advantage is negative it is at most `dual_clip` times its size (1912.09729)."""
    log_ratio = ((logprobs - old) * mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(free, clipped)
    losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    with torch.no_grad():
        approx_kl = torch.expm1(log_ratio) - log_ratio  # k3 of old against new
        figures = [(x * mask).sum() for x in ((clipped > free).float(), ratio, approx_kl)]
    return PolicyLoss((losses * mask).sum(), *figures, (ratio.detach() * mask).max())


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, *, clip: float
) -> torch.Tensor:
    """Half the squared error summed over the masked tokens, the worse of the value and its clipped move from `old`."""
    moved = old + (values - old).clamp(-clip, clip)
    return 0.5 * (torch.maximum((values - returns).square(), (moved - returns).square()) * mask).sum()


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - var(returns - values) / var(returns) over the masked tokens; nan where all returns are equal."""
    known = mask.bool()
    variance = returns[known].var(correction=0)
    return float(1 - (returns - values)[known].var(correction=0) / variance) if variance > 0 else float("nan")


@dataclass
class AdaptiveKL:
    """KL coefficient of a proportional controller (1909.08593) that aims at `target` nats; fixed without a target."""

    coef: float
    target: float | None
    horizon: int

    def update(self, kl: float, n: int) -> None:
        """Move the coefficient after `n` completions with a mean KL of `kl` nats each."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * n / self.horizon
