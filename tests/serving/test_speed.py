"""Tables of what was measured: which answers are the same, and what each step is worth."""

import math

import pandas as pd
import pytest

from erlib.serving import bulk, speed


@pytest.fixture
def measured():
    rows = [(speed.NAIVE, 0, 8.0), (speed.NAIVE, 1, 8.0), ("fast", 0, 4.0), ("fast", 1, 1.0)]
    answers = {speed.NAIVE: [[1], [2], [3], [4]], "fast": [[1], [2], [3], [5]]}
    return speed.Measured(pd.DataFrame(rows, columns=["way", "turn", "seconds"]).assign(load=0.0), answers)


def test_same_answers_are_the_share_that_equals_the_naive_ones_with_an_interval(measured):
    same = speed.same_answers(measured)
    assert same[speed.NAIVE].value == 1.0
    assert same["fast"].value == pytest.approx(3 / 4)
    assert same["fast"].low < 3 / 4 < same["fast"].high


def test_a_step_has_its_factor_and_an_interval_where_both_ways_were_measured_in_turns(measured):
    rate = {"alone": 10.0, speed.NAIVE: 20.0, "fast": 60.0}
    steps = [("alone", None), (speed.NAIVE, "alone"), ("fast", speed.NAIVE)]
    table = speed.step_table(steps, rate, measured).set_index("name")
    assert table["documents_per_hour"].tolist() == [10, 20, 60]
    assert math.isnan(table.loc["alone", "factor"])
    assert table.loc[speed.NAIVE, "factor"] == 2 and math.isnan(table.loc[speed.NAIVE, "low"])
    assert table.loc["fast", ["factor", "low", "high"]].tolist() == pytest.approx([3, 2, 8])


def test_an_engine_in_several_processes_goes_by_its_name_and_their_number():
    assert speed.in_processes(bulk.Work("openvino", workers=3)) == "openvino, 3 processes"
