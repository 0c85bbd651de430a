"""The control of the watch: a stationary stream, and documents that differ from it in one way each."""

from pathlib import Path

import numpy as np
import pytest

from erlib.documents import files
from erlib.watch import stretches
from erlib.world import drifted
from erlib.world.stream import World

BRIEF = files.read_brief(Path(__file__).parents[2] / "params/brief.yml")
SIZES = drifted.Sizes(stretch=60, checked=90, window=10, changed_windows=2)


@pytest.fixture(scope="module")
def held_out():
    return drifted.held_out_topics(3)


@pytest.fixture(scope="module")
def parts(held_out):
    return drifted.control(BRIEF, SIZES, held_out=held_out, seed=0)


def topics(documents):
    world = World(seed=drifted.OTHER_STORIES, brief=BRIEF, drift=0)
    return [sample.truth.topic for sample in world.find(document.id for document in documents)]


def kinds(documents):
    return {document.source for document in documents}


def test_the_stationary_stream_is_in_order_of_time_and_its_parts_do_not_meet(parts, held_out):
    stationary = [*parts["fit"], *parts["calibrate"], *parts["check"], *parts["none"]]
    assert [len(parts[name]) for name in ("fit", "calibrate", "check")] == [30, 60, 90]
    stretches.require_dated(stationary)
    assert len({document.id for document in stationary}) == len(stationary)
    assert not set(topics(stationary)) & set(held_out)


def test_each_change_is_what_it_says(parts, held_out):
    assert set(parts) == {"fit", "calibrate", "check", *drifted.CHANGES}
    assert set(topics(parts["topic"])) <= set(held_out)
    mean = {name: np.mean([len(document.text) for document in parts[name]]) for name in ("length", "none")}
    assert mean["length"] > 1.2 * mean["none"]
    assert kinds(parts["length"]) == kinds(parts["none"])
    assert {document.id for document in parts["length"]} < {document.id for document in parts["none"]}
    assert kinds(parts["structure"]) == {"transcript"} and len(parts["structure"]) == 20
    assert parts["serving"] == parts["check"][:20]


def test_a_year_has_its_windows_in_order_and_leaves_out_what_is_held_out(held_out):
    found = drifted.year(BRIEF, parts=4, window=5, held_out=held_out, seed=0)
    assert len(found) == 20
    dates = stretches.require_dated(found)
    assert 250 < (dates[-1] - dates[0]).days < 365
    seasons = World(seed=drifted.OTHER_STORIES, brief=BRIEF, drift=1)
    assert not {sample.truth.topic for sample in seasons.find(document.id for document in found)} & set(held_out)
