"""The reward model on a tiny checkpoint: rows, what is saved, where scores are read, learning, reproducibility."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erlib.judgements.annotation import Preference
from erlib.lm import models
from erlib.lm.checkpoints import MERGE_RECORD, fingerprint
from erlib.rewards import reward_model
from erlib.task import metrics
from erlib.task.forms import short_prompt
from erlib.task.schema import ASPECTS
from erlib.world import pretrain

GOOD, BAD = "Kor|organisation|firm", "Kor|person|firm"
NAMES = ["Kor", "Vel", "Tamu", "Osti", "Brin", "Zan", "Mel", "Dro"]


def prompt(number):
    return short_prompt(f"{NAMES[number % len(NAMES)]} is here, </s> {number}.")


def reports(number):
    """A report with the right type, and one with the wrong one."""
    name = NAMES[number % len(NAMES)]
    return f"{name}|organisation|firm", f"{name}|person|firm"


@functools.cache
def trained_tokenizer():
    texts = ["".join((prompt(number), *reports(number))) for number in range(32)]
    return pretrain.train_tokenizer(texts, vocab_size=320)


def sampled(text):
    """Token ids of a report as a policy samples them, with the end token."""
    return tuple(models.encode_completion(trained_tokenizer(), text))


def preference(number, a, b, label="A", **changed):
    record = {
        "pair_id": f"d{number}#{changed.pop('pair', '0-1')}",
        "document_id": f"d{number}",
        "split": "train",
        "checkpoint": "c" * 64,
        "prompt": prompt(number),
        "a": a,
        "b": b,
        "a_ids": sampled(a),
        "b_ids": sampled(b),
        "preference": label,
        "score": {"A": 2.0, "tie": 0.0, "B": -2.0}[label],
        "votes": (label,),
        "aspects": dict.fromkeys(ASPECTS, 0.0) | {"entities": {"A": 2.0, "tie": 0.0, "B": -2.0}[label]},
    }
    return Preference.model_validate(record | changed)


def learnable(number):
    """A preference for the right type, as A in even documents and as B in odd ones."""
    good, bad = reports(number)
    return preference(number, good, bad, "A") if number % 2 == 0 else preference(number, bad, good, "B")


PREFERENCES = [learnable(number) for number in range(32)]


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """A merged checkpoint of a tiny model."""
    folder = tmp_path_factory.mktemp("start") / "merged"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = pretrain.new_model(tokenizer, seed=0, max_position_embeddings=128, **shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / MERGE_RECORD).write_text(json.dumps({"merged": fingerprint(folder)}))
    return folder


def train(checkpoint, tokenizer, out, preferences=PREFERENCES, **changed):
    rows = reward_model.encode(preferences, tokenizer, max_tokens=100).rows
    values = {"epochs": 6, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 4, "lora_alpha": 8, "seed": 1}
    given = {name: changed.pop(name) for name in ("validation", "expected") if name in changed}
    return reward_model.train(checkpoint, rows, reward_model.Training(**values | changed), out=out, **given)


@pytest.fixture(scope="module")
def trained(checkpoint, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("reward") / "adapter"
    validation = reward_model.encode(PREFERENCES[:8], tokenizer, max_tokens=100).rows
    before = fingerprint(checkpoint)
    log = train(checkpoint, tokenizer, out, validation=validation)
    assert fingerprint(checkpoint) == before
    return out, log


# -- earlier rounds -----------------------------------------------------------------------------------------------


def test_training_pairs_of_earlier_rounds_are_drawn_by_document_and_held_out_ones_stay_out():
    earlier = [preference(n, GOOD, BAD, pair=pair) for n in range(10) for pair in ("0-1", "0-2")]
    earlier += [preference(n, GOOD, BAD, split="test") for n in range(10, 20)]
    own = [preference(n, GOOD, BAD) for n in range(30, 34)]
    drawn = reward_model.of_earlier_rounds(earlier, own, documents=4, seed=0)
    assert len(drawn) == 8 and len({pair.document_id for pair in drawn}) == 4
    assert all(pair.split == "train" for pair in drawn)
    assert drawn == reward_model.of_earlier_rounds(earlier, own, documents=4, seed=0)
    assert drawn != reward_model.of_earlier_rounds(earlier, own, documents=4, seed=1)
    assert len(reward_model.of_earlier_rounds(earlier, own, documents=100, seed=0)) == 20
    assert reward_model.of_earlier_rounds(earlier, own, documents=0, seed=0) == []


def test_a_document_of_an_earlier_round_that_is_held_out_now_is_refused():
    earlier, own = [preference(3, GOOD, BAD)], [preference(3, GOOD, BAD, split="test", pair="1-2")]
    with pytest.raises(ValueError, match="1 documents of earlier rounds.*d3"):
        reward_model.of_earlier_rounds(earlier, own, documents=10, seed=0)


# -- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_is_a_document_and_its_preferred_sides_come_first(tokenizer):
    pairs = [
        preference(0, GOOD, BAD, "A"),
        preference(1, GOOD, BAD, "B"),
        preference(0, "none", GOOD, "B", pair="0-2"),
    ]
    encoded = reward_model.encode(pairs, tokenizer, max_tokens=100)
    assert [row["document_id"] for row in encoded.rows] == ["d0", "d1"]
    assert [tokenizer.decode(row["prompt_ids"]) for row in encoded.rows] == [f"<s>{p.prompt}" for p in pairs[:2]]
    texts = [[tokenizer.decode(ids) for ids in row["chosen_ids"]] for row in encoded.rows]
    assert texts == [[f"{GOOD}</s>"] * 2, [f"{BAD}</s>"]]
    longest = max(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in encoded.rows[0][side])
    assert (encoded.n_pairs, encoded.rows[0]["length"]) == (3, len(encoded.rows[0]["prompt_ids"]) + longest)


def test_the_ids_that_were_sampled_are_learnt_from_not_those_of_the_text(tokenizer):
    """A completion that ran out of tokens has no end, and one that was spelt otherwise stays so."""
    spelt = tuple(token for letter in GOOD for token in sampled(letter)[:-1])
    assert spelt != sampled(GOOD)[:-1]
    pair = preference(0, GOOD, BAD, "B").model_copy(update={"a_ids": spelt})
    (row,) = reward_model.encode([pair], tokenizer, max_tokens=100).rows
    assert (row["rejected_ids"], row["chosen_ids"]) == ([list(spelt)], [list(sampled(BAD))])
    assert row["length"] == len(row["prompt_ids"]) + max(len(spelt), len(sampled(BAD)))


def test_the_text_of_a_special_token_in_a_document_stays_text(tokenizer):
    (row,) = reward_model.encode([preference(0, GOOD, BAD)], tokenizer, max_tokens=100).rows
    assert "</s>" in prompt(0) and tokenizer.eos_token_id not in row["prompt_ids"]


def test_aspects_are_seen_from_the_preferred_side(tokenizer):
    signs = {"entities": 1.5, "relationships": 0.0, "summaries": -0.5}
    pairs = [
        preference(0, GOOD, BAD, "A").model_copy(update={"aspects": signs}),
        preference(0, "none", GOOD, "B", pair="0-2").model_copy(update={"aspects": signs}),
    ]
    (row,) = reward_model.encode(pairs, tokenizer, max_tokens=100).rows
    assert row["aspects"] == [[1, 0, -1], [-1, 0, 1]]


def test_ties_and_long_pairs_are_listed_never_lost(tokenizer):
    pairs = [*PREFERENCES[:4], preference(40, GOOD, BAD, "tie"), preference(41, "Kor " * 200, BAD)]
    with pytest.raises(ValueError, match="1 pairs have more than max_tokens=100 tokens: d41#0-1"):
        reward_model.encode(pairs, tokenizer, max_tokens=100)
    encoded = reward_model.encode(pairs, tokenizer, max_tokens=100, leave_out=True)
    assert (encoded.n_pairs, encoded.ties, encoded.too_long) == (4, ["d40#0-1"], ["d41#0-1"])


# -- training -----------------------------------------------------------------------------------------------------


def test_it_learns_the_order_and_keeps_it_on_other_documents(checkpoint, trained):
    out, log = trained
    assert log["eval_accuracy"].dropna().iloc[-1] == 1.0
    assert log["eval_loss"].dropna().iloc[-1] < 0.2 < log["eval_loss"].dropna().iloc[0]
    assert not [column for column in log if "second" in column or "runtime" in column]
    model, tokenizer = reward_model.load(checkpoint, out)
    others = [learnable(number) for number in range(100, 116)]
    margins = reward_model.margins(model, tokenizer, others)
    assert [margin > 0 for margin in margins] == [pair.preference == "A" for pair in others]


def test_the_file_holds_lora_and_head_under_the_names_that_ppo_reads(trained):
    out, _ = trained
    weights = load_file(out / "adapter_model.safetensors")
    head = weights.pop("base_model.model.score.weight")
    assert head.shape == (3, 32)
    assert all(name.startswith("base_model.model.model.layers.") for name in weights)
    assert {name.rsplit(".", 2)[1] for name in weights} == {"lora_A", "lora_B"}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "lm_head" not in config["target_modules"]
    assert {file.suffix for file in out.iterdir()} <= {".json", ".safetensors", ".md"}  # no pickles


def test_the_step_that_reads_a_completion_once_has_the_loss_of_its_pairs(checkpoint, tokenizer, tmp_path):
    """Three completions in three pairs: the first loss is that of six readings, and one reading was done."""
    texts = [GOOD, BAD, "none"]
    pairs = [preference(0, texts[i], texts[j], "A", pair=f"{i}-{j}") for i, j in ((0, 1), (0, 2), (1, 2))]
    judged = [{"entities": 2.0, "relationships": -1.0, "summaries": 0.0}, {"relationships": 1.0}, {}]
    pairs = [
        pair.model_copy(update={"aspects": dict.fromkeys(ASPECTS, 0.0) | signs})
        for pair, signs in zip(pairs, judged, strict=True)
    ]
    log = train(checkpoint, tokenizer, tmp_path / "adapter", pairs, epochs=1, seed=7)
    models.seed_everything(7)
    model, tokenizer = reward_model.load(checkpoint)
    of = dict(zip(texts, reward_model.aspect_scores(model, tokenizer, [pairs[0].prompt] * 3, texts), strict=True))
    margins = np.array([of[pair.a] - of[pair.b] for pair in pairs])  # LoRA begins as nothing
    summed = np.log1p(np.exp(-reward_model.margins(model, tokenizer, pairs))).mean()
    decided = np.array([margins[0, 0], -margins[0, 1], margins[1, 1]])  # entities, relationships, relationships
    assert log["loss"].iloc[0] == pytest.approx(summed + np.log1p(np.exp(-decided)).mean(), abs=1e-5)
    read = sum(len(models.encode_completion(tokenizer, text)) for text in texts)
    assert log["num_tokens"].iloc[0] == len(models.encode_prompt(tokenizer, pairs[0].prompt)) + read


def test_another_process_writes_the_same_bytes(checkpoint, tokenizer, tmp_path):
    source = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests/rewards')\n"
        "import test_reward_model as t; from erlib.lm import models\n"
        "start, out = map(Path, sys.argv[1:]); tokenizer = models.load(start)[1]\n"
        "t.train(start, tokenizer, out, t.PREFERENCES[:8], epochs=2)\n"
    )
    train(checkpoint, tokenizer, tmp_path / "here", PREFERENCES[:8], epochs=2)
    subprocess.run([sys.executable, "-c", source, str(checkpoint), str(tmp_path / "there")], check=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def test_another_checkpoint_or_an_unmerged_one_is_refused(checkpoint, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="is checkpoint"):
        train(checkpoint, tokenizer, tmp_path / "adapter", expected="f" * 64)
    with pytest.raises(ValueError, match="not a merged checkpoint"):
        train(tmp_path, tokenizer, tmp_path / "adapter")
    with pytest.raises(ValueError, match="every one is a tie or too long"):
        train(checkpoint, tokenizer, tmp_path / "adapter", [preference(0, GOOD, BAD, "tie")])
    assert not (tmp_path / "adapter").exists()


# -- scores -------------------------------------------------------------------------------------------------------


def test_a_score_does_not_depend_on_batch_neighbours_or_order(checkpoint, trained):
    model, tokenizer = reward_model.load(checkpoint, trained[0])
    texts = ["none", GOOD, BAD * 3, "a much longer completion, with words " * 3, ""]
    prompts = [PREFERENCES[number].prompt for number in range(len(texts))]
    together = reward_model.score(model, tokenizer, prompts, texts)
    assert np.allclose(together, reward_model.aspect_scores(model, tokenizer, prompts, texts).sum(axis=1))
    alone = [
        reward_model.score(model, tokenizer, [p], [t], batch_size=1)[0] for p, t in zip(prompts, texts, strict=True)
    ]
    reverse = reward_model.score(model, tokenizer, prompts[::-1], texts[::-1], batch_size=2)[::-1]
    assert together.dtype == np.float64
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together, reverse, atol=1e-5)
    assert len(set(together.round(4))) == len(texts)


def test_a_score_is_the_sum_of_head_and_log_probability_over_the_tokens(checkpoint, trained):
    """Against the plain forward of one sequence, unpadded."""
    model, tokenizer = reward_model.load(checkpoint, trained[0])
    prompt = PREFERENCES[0].prompt
    start, end = models.encode_prompt(tokenizer, prompt), models.encode_completion(tokenizer, GOOD)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[*start, *end]]), output_hidden_states=True)
        head = model.score(out.hidden_states[-1][0, len(start) :]).sum(dim=0)
        spread = out.logits[0, len(start) - 1 : -1].log_softmax(-1)
        likely = spread.gather(1, torch.tensor(end)[:, None]).sum()
    wanted = (head / 8 + 0.2 / 3 * likely).tolist()
    # Beside a longer completion of the same prompt, whose line it shares, and one of another prompt.
    others = [PREFERENCES[2].prompt, prompt, prompt]
    found = reward_model.aspect_scores(model, tokenizer, others, [BAD, GOOD * 3, GOOD])
    assert found[2] == pytest.approx(wanted, abs=1e-4)


def test_ids_are_scored_as_they_are_and_text_gets_its_end(checkpoint, trained):
    model, tokenizer = reward_model.load(checkpoint, trained[0])
    ids = models.encode_completion(tokenizer, GOOD)
    prompt = PREFERENCES[0].prompt
    text, same, unfinished = reward_model.score(model, tokenizer, [prompt] * 3, [GOOD, ids, ids[:-1]])
    assert text == pytest.approx(same, abs=1e-5)
    assert abs(text - unfinished) > 1e-4


def test_an_adapter_without_a_head_is_refused(checkpoint, trained, tmp_path):
    from safetensors.torch import save_file

    weights = load_file(trained[0] / "adapter_model.safetensors")
    del weights["base_model.model.score.weight"]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has no score head"):
        reward_model.load(checkpoint, tmp_path)


def test_the_record_says_what_ppo_must_know(tmp_path):
    path = tmp_path / "reward.json"
    known = {"checkpoint": "c" * 64, "temperature": 1.5, "sampling_temperature": 0.6}
    accuracy = metrics.Interval(0.8, 0.7, 0.9)
    reward_model.save_record(path, scores=[1.0, 2.0, 3.0, 6.0], accuracy=accuracy, **known)
    expected = {"mean": 3.0, "std": pytest.approx(np.sqrt(3.5)), "accuracy": 0.8, "low": 0.7, "high": 0.9}
    assert json.loads(path.read_text()) == expected | known
    with pytest.raises(ValueError, match="gives all 3 samples the score 1.0"):
        reward_model.save_record(path, scores=[1.0] * 3, accuracy=accuracy, **known)
