"""PPO's closed forms against plain loops and cases worked by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib.policy import losses


def batch(seed: int, rows: int = 4, width: int = 6) -> tuple[torch.Tensor, ...]:
    """Four random (rows, width) tensors and a mask of rows of different length, none of them empty."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return *tensors, (torch.arange(width)[None] < lengths).double()


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Advantage of each step as the sum over the rest of the row of (gamma lam)^l times its TD error."""
    errors = []
    for t, reward in enumerate(rewards):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        errors.append(reward + gamma * following - values[t])
    return [sum((gamma * lam) ** (u - t) * errors[u] for u in range(t, len(errors))) for t in range(len(errors))]


def naive_policy(new: float, old: float, advantage: float, clip: float, dual: float) -> float:
    ratio = math.exp(max(-20.0, min(20.0, new - old)))
    loss = max(-advantage * ratio, -advantage * max(1 - clip, min(1 + clip, ratio)))
    return min(loss, -advantage * dual) if advantage < 0 else loss


@given(st.integers(0, 10_000), st.floats(0.5, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_gae_is_the_discounted_sum_of_td_errors(seed: int, gamma: float, lam: float) -> None:
    rewards, values, _, _, mask = batch(seed)
    advantages, returns = losses.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(len(mask)):
        n = int(mask[row].sum())
        wanted = naive_gae(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        assert advantages[row, :n].tolist() == pytest.approx(wanted, abs=1e-9)
        assert not advantages[row, n:].any()
        assert returns[row, :n].tolist() == pytest.approx((torch.tensor(wanted) + values[row, :n]).tolist(), abs=1e-5)


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.5]])
    advantages, returns = losses.gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[0.5, 0.75, 0.5]]  # return 1 at every token, less its value
    assert returns.tolist() == [[1.0, 1.0, 1.0]]
    advantages, _ = losses.gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.0)
    assert advantages.tolist() == [[-0.25, 0.25, 0.5]]  # one-step errors


def test_what_lies_on_the_padding_changes_nothing() -> None:
    rewards, values, _, _, mask = batch(3)
    noisy = [x + 100 * (1 - mask) for x in (rewards, values)]
    for a, b in zip(
        losses.gae(rewards, values, mask, gamma=1.0, lam=0.95),
        losses.gae(*noisy, mask, gamma=1.0, lam=0.95),
        strict=True,
    ):
        assert torch.equal(a, b)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=20, deadline=None)
def test_whitening_scales_the_masked_entries(seed: int, shift: bool) -> None:
    x, _, _, _, mask = batch(seed, rows=6)
    x = 3 * x + 2
    white = losses.whiten(x, mask, shift_mean=shift)
    known, before = white[mask.bool()], x[mask.bool()]
    assert float(known.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert float(known.mean()) == pytest.approx(0 if shift else float(before.mean()), abs=1e-6)
    assert not white[~mask.bool()].any()


def test_equal_entries_whiten_to_nothing() -> None:
    assert losses.whiten(torch.full((2, 2), 0.7), torch.ones(2, 2)).abs().max() < 1e-3


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_the_policy_loss_token_by_token(seed: int) -> None:
    new, old, advantages, _, mask = batch(seed)
    found = losses.policy_loss(new, old, advantages, mask, clip_range=0.2, dual_clip=3.0)
    tokens = [(r, t) for r in range(4) for t in range(6) if mask[r, t]]
    each = [naive_policy(float(new[i]), float(old[i]), float(advantages[i]), 0.2, 3.0) for i in tokens]
    assert float(found.loss) == pytest.approx(sum(each))
    ratios = [math.exp(float(new[i] - old[i])) for i in tokens]
    assert float(found.ratio) == pytest.approx(sum(ratios))
    assert float(found.max_ratio) == pytest.approx(max(ratios))
    assert float(found.approx_kl) == pytest.approx(sum(r - 1 - math.log(r) for r in ratios))
    moved = [
        (r > 1.2 and advantages[i] > 0) or (r < 0.8 and advantages[i] < 0) for r, i in zip(ratios, tokens, strict=True)
    ]
    assert float(found.clipped) == sum(map(bool, moved))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, True),
        (1.5, 2.0, -2.4, False),  # good enough: held at 1.2
        (0.5, 2.0, -1.0, True),  # a good token that became rare is drawn back
        (1.5, -2.0, 3.0, True),
        (0.5, -2.0, 1.6, False),
        (5.0, -2.0, 6.0, False),  # dual clip: 3 times the advantage, not 5
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: bool) -> None:
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    found = losses.policy_loss(new, 0 * one, advantage * one, one, clip_range=0.2, dual_clip=3.0)
    found.loss.backward()
    assert float(found.loss) == pytest.approx(loss)
    assert bool(new.grad.any()) is gradient


def test_a_broken_log_ratio_stays_finite() -> None:
    one = torch.ones(1, 1)
    found = losses.policy_loss(500 * one, -500 * one, -one, one, clip_range=0.2, dual_clip=3.0)
    assert float(found.ratio) == pytest.approx(math.exp(20), rel=1e-5)
    assert float(found.loss) == 3.0


def test_the_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0]]), torch.tensor([[1.0, 9.0]])
    mask = torch.tensor([[1.0, 0.0]])
    # The value is right, but it moved by 1 where .2 are allowed: half of (0.2 - 1)² counts; the second is padding.
    assert float(losses.value_loss(values, old, returns, mask, clip=0.2)) == pytest.approx(0.32)
    assert float(losses.value_loss(values, old, returns, mask, clip=2.0)) == 0.0


def test_kl_estimators_agree_with_the_exact_kl_in_the_mean() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    exact = float((policy * (policy / reference).log()).sum())
    k1, k3 = losses.kl_estimates(policy.log(), reference.log())
    assert float((policy * k1).sum()) == pytest.approx(exact)
    assert float((policy * k3).sum()) == pytest.approx(exact, abs=1e-6)
    assert (k3 >= 0).all()
    assert (k1 < 0).any()


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 50.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert losses.explained_variance(returns + 5, returns, mask) == pytest.approx(1)
    assert losses.explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0)
    assert losses.explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert np.isnan(losses.explained_variance(returns, torch.ones(1, 4), mask))


def test_the_kl_controller_is_proportional_and_clipped() -> None:
    controller = losses.AdaptiveKL(0.2, 6.0, 10_000)
    controller.update(6.6, 1000)  # a tenth too much
    assert controller.coef == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    controller = losses.AdaptiveKL(0.2, 6.0, 10_000)
    controller.update(600.0, 1000)
    assert controller.coef == pytest.approx(0.2 * 1.02)  # error clipped at .2
    controller.update(0.0, 1000)
    assert controller.coef == pytest.approx(0.2 * 1.02 * 0.98)
    fixed = losses.AdaptiveKL(0.2, None, 10_000)
    fixed.update(600.0, 1000)
    assert fixed.coef == 0.2
