"""Bulk extraction: every line of the input once, in order, whatever was killed when."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from erlib.lm import models
from erlib.lm.checkpoints import fingerprint
from erlib.serving import bulk, engines, export
from erlib.task.forms import ask
from erlib.task.schema import Document

N = 400  # enough that no signal comes too late


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


def test_killed_and_interrupted_it_goes_on_without_loss_or_repetition(documents, model):
    reports, rejects = documents.with_name("reports.jsonl"), documents.with_name("rejects.jsonl")
    for lines in (4, 25):
        process = start(documents, model)
        wait_for(reports, lines, process)
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

    # What was written in five goes is what one engine says in one.
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


def test_another_model_or_input_is_refused(documents, model, tmp_path):
    reports = tmp_path / "reports.jsonl"
    reports.write_text('{"line": 1}\n')
    asked = {"model": model, "work": bulk.Work("transformers"), "rejects": tmp_path / "rejects.jsonl"}
    with pytest.raises(ValueError, match="was not written by this command"):
        bulk.extract(documents, reports, **asked)
    begun = {"weights": export.read_settings(model).weights, "engine": "transformers", "first_line": "another"}
    (tmp_path / ".reports.jsonl.begun").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="begun with another first_line"):
        bulk.extract(documents, reports, **asked)
    assert reports.read_text() == '{"line": 1}\n'


def test_memory_is_bounded_by_blocks_not_by_the_file(documents):
    from erlib.documents import files

    rows = files.numbered_documents(documents)
    assert next(rows)[1].id == "d1"  # a generator: nothing beyond the first row is read
    assert [row[0] for row in files.numbered_documents(documents, after=N - 2)] == [N - 1, N]
    assert bulk.count_rows(documents) == N
