"""Fine-tuning on a tiny model: rows, masks, limits, resume after a kill, reproducibility, and that it learns."""

import numpy as np
import pytest
import torch
import yaml

from erlib.lm import models, sft
from erlib.lm.checkpoints import merge_adapter
from erlib.task import metrics
from erlib.task.schema import Brief, Document, Entity, Exemplar, Report
from erlib.world import pretrain

NAMES = ["Kor", "Vel", "Tamu", "Osti", "Brin", "Zan", "Mel", "Dro"]


def exemplar(index):
    name = NAMES[index % len(NAMES)]
    document = Document(id=f"d{index}", text=f"{name} is here, </s> {index}.")
    return Exemplar(document=document, report=Report(entities=(Entity(name=name, type="organisation"),)))


GOLD = [exemplar(index) for index in range(48)]
ROWS = sft.rows([e.document for e in GOLD], [e.report for e in GOLD])


@pytest.fixture(scope="module")
def brief():
    with open("params/brief.yml", encoding="utf-8") as file:
        return Brief.model_validate(yaml.safe_load(file))


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.train_tokenizer([row["prompt"] + row["completion"] for row in ROWS], vocab_size=320)


@pytest.fixture
def model(tokenizer):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return pretrain.new_model(tokenizer, seed=0, max_position_embeddings=128, **shape).eval()


def train(model, tokenizer, encoded, tmp_path, harness=lambda model: {"gold_entity_f1": 0.5}, **changes):
    values = {"points": 3, "batch_size": 4, "learning_rate": 1e-2, "warmup_share": 0.05, "lora_rank": 4, "seed": 1}
    return sft.train(
        model,
        tokenizer,
        encoded.rows,
        out=tmp_path / "adapter",
        checkpoints=tmp_path / "checkpoints",
        validation=encoded.rows[:4],
        harness=harness,
        training=sft.Training(**(values | changes)),
    )


def weights(tmp_path):
    return (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()


# -- rows ---------------------------------------------------------------------------------------------------------


def test_only_the_completion_and_its_end_are_learnt(tokenizer):
    encoded = sft.encode(ROWS[:1], tokenizer, max_tokens=100)
    labels = [label for label in encoded.rows[0]["labels"] if label != -100]
    assert tokenizer.decode(labels) == "Kor|organisation</s>"
    whole = "<s>Document:\nKor is here, </s> 0.\nReport:\nKor|organisation</s>"
    assert tokenizer.decode(encoded.rows[0]["input_ids"]) == whole
    assert encoded.rows[0]["input_ids"].count(tokenizer.eos_token_id) == 1  # the one in the document stayed text


def test_a_row_has_the_tokens_of_its_whole_text(tokenizer):
    for row, encoded in zip(ROWS, sft.encode(ROWS, tokenizer, max_tokens=100).rows, strict=True):
        assert encoded["input_ids"][:-1] == tokenizer(row["prompt"] + row["completion"])["input_ids"]


def test_no_row_is_lost_silently(tokenizer):
    long = {"id": "long-one", "prompt": "Kor " * 200 + "\n", "completion": "none"}
    with pytest.raises(ValueError, match="1 rows have more than max_tokens=100 tokens: long-one"):
        sft.encode([*ROWS, long], tokenizer, max_tokens=100)
    encoded = sft.encode([*ROWS, long], tokenizer, max_tokens=100, leave_out=True)
    assert (len(encoded.rows), encoded.too_long) == (len(ROWS), ["long-one"])
    assert encoded.ids == [row["id"] for row in ROWS]


def test_mixing_keeps_every_own_row_and_the_share():
    others = [{"id": f"other-{index}", "prompt": "q\n", "completion": "a"} for index in range(50)]
    mixed = sft.mix(ROWS, others, share=0.25, seed=0)
    assert {row["id"] for row in ROWS} <= {row["id"] for row in mixed}
    assert sum(row["id"].startswith("other") for row in mixed) / len(mixed) == 0.25
    assert mixed == sft.mix(ROWS, others, share=0.25, seed=0) != sft.mix(ROWS, others, share=0.25, seed=1)
    with pytest.raises(ValueError, match="needs 432 rows"):
        sft.mix(ROWS, others, share=0.9, seed=0)


# -- the gap --------------------------------------------------------------------------------------------------------


def scores(tp, fp, fn):
    counts = np.array([[tp, fp, fn]] * 6)
    return metrics.Scores(counts, counts)


def test_the_share_of_the_gap_that_is_closed():
    base, tuned, frontier = scores(2, 8, 8), scores(7, 3, 3), scores(9, 1, 1)  # F1 .2, .7, .9
    closed = sft.gap_closed(base, tuned, frontier, seed=0)
    assert [round(value, 6) for value in closed] == [round(5 / 7, 6)] * 3
    assert np.isnan(sft.gap_closed(frontier, tuned, frontier, seed=0).value)


# -- training -----------------------------------------------------------------------------------------------------


def test_training_learns_and_the_harness_is_read_on_the_way(model, tokenizer, brief, tmp_path):
    encoded = sft.encode(ROWS, tokenizer, max_tokens=100)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sets = {"gold": GOLD[:8], "ood": GOLD[8:12]}
    score = sft.harness(tokenizer, sets, brief=brief, max_new_tokens=12, batch_size=8)
    log = train(model, tokenizer, encoded, tmp_path, harness=score, epochs=4)
    measured = log.dropna(subset="gold_entity_f1")
    assert list(measured["step"]) == [0, 16, 32, 48]
    assert {"gold_relationship_f1", "gold_parse_rate", "ood_entity_f1"} <= set(log)
    assert log["eval_loss"].dropna().iloc[-1] < log["eval_loss"].dropna().iloc[0] - 0.5
    for name, tensor in model.state_dict().items():  # the base under the adapter is untouched
        if name.replace("base_layer.", "") in base:
            assert torch.equal(tensor, base[name.replace("base_layer.", "")]), name
    assert not list((tmp_path / "checkpoints").iterdir())


class KillError(Exception):
    """Ends a training run at a certain step, as a kill would."""


def kill_at(step):
    calls = []

    def harness(model):
        calls.append(1)
        if len(calls) > step:
            raise KillError
        return {"gold_entity_f1": 0.5}

    return harness


def test_resumed_equals_uninterrupted_bit_for_bit(tokenizer, tmp_path):
    encoded = sft.encode(ROWS, tokenizer, max_tokens=100)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

    def fresh():
        return pretrain.new_model(tokenizer, seed=0, max_position_embeddings=128, **shape)

    log = train(fresh(), tokenizer, encoded, tmp_path)
    wanted = weights(tmp_path)
    with pytest.raises(KillError):  # measured at steps 0, 4 and 8: saved at 4 only
        train(fresh(), tokenizer, encoded, tmp_path, harness=kill_at(2))
    resumed = train(fresh(), tokenizer, encoded, tmp_path)
    assert weights(tmp_path) == wanted
    assert list(resumed["step"]) == list(log["step"])
    assert list(resumed["loss"].dropna()) == list(log["loss"].dropna())


def test_a_truncated_newest_checkpoint_falls_back(tmp_path):
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"x" * 100)
        sft._mark_complete(folder)
    (tmp_path / "checkpoint-12").mkdir()  # killed before it was complete
    (tmp_path / "checkpoint-8" / "optimizer.pt").write_bytes(b"x" * 50)
    assert sft._last_valid(tmp_path) == str(tmp_path / "checkpoint-4")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_other_rows_never_resume(model, tokenizer):
    rows = sft.encode(ROWS, tokenizer, max_tokens=100).rows
    assert sft._key(model, rows, {"seed": 0}) == sft._key(model, rows, {"seed": 0})
    assert len({sft._key(model, rows[:n], {"seed": seed}) for n in (4, 8) for seed in (0, 1)}) == 4


def test_the_merge_writes_what_the_adapter_writes(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    train(model, tokenizer, sft.encode(ROWS, tokenizer, max_tokens=100), tmp_path, epochs=2)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, _ = models.load(tmp_path / "merged")
    prompts = [row["prompt"] for row in ROWS[:8]]
    pairs = (models.generate(lm, tokenizer, prompts, max_new_tokens=12) for lm in (model, merged))
    for unmerged, one in zip(*pairs, strict=True):
        assert one.ids == unmerged.ids
        assert one.logprobs == pytest.approx(unmerged.logprobs, abs=1e-4)
