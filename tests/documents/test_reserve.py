"""Reservation: every document to one purpose, recorded, and an overlap refused."""

from pathlib import Path

import pytest

from erlib.documents import reserve
from erlib.task.schema import Document

POOL = [Document(id=f"d{number:02}", text=f"text {number}") for number in range(20)]


def ids(drawn: reserve.Drawn) -> set[str]:
    return {document.id for document in drawn.documents}


def test_purposes_never_share_a_document_and_the_order_of_the_pool_does_not_matter() -> None:
    first = reserve.draw(POOL, 8, purpose="sampling", earlier={}, seed=1)
    second = reserve.draw(POOL[::-1], 8, purpose="PPO", earlier=first.reserved, seed=1)
    assert len(ids(first)) == len(ids(second)) == 8
    assert not ids(first) & ids(second)
    assert second.left == 4
    assert ids(reserve.draw(POOL[::-1], 8, purpose="sampling", earlier={}, seed=1)) == ids(first)


def test_unfit_documents_are_passed_over_and_counted() -> None:
    drawn = reserve.draw(POOL, 10, purpose="x", earlier={}, seed=0, fits=lambda document: int(document.id[1:]) % 2 == 0)
    assert all(int(name[1:]) % 2 == 0 for name in ids(drawn))
    assert drawn.unfit + drawn.left == 10


def test_too_few_documents_are_an_error_that_says_how_many_there_are() -> None:
    taken = {document.id: "reports" for document in POOL[:5]}
    said = r"trial: 16 documents are wanted; of 20 there are 15 .*\(5 for reports; 0 too long\).*`n_documents`"
    with pytest.raises(ValueError, match=said):
        reserve.draw(POOL, 16, purpose="trial", earlier=taken, seed=0)


def test_who_can_do_with_fewer_gets_what_there_is() -> None:
    taken = {document.id: "reports" for document in POOL[:5]}
    drawn = reserve.draw(POOL, 400, purpose="blind test", earlier=taken, seed=0, least=15)
    assert (len(drawn.documents), drawn.left) == (15, 0)
    assert len(reserve.draw(POOL, 3, purpose="blind test", earlier=taken, seed=0, least=15).documents) == 3
    with pytest.raises(ValueError, match="400 documents are wanted, 16 at least; of 20 there are 15"):
        reserve.draw(POOL, 400, purpose="blind test", earlier=taken, seed=0, least=16)


def test_records_add_up_over_phases_and_an_overlap_is_refused(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    reserve.write(tmp_path / "a" / reserve.FILE, {"d01": "reports"})
    reserve.write(tmp_path / "b" / reserve.FILE, reserve.read(tmp_path / "a", ""), {"d02": "sampling"})
    assert reserve.read(tmp_path / "a", tmp_path / "b") == {"d01": "reports", "d02": "sampling"}
    reserve.write(tmp_path / "c" / reserve.FILE, {"d02": "PPO"})
    with pytest.raises(ValueError, match="d02 is reserved twice, for 'sampling' and for 'PPO'"):
        reserve.read(tmp_path / "b", tmp_path / "c")
