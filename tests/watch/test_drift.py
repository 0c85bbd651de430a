"""Detectors on samples and streams with and without a change; naive versions and scipy are the oracles."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from erlib.task.forms import parse_compact
from erlib.task.schema import Brief, Document, Entity, Kind, Parsed, Relationship, Report
from erlib.watch import drift


def bursts(n, seed, *, size=10, d=4, shift=0.0):
    """A stream (n, d) in which `size` consecutive rows share a story: variance 1 between stories, 1 within."""
    rng = np.random.default_rng(seed)
    stories = np.repeat(rng.normal(size=(-(-n // size), d)), size, axis=0)[:n]
    return stories + rng.normal(size=(n, d)) + shift


def features(n, seed, *, shift=0.0):
    """Features of a stream of bursts: words, and a length that moves with them."""
    rows = bursts(n, seed, shift=shift)
    return {"words": rows, "characters": rows.sum(axis=1)}


# -- features -----------------------------------------------------------------------------------------------------


def test_layout_says_nothing_of_length():
    post = "Korvex buys Tamulia for $5m! #deals https://t.example/1\nWhat next?"
    once, thrice = drift.layout([post, "\n".join([post] * 3)])
    assert once.shape == (8,)
    assert np.delete(thrice, 1) == pytest.approx(np.delete(once, 1), abs=0.02)
    assert thrice[1] == pytest.approx(once[1] - np.log(3), abs=0.05)  # the longest line is a smaller part of more lines
    marked = dict(zip(drift._MARKS, once[2:], strict=True))
    assert marked["links"] * len(post) == pytest.approx(1)
    assert marked["full stops"] * len(post) == pytest.approx(2)


def test_features_of_reports_count_types_and_keep_the_unknown_apart():
    wanted = {"description": "x", "example": "x"}
    brief = Brief(
        client="c", purpose="p", summaries="s",
        entities=[Kind(type="organisation", **wanted), Kind(type="person", **wanted)],
        relationships=[Kind(type="leads", **wanted)],
    )  # fmt: skip
    report = Report(
        entities=[Entity(name="A", type="person"), Entity(name="B", type="planet")],
        relationships=[Relationship(source="A", target="B", type="leads")],
    )
    found = drift.outputs([Parsed(report, ()), parse_compact("a|b|c|d|e")], [0.5, -1.0], brief)
    assert found["entity_types"].tolist() == [[0, 1, 1], [0, 0, 0]]  # organisation, person, others
    assert found["relationship_types"].tolist() == [[1, 0], [0, 0]]
    assert found["relationships"].tolist() == [1, 0]
    assert found["unparsable"].tolist() == [0, 1]
    assert found["reward"].tolist() == [0.5, -1.0]


def test_burst_weights_give_stories_unit_covariance():
    scales = np.array([2.0, 1.0, 1.0, 0.5])
    rows = bursts(8000, 0) * scales
    weighted = rows @ drift.burst_weights(rows, block=10)
    means = weighted.reshape(-1, 10, 4).mean(axis=1)
    assert np.cov(means.T) == pytest.approx(np.eye(4), abs=0.15)
    with pytest.raises(ValueError, match="90 documents hold 9 blocks of 10, too few"):
        drift.burst_weights(rows[:90], block=10)


# -- statistics ---------------------------------------------------------------------------------------------------


def naive_mmd(x, y, width):
    """Gretton et al. (2012), equation 3, term by term."""

    def k(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * width**2))

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_mmd_is_the_double_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(13, 3)), rng.normal(size=(7, 3)) + 0.5
    assert drift.mmd(x, y, width=1.3) == pytest.approx(naive_mmd(x, y, 1.3))
    assert drift.mmd(x, y) == pytest.approx(naive_mmd(x, y, np.median(stats_distances(x))))
    x *= 2  # in place: what was kept of the reference is of its values, not of the array
    assert drift.mmd(x, y) == pytest.approx(naive_mmd(x, y, np.median(stats_distances(x))))
    pooled = np.concatenate([x, y])
    tested = drift.mmd_test(x, y, permutations=3, seed=0)
    assert tested.statistic == pytest.approx(naive_mmd(x, y, np.median(stats_distances(pooled))))


def stats_distances(x):
    return [np.linalg.norm(x[i] - x[j]) for i in range(len(x)) for j in range(i)]


def test_mmd_is_unbiased_and_equal_rows_are_refused():
    rng = np.random.default_rng(1)
    found = [drift.mmd(*rng.normal(size=(2, 20, 2)), width=1.0) for _ in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    with pytest.raises(ValueError, match="more than half of the rows are equal"):
        drift.mmd(np.ones((9, 2)), np.zeros((9, 2)))


def test_p_values_of_independent_rows_are_uniform_and_small_after_a_shift():
    rng = np.random.default_rng(2)
    null = [drift.mmd_test(*rng.normal(size=(2, 20, 3)), permutations=99, seed=n).p for n in range(300)]
    assert stats.kstest(null, "uniform").pvalue > 0.01
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) + 1
    assert drift.mmd_test(x, y, permutations=199, seed=0).p == pytest.approx(1 / 200)


def test_bursts_break_the_test_of_single_rows_and_not_that_of_blocks():
    streams = [bursts(120, seed) for seed in range(120)]
    rejected = {
        block: np.mean(
            [drift.mmd_test(s[:80], s[80:], permutations=99, block=block, seed=0).p <= 0.05 for s in streams]
        )
        for block in (1, 10)
    }
    assert rejected[1] > 0.3
    assert rejected[10] < 0.12
    with pytest.raises(ValueError, match="blocks of 7 rows do not divide"):
        drift.mmd_test(streams[0][:80], streams[0][80:], block=7, seed=0)


def test_textbook_alarms_are_the_share_of_windows_whose_p_is_small():
    rng = np.random.default_rng(7)
    reference, stream = rng.normal(size=(60, 3)), rng.normal(size=(70, 3))
    stream[20:40] += 2  # the second of three full windows; ten documents are left over
    found = drift.textbook_alarms(reference, stream, window=20, rate=0.05, permutations=99, seed=0)
    p = [drift.mmd_test(reference, stream[n : n + 20], permutations=99, seed=0).p for n in (0, 20, 40)]
    assert found.value == pytest.approx(sum(each <= 0.05 for each in p) / 3)
    assert p[1] == pytest.approx(0.01)
    assert found.low < found.value < found.high


def test_the_classifier_is_at_chance_without_a_change_and_near_one_after_a_large_one():
    rng = np.random.default_rng(3)
    null = [drift.classifier(rng.normal(size=(100, 5)), rng.normal(size=(40, 5))) for _ in range(100)]
    assert abs(np.mean(null) - 0.5) < 0.02
    x, y = rng.normal(size=(100, 5)), rng.normal(size=(40, 5)) + [2, 0, 0, 0, 0]
    assert drift.classifier(x, y) == pytest.approx(stats.norm.cdf(2 / np.sqrt(2)), abs=0.06)  # of the best direction


def test_numbers_and_counts_are_compared_as_scipy_does():
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 6, 50).astype(float), rng.integers(1, 9, 30).astype(float)
    assert drift.ks(x, y) == pytest.approx(stats.ks_2samp(x, y).statistic)
    a, b = rng.poisson(1.0, (50, 3)).astype(float), rng.poisson(0.5, (30, 3)).astype(float)
    table = np.array([a.sum(axis=0), b.sum(axis=0)]) + 0.5
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    assert drift.g_statistic(a, b) == pytest.approx(2 * (table * np.log(table / expected)).sum())
    assert drift.g_statistic(np.zeros((5, 3)), np.zeros((2, 3))) == 0
    bad, good = np.repeat([1.0, 0.0], [6, 24]), np.zeros(200)
    assert drift.excess(good, bad) == pytest.approx(
        -np.log10(stats.fisher_exact([[6, 24], [0, 200]], "greater").pvalue)
    )
    assert drift.excess(bad, good) == pytest.approx(0)


def test_influence_points_at_the_documents_that_differ():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(80, 3)), rng.normal(size=(20, 3))
    y[:5] += 4
    assert set(np.argsort(-drift.witness(x, y))[:5]) == set(range(5))
    assert set(np.argsort(-drift._displaced(x[:, 0], y[:, 0]))[:5]) == set(range(5))
    counts, others = np.tile([1.0, 1.0], (50, 1)), np.tile([1.0, 0.0], (20, 1))
    others[3] = [0, 9]
    assert np.argmax(drift._overdone(counts[:, ::-1] * [1, 0.01], others)) == 3


# -- calibration --------------------------------------------------------------------------------------------------


def test_thresholds_hold_the_rate_over_all_detectors_together():
    normal = np.random.default_rng(6).normal(size=(1000, 5))
    drawn = pd.DataFrame(normal, columns=list("abcde"))
    thresholds = drift.calibrate(drawn, rate=0.05)
    above = (drawn > thresholds).any(axis=1).mean()
    assert 0.04 < above <= 0.05
    assert thresholds.to_numpy() == pytest.approx(stats.norm.ppf(0.99), abs=0.3)  # 0.01 each
    same = drift.calibrate(drawn[["a"] * 1].assign(b=drawn["a"]), rate=0.05)
    assert same["a"] == pytest.approx(np.quantile(drawn["a"], 0.95), abs=0.02)  # two that move together are one
    assert drift.calibrate(pd.DataFrame({"parse rate, Fisher": np.zeros(100)}), rate=0.05).item() == 2.0


def test_too_few_draws_or_documents_are_refused():
    with pytest.raises(ValueError, match="99 draws are too few for a false-alarm rate of 0.05: take 101"):
        drift.calibrate(pd.DataFrame({"a": range(99)}), rate=0.05)
    stretch, sizes = features(100, 0), {"samples": 1, "seed": 0}
    with pytest.raises(
        ValueError, match="a reference of 80 and a window of 40 documents do not fit into a stretch of 100"
    ):
        drift.draws(stretch, reference=80, window=40, block=10, **sizes)
    with pytest.raises(ValueError, match="blocks of 10 documents must divide reference .45. and window .20."):
        drift.draws(stretch, reference=45, window=20, block=10, **sizes)
    with pytest.raises(ValueError, match="a window of 101 documents is larger than the stream of 100"):
        drift.watch(stretch, stretch, pd.Series({"words, MMD": 0.0}), window=101)
    with pytest.raises(ValueError, match="110 documents cannot be taken in blocks of 10 from a stretch of 105"):
        drift.spread(105, 110, block=10)


def test_a_reference_is_spread_over_the_stretch_in_whole_blocks():
    places = drift.spread(104, 30, block=10)
    assert places.reshape(3, 10)[:, 0].tolist() == [0, 40, 90]
    assert (np.diff(places.reshape(3, 10)) == 1).all()


SIZES = {"reference": 120, "window": 20, "block": 20}


@pytest.fixture(scope="module")
def monitors():
    """Reference and thresholds, calibrated at 10 %, of twelve independent stationary streams of bursts."""
    made = []
    for seed in range(12):
        stretch = features(1200, seed)
        drawn = drift.draws(stretch, **SIZES, samples=200, seed=seed)
        reference = drift.rows(stretch, drift.spread(1200, 120, block=20))
        made.append((reference, drift.calibrate(drawn, rate=0.1)))
    return made


def test_the_false_alarm_rate_on_another_stretch_is_what_was_asked_for(monitors):
    rates = []
    for seed, (reference, thresholds) in enumerate(monitors):
        watched = drift.watch(reference, features(1200, 1000 + seed), thresholds, window=20)
        rates.append(drift.false_alarms(watched).loc["any detector", "value"])
    assert 0.04 < np.mean(rates) < 0.18  # 720 windows; 10 % was asked for


def test_a_planted_change_is_found_soon_and_no_change_is_not(monitors):
    for seed, (reference, thresholds) in enumerate(monitors[:3]):
        streams = {"none": features(400, 2000 + seed), "shift": features(400, 3000 + seed, shift=1.5)}
        found = {
            kind: drift.delays(
                reference, features(800, 4000 + seed), drifted, thresholds,
                drift.Planting(window=20, windows=5, share=1.0, repetitions=20, seed=seed),
            ).groupby("repetition")["delay"].min()
            for kind, drifted in streams.items()
        }  # fmt: skip
        assert found["shift"].median() <= 40
        assert np.isinf(found["none"]).mean() > 0.3


def test_watch_takes_full_windows_in_order_and_counts_alarms():
    stream = {"characters": np.repeat([0.0, 9.0, 0.0], [20, 10, 5])}
    watched = drift.watch({"characters": np.arange(-10.0, 10.0)}, stream, pd.Series({"length, KS": 0.8}), window=10)
    assert watched[["first", "end"]].to_numpy().tolist() == [[0, 10], [10, 20], [20, 30]]
    assert watched["statistic"].tolist() == pytest.approx([0.5, 0.5, 0.95])
    assert watched["fired"].tolist() == [False, False, True]
    rates = drift.false_alarms(watched)
    assert rates.index.tolist() == ["any detector", "length, KS"]
    assert rates["value"].tolist() == pytest.approx([1 / 3, 1 / 3])


def test_any_alarm_counts_the_windows_of_all_watches():
    fast = drift.watch({"characters": np.arange(-10.0, 10.0)}, {"characters": np.repeat([0.0, 9.0], [20, 10])},
                       pd.Series({"length, KS": 0.8}), window=10)  # fmt: skip
    slow = fast[fast["window"] < 2]
    assert drift.any_alarm(fast).value == pytest.approx(1 / 3)
    both = drift.any_alarm(fast, slow)
    assert both.value == pytest.approx(1 / 5)
    assert both.low < both.value < both.high


# -- planting -----------------------------------------------------------------------------------------------------


def test_a_change_is_planted_at_its_place_and_share():
    places = drift.plant(50, 30, 8, at=20, share=1.0, seed=0)
    assert (np.diff(places[:20]) % 30 == 1).all() and (places[:20] < 30).all()
    assert sorted(set(places[20:])) == list(range(30, 38))
    half = drift.plant(4000, 30, 8, at=0, share=0.5, seed=0)
    assert np.mean(half >= 30) == pytest.approx(0.5, abs=0.03)
    assert (drift.plant(50, 30, 8, at=20, share=0.0, seed=0) < 30).all()


def test_a_delay_ends_with_the_window_that_fires():
    reference, calm, loud = ({"characters": np.full(40, value) + np.arange(40) / 100} for value in (0.0, 0.0, 9.0))
    found = drift.delays(
        reference, calm, loud, pd.Series({"length, KS": 0.99}),
        drift.Planting(window=10, windows=3, share=1.0, repetitions=200, seed=0),
    )  # fmt: skip
    assert found["delay"].between(10, 20).all()  # the window of the change is never all changed, unless it starts there
    assert found["delay"].nunique() == 10
    missed = drift.delays(
        reference, calm, calm, pd.Series({"length, KS": 1.0}),
        drift.Planting(window=10, windows=3, share=1.0, repetitions=2, seed=0),
    )  # fmt: skip
    assert np.isinf(missed["delay"]).all()


def test_a_planted_stream_holds_the_documents_of_its_order():
    background, drifted = {"characters": np.arange(30.0)}, {"characters": np.arange(100.0, 108.0)}
    found = drift.planted(background, drifted, n=50, at=20, share=1.0, seed=0)
    pool = np.concatenate([background["characters"], drifted["characters"]])
    assert found.features["characters"].tolist() == pool[found.order].tolist()
    assert found.order.tolist() == drift.plant(50, 30, 8, at=20, share=1.0, seed=0).tolist()


def test_delays_of_reports_count_the_documents_that_the_policy_does_not_read():
    values = {"calm": np.arange(40.0) / 100, "loud": 9 + np.arange(40.0) / 100}
    inputs = {"check": {"characters": values["calm"]}, "louder": {"characters": values["loud"]}}
    reports = {"check": {"reward": values["calm"]}, "louder": {"reward": values["loud"]}}
    inputs["same"] = inputs["check"]
    reference = inputs["check"] | reports["check"]
    thresholds = pd.Series({"length, KS": 0.99, "reward, KS": 0.99})
    found = drift.delays_of_changes(
        reference, inputs, reports, thresholds, drift.Planting(window=10, windows=3, repetitions=5),
        changes=("louder", "same"), thin=4,
    )  # fmt: skip
    delay = found[found["drift"] == "louder"].pivot(index="repetition", columns="detector", values="delay")
    assert (delay["reward, KS"] == 4 * delay["length, KS"]).all()
    assert (delay["any detector"] == delay["length, KS"]).all()
    same = found[found["drift"] == "same"]
    assert set(same["detector"]) == {"any detector", "length, KS"}  # nobody has read these
    assert np.isinf(same["delay"]).all()


def test_medians_take_missed_changes_for_infinitely_late():
    rows = [("topic", "a", delay) for delay in (10, 20, 30, np.inf, np.inf)]
    rows += [("topic", "b", delay) for delay in (10, np.inf, np.inf)]
    table = drift.summary(pd.DataFrame(rows, columns=["drift", "detector", "delay"]), seed=0).set_index("detector")
    assert table["median"].tolist() == [30, np.inf]
    assert table["missed"].tolist() == pytest.approx([0.4, 2 / 3])
    assert (table["missed_low"] < table["missed"]).all() and (table["missed"] < table["missed_high"]).all()
    assert (table["low"] <= table["median"]).all()


# -- a stream of one's own ----------------------------------------------------------------------------------------


class Letters:
    """An encoder without a model: how often each of some letters occurs."""

    def encode(self, texts, **settings):
        return np.array([[text.count(letter) for letter in "aeio"] for text in texts], dtype=np.float32)


def posts(n, seed, *, letters="aeio", words=4):
    rng = np.random.default_rng(seed)
    drawn = ["".join(rng.choice(list(letters + "xyz"), size=rng.integers(words, 6 * words))) for _ in range(n)]
    return [Document(id=f"{letters}-{seed}-{place}", text=text) for place, text in enumerate(drawn)]


def test_a_stream_of_its_own_is_calibrated_on_its_quiet_part_and_alarms_where_it_changes():
    watching = drift.Watching(window=20, reference_windows=3, story_block=5, draws=200, rate=0.05, seed=0)
    quiet = {"fit": posts(200, 1), "calibrate": posts(400, 2), "check": posts(400, 3)}
    changed = drift.watch_inputs(quiet | {"watched": posts(200, 4, letters="e")}, Letters(), watching)
    same = drift.watch_inputs(quiet | {"watched": posts(200, 5)}, Letters(), watching)
    assert drift.any_alarm(changed.watched).value == 1.0
    assert drift.any_alarm(changed.checked).low <= 0.05
    assert drift.any_alarm(same.watched).value < 0.5
    assert changed.watched["end"].max() == 200 == len(changed.features["characters"])
    assert len(changed.reference["characters"]) == 60
    assert set(changed.watched["detector"]) == {n for n, group in drift.WATCHES.items() if group == "inputs"}
