"""Documents of one's own, by date: what is left out, how they are cut, and why they cannot be watched."""

import pandas as pd
import pytest

from erlib.documents import files
from erlib.task.schema import Document
from erlib.watch import stretches


def dated(*dates):
    return [Document(id=f"d{place}", text="text", date=date) for place, date in enumerate(dates)]


def test_dates_are_read_in_utc_where_none_is_said():
    found = stretches.require_dated(dated("2025-01-31", "2025-01-31T09:30:00Z", "2025-01-31T12:30:00+02:00"))
    assert [date.isoformat() for date in found] == [
        "2025-01-31T00:00:00+00:00", "2025-01-31T09:30:00+00:00", "2025-01-31T12:30:00+02:00"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (("2025-01-01", None), "'d1' .number 2. has the date None: every document"),
        (("2025-01-01", "yesterday"), "'d1' .number 2. has the date 'yesterday'"),
        (("2025-01-02", "2025-01-01"), "'d1' .number 2. of 2025-01-01 comes after 'd0' of 2025-01-02: sort the stream"),
    ],
)
def test_a_stream_without_order_in_time_is_refused(dates, message):
    with pytest.raises(ValueError, match=message):
        stretches.require_dated(dated(*dates))


# -- cutting ------------------------------------------------------------------------------------------------------

SMALLEST = {"fit": 2, "calibrate": 6, "check": 4, "watched": 8}


def days(*numbers):
    return dated(*(f"2025-01-{number:02}" for number in numbers))


def test_documents_are_put_in_order_of_time_and_the_undated_are_counted():
    documents = dated("2025-01-02", None, "2025-01-01T10:00:00+02:00", "soon", "2025-01-01T09:00:00Z", "2025-01-02")
    found = stretches.in_order(documents)
    assert [document.id for document in found.documents] == ["d2", "d4", "d0", "d5"]  # 8:00, 9:00, then as given
    assert found.undated == 2
    stretches.require_dated(found.documents)


def test_a_stream_is_cut_into_tenths_by_date():
    found = stretches.cut(stretches.in_order(days(*range(20, 0, -1))), [1, 3, 2], smallest=SMALLEST)
    places = {name: [int(document.date[-2:]) for document in part] for name, part in found.parts.items()}
    assert places == {
        "fit": [1, 2], "calibrate": [3, 4, 5, 6, 7, 8], "check": [9, 10, 11, 12], "watched": [*range(13, 21)]
    }  # fmt: skip
    assert found.said == "2025-01-01 to 2025-01-20: fit 2, calibrate 6, check 4, watched 8"
    with_undated = stretches.cut(stretches.in_order([*days(*range(1, 21)), *dated(None)]), [1, 3, 2], smallest=SMALLEST)
    assert with_undated.said.endswith("; 1 without a date that can be read are left out")


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (dated(None, "soon"), "none of the 2 documents has a date such as 2025-01-31"),
        (days(*[7] * 20), "all 20 documents have the date 2025-01-07"),
        (
            [*days(*range(1, 19)), *dated(None)],
            "18 dated documents are too few (1 of 2 to be fitted on, 3 of 4 to be checked on); "
            "1 without a date that can be read are left out",
        ),
    ],
)
def test_a_stream_that_cannot_be_watched_says_why(documents, said):
    found = stretches.cut(stretches.in_order(documents), [1, 3, 2], smallest=SMALLEST)
    assert found == ({}, said)


@pytest.mark.parametrize("tenths", [[1, 3], [0, 3, 2], [4, 4, 2]])
def test_tenths_that_leave_no_rest_are_refused(tenths):
    with pytest.raises(ValueError, match="three that leave a rest"):
        stretches.cut(stretches.in_order(days(1, 2)), tenths, smallest=SMALLEST)


def test_a_csv_of_ones_own_is_cut_whatever_its_order(tmp_path):
    lines = [f'{n},"post {n}, with words",2025-01-{n:02}T08:00:00Z' for n in range(1, 21)]
    path = tmp_path / "posts.csv"
    path.write_text("\n".join(["id,text,date", *lines[::-1], "undated,a post without a date,"]) + "\n")
    read = files.read_documents(path, rejects=tmp_path / "rejects.jsonl")
    found = stretches.cut(stretches.in_order(read), [1, 3, 2], smallest=SMALLEST)
    assert [document.id for part in found.parts.values() for document in part] == [str(n) for n in range(1, 21)]
    assert "1 without a date" in found.said


def test_windows_take_the_date_of_their_last_document():
    watched = pd.DataFrame({"window": [0, 1], "first": [0, 2], "end": [2, 4]})
    documents = dated("2025-01-01", "2025-01-02", "2025-01-03", "2025-01-03T12:00:00+02:00")
    found = stretches.dated_windows(watched, documents)
    assert found["date"].astype(str).tolist() == ["2025-01-02 00:00:00", "2025-01-03 10:00:00"]
