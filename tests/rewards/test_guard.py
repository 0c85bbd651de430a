"""The reward guard: honest improvement passes, exploited and broken rewards do not, and nothing alarms by chance."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from erlib.rewards.guard import Guard, compare, diagnose, stability_index

SIZE = 64  # rewards a step


def reference(seed=0, n=320):
    return np.random.default_rng([seed, 1]).normal(size=n)


def watch(rewards, *, steps=50, seed=0, window=5, held_out=None):
    """Feed `rewards(rng, progress 0 to 1)` step by step; the step and the alarm, or (None, None)."""
    guard = Guard(reference(seed) if held_out is None else held_out, window=window)
    rng = np.random.default_rng([seed, 2])
    for step in range(steps):
        if alarm := guard.update(rewards(rng, step / (steps - 1))):
            return step, alarm
    return None, None


# -- figures ------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_a_shifted_normal_distribution():
    grid = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    found = compare(grid, grid + 1)
    assert found.mean == pytest.approx(1, abs=1e-6)
    assert found.shift == pytest.approx(1, abs=1e-3)
    assert found.spread == pytest.approx(1, abs=1e-6)
    assert found.wasserstein == pytest.approx(1, abs=1e-3)
    assert found.shape == pytest.approx(0, abs=1e-6)
    assert found.ks == pytest.approx(2 * norm.cdf(0.5) - 1, abs=1e-3)
    assert found.above == pytest.approx(norm.sf(norm.ppf(0.99) - 1), abs=1e-3)
    assert found.below == pytest.approx(norm.cdf(norm.ppf(0.01) - 1), abs=1e-3)
    assert found.far == 0


def test_the_stability_index_is_that_of_the_textbook():
    before, after = np.repeat([0.0, 1.0], [50, 50]), np.repeat([0.0, 1.0], [20, 80])
    p, q = np.array([50.5, 50.5]) / 101, np.array([20.5, 80.5]) / 101
    expected = float(((q - p) * np.log(q / p)).sum())
    assert stability_index(before, after, bins=2) == pytest.approx(expected)


@given(st.floats(0.1, 50), st.floats(-100, 100), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_scale_and_the_origin_of_a_reward_model_do_not_matter(scale, origin, seed):
    rng = np.random.default_rng(seed)
    held_out, seen = rng.normal(size=100), rng.normal(0.5, 1.2, size=80)
    plain, moved = compare(held_out, seen), compare(held_out * scale + origin, seen * scale + origin)
    assert np.allclose(plain[1:], moved[1:], atol=1e-6)


@pytest.mark.parametrize("bad", [np.ones(50), np.arange(5.0), np.append(np.arange(50.0), np.nan)])
def test_a_reference_that_says_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="a reference needs 20 finite rewards that differ"):
        Guard(bad)


# -- what passes and what does not ----------------------------------------------------------------------------------


def test_rewards_that_do_not_change_raise_no_alarm_in_4000_steps():
    kinds = {
        "normal": lambda rng, n: rng.normal(size=n),
        "skewed to a ceiling": lambda rng, n: -rng.gamma(2.0, size=n),
        "four of each prompt": lambda rng, n: 0.8 * np.repeat(rng.normal(size=n // 4), 4) + 0.6 * rng.normal(size=n),
        "two heaps": lambda rng, n: rng.normal(size=n) * 0.3 + rng.integers(0, 2, size=n) * 3,
    }
    alarms = {name: 0 for name in kinds}
    for name, draw in kinds.items():
        for seed in range(20):
            held_out = draw(np.random.default_rng([seed, 3]), 320)
            _, alarm = watch(lambda rng, _, draw=draw: draw(rng, SIZE), seed=seed, held_out=held_out)
            alarms[name] += alarm is not None
    assert alarms == {name: 0 for name in kinds}


@pytest.mark.parametrize("seed", range(10))
def test_an_honest_improvement_of_one_deviation_in_50_steps_raises_no_alarm(seed):
    def rising(rng, progress):
        return rng.normal(progress, 1, size=SIZE)

    def rising_and_narrowing(rng, progress):
        return rng.normal(progress, 1 - 0.4 * progress, size=SIZE)

    assert watch(rising, seed=seed) == watch(rising_and_narrowing, seed=seed) == (None, None)


def exploited(rng, progress):
    """A growing share of the policy's answers finds a weakness of the reward model."""
    rewards = rng.normal(size=SIZE)
    found = rng.random(SIZE) < 0.4 * progress
    return np.where(found, rng.normal(7, 1, size=SIZE), rewards)


@pytest.mark.parametrize(
    ("rewards", "reason", "latest"),
    [
        (exploited, "outliers", 15),
        (lambda rng, progress: rng.normal(5 * progress, 1, size=SIZE), "outliers", 30),
        (lambda rng, progress: rng.normal(-3 * progress, 1, size=SIZE), "broken", 30),
        (lambda rng, progress: rng.normal(progress, 1.01 - progress, size=SIZE), "collapse", 48),
        (lambda rng, progress: rng.normal(0, 1 + 5 * progress, size=SIZE), "explosion|outliers|broken|other shape", 30),
        (lambda rng, progress: 2.0 * rng.choice([-1.0, 1.0], size=SIZE), "other shape", 5),
    ],
    ids=["exploited", "drift", "fall", "collapse", "explosion", "two points"],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_broken_reward_is_caught(rewards, reason, latest, seed):
    step, alarm = watch(rewards, seed=seed)
    assert step is not None
    assert step <= latest
    assert any(alarm.reason.startswith(word) or f"; {word}" in alarm.reason for word in reason.split("|")), alarm.reason


def test_a_reward_that_is_not_finite_is_an_alarm_at_once():
    guard = Guard(reference())
    alarm = guard.update(np.array([0.0, np.nan, np.inf]))
    assert alarm.reason == "2 rewards are not finite"
    json.dumps(alarm._asdict(), allow_nan=False)


def test_a_single_odd_step_is_not_judged_before_the_window_is_full():
    guard = Guard(reference(), window=3)
    odd = np.full(SIZE, 9.0)
    assert guard.update(odd) is None
    assert guard.update(odd) is None
    assert guard.update(odd).far == 1.0


def test_a_guard_goes_on_from_its_state_as_if_nothing_had_happened():
    rng = np.random.default_rng(5)
    steps = [exploited(rng, progress) for progress in np.linspace(0, 1, 20)]
    whole, stopped = Guard(reference(), window=3), Guard(reference(), window=3)
    expected = [whole.update(step) for step in steps]
    found = [stopped.update(step) for step in steps[:7]]
    resumed = Guard(reference(), window=3)
    resumed.load(json.loads(json.dumps(stopped.state_dict())))
    assert found + [resumed.update(step) for step in steps[7:]] == expected
    assert any(expected)


# -- diagnosis ----------------------------------------------------------------------------------------------------


def log(**changed):
    """A healthy training of 20 steps; each change is the last value of a column that starts as it is here."""
    healthy = {
        "reward_normalised": (0, 1), "gold_entity_f1": (0.7, 0.8), "kl": (0, 5), "entropy": (1.0, 0.8),
        "explained_variance": (0, 0.5), "clip_fraction": (0.1, 0.1), "parse_rate": (0.98, 0.99), "eos_rate": (1, 1),
    }  # fmt: skip
    ends = {name: (first, changed.get(name, last)) for name, (first, last) in healthy.items()}
    return pd.DataFrame({name: np.linspace(*both, 20) for name, both in ends.items()})


def seen(frame):
    table = diagnose(frame, gold="gold_entity_f1", kl_target=6)
    return set(table.index[table["seen"] == "YES"])


def test_each_sign_is_read_off_its_own_figure():
    assert seen(log()) == set()
    assert seen(log(gold_entity_f1=0.6)) == {"reward rises, gold falls"}
    assert seen(log(reward_normalised=0)) == {"reward does not rise"}
    assert seen(log(kl=20)) == {"KL above its target"}
    assert seen(log(kl=0.1)) == {"KL hardly moved"}
    assert seen(log(explained_variance=-1)) == {"value model explains nothing"}
    assert seen(log(clip_fraction=0.6)) == {"updates clipped"}
    assert seen(log(entropy=0.1)) == {"entropy collapsed"}
    assert seen(log(parse_rate=0.8)) == {"reports stop parsing"}
    assert seen(log(eos_rate=0.8)) == {"reports do not end"}


def test_what_was_never_measured_is_unknown():
    table = diagnose(log().drop(columns="clip_fraction"), gold="gold_entity_f1", kl_target=6)
    assert table.loc["updates clipped", "seen"] == "unknown"
