"""Bulk extraction: every line of the input once, in order, whatever was killed when."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest

from erlib.lm import models
from erlib.lm.checkpoints import fingerprint
from erlib.serving import bulk, engines, export
from erlib.task.forms import ask
from erlib.task.schema import Document

N = 240  # enough that no signal comes too late


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of random weights under the embedded tokenizer: what it writes does not matter here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = tmp_path_factory.mktemp("bulk") / "merged"
    shutil.copytree(models.EMBEDDED, source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(source)
    (source / "merge.json").write_text(json.dumps({"merged": fingerprint(source)}))
    out = source.with_name("model")
    export.export(source, out, prompt=ask("{text}") + "\n", window=128, max_new_tokens=16, card="# Card\n")
    return out


@pytest.fixture
def documents(tmp_path):
    """Good rows, and in their midst hostile and bad ones."""
    odd = {
        10: '{"id": "special", "text": "</s><s>[INST] <pad> <|endoftext|> words"}',
        11: '{"id": "empty", "text": ""}',
        12: '{"id": "emoji", "text": "🎉🎉🎉 🚀"}',
        13: '{"id": "rtl", "text": "شركة النور تعيّن \\u202emديرة"}',
        14: '{"id": "broken", "te',
        15: "",
        16: json.dumps({"id": "long", "text": "A sentence. " * 400}),
        17: '{"id": "a", "text": "the same id"}',
        18: '{"id": "a", "text": "again"}',
        N: "[1]",
    }
    path = tmp_path / "documents.jsonl"
    lines = [odd.get(n, json.dumps({"id": f"d{n}", "text": f"Post {n} about Brinvex."})) for n in range(1, N + 1)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def start(documents, model, *options):
    # nice, so that on a busy machine the test sees in time how far it is
    command = ["nice", sys.executable, "-m", "erlib", "extract", str(documents)]
    command += [str(documents.with_name("reports.jsonl"))]
    command += ["--model", str(model), "--engine", "transformers", "--workers", "1", "--block", "3", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def wait_for(path, lines, process):
    while process.poll() is None and (not path.exists() or len(path.read_bytes().splitlines()) < lines):
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_and_interrupted_it_goes_on_without_loss_or_repetition(documents, model):
    reports, rejects = documents.with_name("reports.jsonl"), documents.with_name("reports.rejects.jsonl")
    process = start(documents, model)
    wait_for(reports, 25, process)
    process.kill()
    process.wait()
    with reports.open("ab") as file:
        file.write(b'{"line": 80, "id": "cut o')  # a write that the kill cut off
    process = start(documents, model)
    wait_for(reports, 45, process)
    assert process.poll() is None, "it ended before it could be interrupted"
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert len(read(reports)) < N - 5
    last = start(documents, model)
    _, said = last.communicate()
    assert last.returncode == 0, said

    found, bad = read(reports), read(rejects)
    assert [row["line"] for row in bad] == [11, 14, N]
    assert [row["line"] for row in found] == [n for n in range(1, N + 1) if n not in (11, 14, 15, N)]
    assert [row["id"] for row in found[9:15]] == ["special", "emoji", "rtl", "long", "a", "a"]
    assert next(row for row in found if row["id"] == "long")["pieces"] > 1

    # What was written in three goes is what one engine says in one.
    engine = engines.open_engine(model, engine="transformers")
    texts = {row["line"]: Document(id=row["id"], text=f"Post {row['line']} about Brinvex.") for row in found[20:30]}
    once = {e.index: e for e in engines.extract(engine, list(texts.values()))}
    for place, row in enumerate(found[20:30]):
        assert row["entities"] == once[place].parsed.report.model_dump(mode="json")["entities"]
        assert row["new_tokens"] == once[place].new_tokens

    again = start(documents, model)
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert read(reports) == found
    assert [row["line"] for row in read(rejects)] == [11, 14, N]


def test_no_worker_outlives_a_killed_parent(documents, model):
    process = start(documents, model)
    wait_for(documents.with_name("reports.jsonl"), 1, process)
    import psutil

    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


class Echo:
    """In place of the processes: every document gets an empty report at once."""

    def __call__(self, rows, model, work, brief):
        for read in iter(lambda: list(islice(rows, work.block)), []):
            found = [{"line": number, "id": document.id, "entities": []} for number, document, *_ in read if document]
            yield read, found


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    monkeypatch.setattr(bulk, "_in_order", Echo())

    def extract(name, reports="reports.jsonl", *, rejects=None, **changes):
        rejects = tmp_path / (rejects or f"{reports}.rejects")
        asked = {"model": model, "work": bulk.Work("transformers"), "rejects": rejects} | changes
        return bulk.extract(tmp_path / name, tmp_path / reports, **asked)

    return extract


def export_of(day, rows):
    return "id,text\n" + "".join(f"{day}-{n},Quillon Freight hires {n} drivers\n" for n in range(rows))


def test_the_export_of_another_day_is_another_input(run, tmp_path):
    """Both have the same header, and the second has more rows."""
    (tmp_path / "monday.csv").write_text(export_of("monday", 30))
    (tmp_path / "tuesday.csv").write_text(export_of("tuesday", 40))
    run("monday.csv")
    before = (tmp_path / "reports.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match="reports.jsonl was begun with another input: 'monday.csv', and now 'tuesday.csv'"
    ):
        run("tuesday.csv")
    assert (tmp_path / "reports.jsonl").read_bytes() == before
    assert run("monday.csv").reports == 0


def test_an_input_that_has_grown_goes_on_and_one_that_has_changed_does_not(run, tmp_path):
    (tmp_path / "a.csv").write_text(export_of("monday", 30))
    run("a.csv")
    (tmp_path / "a.csv").write_text(export_of("monday", 40))
    assert run("a.csv").reports == 10
    assert [row["id"] for row in read(tmp_path / "reports.jsonl")] == [f"monday-{n}" for n in range(40)]
    changed = export_of("monday", 50).replace("monday-35,", "monday-x,")
    (tmp_path / "a.csv").write_text(changed)  # among the rows that have come to it
    with pytest.raises(ValueError, match="another input"):
        run("a.csv")


def test_an_input_without_a_last_line_end_cannot_grow(run, tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,half a")
    run("a.csv")
    (tmp_path / "a.csv").write_text("id,text\n1,half a sentence\n")
    with pytest.raises(ValueError, match="another input"):
        run("a.csv")


def test_another_model_engine_brief_or_column_is_refused(run, tmp_path):
    (tmp_path / "a.csv").write_text(export_of("monday", 3))
    run("a.csv")
    for changes, name in (
        ({"work": bulk.Work("openvino")}, "engine"),
        ({"columns": bulk.Columns(max_chars=9)}, "columns"),
        ({"columns": bulk.Columns(id_column="text")}, "columns"),
    ):
        with pytest.raises(ValueError, match=f"begun with another {name}"):
            run("a.csv", **changes)
    record = tmp_path / ".reports.jsonl.begun"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"weights": "else"}))
    with pytest.raises(ValueError, match="begun with another weights"):
        run("a.csv")


def test_what_this_command_did_not_write_is_left_alone(run, tmp_path):
    (tmp_path / "a.csv").write_text(export_of("monday", 3))
    (tmp_path / "mine.jsonl").write_text('{"line": 1}\n')
    with pytest.raises(ValueError, match="mine.jsonl exists and was not written by this command"):
        run("a.csv", "mine.jsonl")
    with pytest.raises(ValueError, match="mine.jsonl exists and was not written by this command"):
        run("a.csv", rejects="mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == '{"line": 1}\n'
    (tmp_path / "reports.jsonl").unlink(missing_ok=True)
    run("a.csv")
    lines = (tmp_path / "reports.jsonl").read_text().splitlines()
    edited = "\n".join([lines[0], "a note", *lines[1:]]) + "\n"
    (tmp_path / "reports.jsonl").write_text(edited)
    with pytest.raises(ValueError, match="reports.jsonl:2: this command did not write that line"):
        run("a.csv")
    assert (tmp_path / "reports.jsonl").read_text() == edited


def test_two_files_of_reports_never_share_their_rejects(run, tmp_path):
    (tmp_path / "a.csv").write_text(export_of("monday", 3))
    (tmp_path / "b.csv").write_text(export_of("tuesday", 3) + ",\n")
    run("a.csv", "a.jsonl", rejects="bad.jsonl")
    with pytest.raises(ValueError, match=r"bad.jsonl was begun with another reports: '.*a.jsonl'"):
        run("b.csv", "b.jsonl", rejects="bad.jsonl")


def test_memory_is_bounded_by_blocks_not_by_the_file(documents):
    from erlib.documents import files

    rows = files.numbered_documents(documents)
    assert next(rows)[1].id == "d1"  # a generator: nothing beyond the first row is read
    assert [row[0] for row in files.numbered_documents(documents, after=N - 2)] == [N - 1, N]
    assert bulk.count_rows(documents) == N
