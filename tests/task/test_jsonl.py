"""JSON Lines that must be right: written whole or not at all, read strictly."""

from pathlib import Path

import pytest

from erlib.task.jsonl import read_jsonl, write_jsonl


def test_jsonl_is_written_whole_or_not_at_all_and_read_back_strictly(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "é\u2028\n🙂", "n": 1.5}, {}]
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    with pytest.raises(ValueError):
        write_jsonl(path, [{"n": float("nan")}])
    assert read_jsonl(path) == rows
    path.write_text('{"a": 1}\n{"a": NaN}\n')
    with pytest.raises(ValueError, match="rows.jsonl:2: NaN is not JSON"):
        read_jsonl(path)
