"""The tokenizer, the batches and the training loop of the base model, on a tiny one."""

import json
from dataclasses import asdict
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib.lm import models
from erlib.task.schema import Entity, Report
from erlib.world import pretrain

TINY = {
    "tokens": 6000,
    "shape": pretrain.Shape(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
    "batching": pretrain.Batching(sequence_length=64, long_sequence_length=512, batch_tokens=512),
    "optimisation": pretrain.Optimisation(bf16=False),
}
OFTEN = pretrain.Bookkeeping(log_every=5, save_seconds=0)


def rows():
    index = 0
    while True:
        text = "Kor Labs is here. " * (2 + index % 30)
        yield {"parts": [(f"Document:\n{text}\nReport:\n", False), ("Kor Labs|organisation", True)]}
        index += 1


TEXTS = ["".join(text for text, _ in row["parts"]) for row in islice(rows(), 20)]
TOKENIZER = pretrain.train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    monkeypatch.setattr(pretrain, "_POOL", 32)


# -- tokenizer ----------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=200)
def test_any_text_survives_the_tokenizer(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == 1 and not {0, 1, 2} & set(ids[1:])
    assert TOKENIZER.decode(ids[1:]) == text


def test_special_tokens_have_their_ids_and_survive_saving(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded("x </s>\n\n12")["input_ids"] == TOKENIZER("x </s>\n\n12")["input_ids"]
    assert loaded.split_special_tokens and loaded.padding_side == "left"


def test_a_name_has_the_same_tokens_in_document_and_report():
    def encoded(text):
        return TOKENIZER(text, add_special_tokens=False)["input_ids"]

    name = encoded("Korvex Labs")
    for before, after in (("by ", " for"), ("", "|org"), (">leads|", "\n"), ("#", "!"), ("(", ")")):
        ids = encoded(f"{before}Korvex Labs{after}")
        assert any(ids[i : i + len(name)] == name for i in range(len(ids)))


def test_digits_and_newlines_are_tokens_of_their_own():
    assert len(TOKENIZER("12\n\n3", add_special_tokens=False)["input_ids"]) == 5


def test_the_text_of_an_end_token_is_text():
    (ids, targets), *_ = pretrain.encode([{"parts": [("1", False), ("</s>2", True)]}], TOKENIZER)
    assert ids.count(2) == 1 and ids[-1] == 2
    assert targets == [False] * 2 + [True] * (len(ids) - 2)


# -- training rate ------------------------------------------------------------------------------------------------


def test_the_rate_rises_falls_and_ends_low():
    rates = [pretrain._schedule(step / 1000, 0.02) for step in range(1001)]
    peak = rates.index(max(rates))
    assert peak == 20 and max(rates) == pytest.approx(1.0, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert rates[780] == pytest.approx(0.1, abs=2e-3) and rates[-1] == pytest.approx(0.02)


# -- batches ------------------------------------------------------------------------------------------------------


def batches(source=None, **changes):
    values = {"sequence_length": 64, "long_sequence_length": 512, "long_share": 0.3}
    values |= {"batch_tokens": 512, "prompt_loss_weight": 0.2}
    batching = pretrain.Batching(**(values | changes))
    return list(pretrain.batches(source or rows(), TOKENIZER, tokens=6000, batching=batching, seed=0))


def test_long_rows_wait_for_the_end_and_no_row_is_cut():
    seen = batches()
    first_long = next(index for index, (ids, _) in enumerate(seen) if ids.shape[1] > 64)
    assert sum(int((ids != 0).sum()) for ids, _ in seen[:first_long]) >= 0.7 * 6000
    for ids, in_loss in seen:
        assert (ids == 2).sum(dim=1).tolist() == [1] * len(ids)  # each row ends whole
        assert in_loss[ids == 2].all() and not in_loss[ids == 0].any()
        assert ids.numel() <= 512


def test_prompt_tokens_are_sampled_into_the_loss_in_proportion():
    def share(weight):
        seen = batches(prompt_loss_weight=weight)
        return sum(int(in_loss.sum()) for _, in_loss in seen) / sum(int((ids != 0).sum()) for ids, _ in seen)

    assert share(0.0) < 0.2 < share(0.5) < share(1.0) == 1.0


def test_rows_that_run_out_or_are_too_long_are_told():
    with pytest.raises(ValueError, match="more than long_sequence_length=100"):
        batches(long_sequence_length=100)
    with pytest.raises(ValueError, match="ran out after"):
        batches(list(islice(rows(), 3)))


# -- training -----------------------------------------------------------------------------------------------------


class KillError(Exception):
    """Ends a training run between two batches, as a kill would."""


def killed():
    yield from islice(rows(), 100)
    raise KillError


def test_training_resumes_bit_for_bit_and_loads(tmp_path):
    def run(name, source):
        return pretrain.train(source, TOKENIZER, out=tmp_path / name, bookkeeping=OFTEN, **TINY)

    log = run("whole", rows())
    with pytest.raises(KillError):
        run("killed", killed())
    assert (tmp_path / "killed/checkpoint.pt").exists()
    resumed = run("killed", rows())
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert list(resumed["loss"]) == list(log["loss"])
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    model, _ = models.load(tmp_path / "killed")
    assert model.config.tie_word_embeddings
    assert len(models.generate(model, TOKENIZER, ["Document:\n"], max_new_tokens=4)) == 1


def test_another_run_s_checkpoint_is_refused(tmp_path):
    with pytest.raises(KillError):
        pretrain.train(killed(), TOKENIZER, out=tmp_path, bookkeeping=OFTEN, **TINY)
    with pytest.raises(ValueError, match="other settings"):
        pretrain.train(rows(), TOKENIZER, out=tmp_path, **(TINY | {"tokens": 7000}))
    with pytest.raises(ValueError, match="other settings"):
        pretrain.train(rows(), TOKENIZER, out=tmp_path, **TINY, seed=1)


def test_the_callback_s_figures_join_the_log(tmp_path):
    every = pretrain.Bookkeeping(evaluate_every=2000, log_every=5)
    log = pretrain.train(rows(), TOKENIZER, out=tmp_path, evaluate=lambda model: {"f1": 0.5}, bookkeeping=every, **TINY)
    assert log["f1"].notna().sum() == 3
    assert "min left" in (tmp_path / "train.log").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 16


# -- what it can do -----------------------------------------------------------------------------------------------


def test_both_forms_are_read_with_and_without_examples_and_told_in_the_card():
    model = pretrain.new_model(TOKENIZER, seed=0, **asdict(TINY["shape"])).eval()
    report = Report(entities=(Entity(name="Kor Labs", type="organisation"),))
    table = pretrain.by_form(model, TOKENIZER, ["Kor Labs is here."], [report], shown=[("Kor Labs grew.", report)] * 2)
    assert table[["form", "examples"]].to_numpy().tolist() == [["compact", 0], ["compact", 2], ["json", 0], ["json", 2]]
    assert table["entity F1"].between(0, 1).all() and table["parse-valid"].between(0, 1).all()
    words = {
        "documents": 1,
        "tokens": 6000,
        "exposure": 0.8,
        "world_seed": 3,
        "minutes": 2.0,
        "threads": 1,
        "command": "make it",
    }
    card = pretrain.card(model, TOKENIZER, table, **words)
    assert "| json, after 2 examples | " in card and "World(seed=3)" in card and "80% of the phrasings" in card
