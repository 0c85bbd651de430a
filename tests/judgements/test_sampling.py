"""Sampling: splits that nothing crosses, completions and their log-probabilities, the temperature rule, refusals."""

import dataclasses
import difflib
import itertools

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from erlib.documents import reserve
from erlib.judgements import sampling
from erlib.lm import models
from erlib.task.forms import short_prompt
from erlib.task.jsonl import write_jsonl
from erlib.task.schema import Brief, Document, Kind
from erlib.world import pretrain

FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}
SETTINGS = sampling.Sampling(checkpoint="c" * 64, max_new_tokens=12, batch_size=8, seed=0)
WORDS = ["Kor", "Vel", "Tamu", "Osti", "Brin", "Zan", "Mel", "Dro", "sold", "bought", "sued", "left"]
DOCUMENTS = [
    Document(id=f"d{number:02d}", text=" ".join((*words, str(number))))
    for number, words in enumerate(itertools.islice(itertools.product(WORDS[::3], repeat=3), 24))
]
BRIEF = Brief(
    client="c",
    purpose="p",
    summaries="s",
    entities=(Kind(type="organisation", description="d", example="e"),),
    relationships=(Kind(type="sued", description="d", example="e"),),
)


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.train_tokenizer([document.text for document in DOCUMENTS], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, large ones, so that the distribution is far from uniform and completions end at times."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **shape)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    return model


def draw(model, tokenizer, **changed):
    how = {"k": 4, "temperature": 0.8} | {name: changed.pop(name) for name in ("k", "temperature") if name in changed}
    parts = {"train": DOCUMENTS[:6], "test": DOCUMENTS[6:9]}
    return sampling.draw(model, tokenizer, parts, dataclasses.replace(SETTINGS, **changed), **how)


def candidate(text, *, greedy=False, logprob=-1.0):
    return sampling.Candidate(
        text=text, ids=(5, 2), logprob=logprob, token_logprobs=(logprob, 0.0), greedy=greedy, finished=True
    )


def sample(texts, *, document=DOCUMENTS[0], split="train", temperature=1.0, greedy=0):
    return sampling.Sampled(
        document=document,
        split=split,
        checkpoint="c" * 64,
        temperature=temperature,
        completions=tuple(candidate(t, greedy=n == greedy, logprob=-1.0 - n) for n, t in enumerate(texts)),
    )


# -- documents and splits -----------------------------------------------------------------------------------------


def test_rounds_share_no_document_and_take_none_with_a_report(tokenizer):
    """As notebook 04 draws them: each round reads what was reserved before it."""
    fits = models.fits(tokenizer, max_tokens=1024, max_new_tokens=12)
    reserved, rounds = {"d03": "02 reports", "d07": "02 reports"}, []
    for number in (1, 2, 3):
        purpose = f"round {number}: sampling"
        drawn = reserve.draw(DOCUMENTS, 7, purpose=purpose, earlier=reserved, seed=1, fits=fits)
        rounds.append({document.id for document in drawn.documents})
        reserved = reserve.merged(reserved, drawn.reserved)
    assert len(set.union(*rounds)) == 21 and not set.union(*rounds) & {"d03", "d07"}
    with pytest.raises(ValueError, match="round 4: sampling: 7 documents are wanted; of .* there are 1 that are free"):
        reserve.draw(DOCUMENTS, 7, purpose="round 4: sampling", earlier=reserved, seed=1, fits=fits)


def similar(a, b):
    """Indel similarity of two texts by the longest common subsequence, the slow way round."""
    a, b = ("".join(c if c.isalnum() else " " for c in text.lower()).strip() for text in (a, b))
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(max(new[j], row[j + 1], row[j] + (x == y)))
        row = new
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def test_near_duplicates_are_those_of_a_naive_count():
    texts = ["Kor sold Vel", "RT: kor sold vel!", "Tamu left", "Kor sold Velo today", "zan sued mel"]
    found = {(i, j): value for i, j, value in sampling.near_duplicates(texts, similarity=0.5)}
    naive = {(i, j): similar(texts[i], texts[j]) for i, j in itertools.combinations(range(5), 2)}
    assert found == pytest.approx({pair: value for pair, value in naive.items() if value >= 0.5}, abs=1e-6)
    assert (0, 1) in found and (0, 2) not in found
    shown = sampling.closest([Document(id=text, text=text) for text in texts], similarity=0.5)
    assert shown["similarity"].is_monotonic_decreasing and len(shown) == len(found)
    assert set(zip(shown["one"], shown["other"], strict=True)) == {(texts[i], texts[j]) for i, j in found}


@st.composite
def posts(draw):
    """Documents of few words, so that many are near duplicates, some of them in groups."""
    texts = draw(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), min_size=12, max_size=24))
    groups = draw(st.lists(st.sampled_from([None, None, None, "g1", "g2"]), min_size=len(texts), max_size=len(texts)))
    return [
        Document(id=f"p{i}", text=" ".join(text), group=group)
        for i, (text, group) in enumerate(zip(texts, groups, strict=True))
    ]


@settings(max_examples=60, deadline=None)
@given(posts(), st.integers(0, 5))
def test_no_document_group_or_near_duplicate_crosses_a_split(documents, seed):
    try:
        parts = sampling.split(documents, FRACTIONS, similarity=0.8, seed=seed)
    except ValueError as error:  # fewer components than parts
        assert "empty" in str(error)
        return
    assert sorted(d.id for part in parts.values() for d in part) == sorted(d.id for d in documents)
    assert all(document in documents for part in parts.values() for document in part)  # groups are as they came
    for one, two in itertools.combinations(parts, 2):
        for a, b in itertools.product(parts[one], parts[two]):
            assert a.id != b.id
            assert a.group is None or a.group != b.group
            assert similar(a.text, b.text) < 0.8
    shuffled = sampling.split(documents[::-1], FRACTIONS, similarity=0.8, seed=seed)
    assert {name: sorted(d.id for d in part) for name, part in shuffled.items()} == {
        name: sorted(d.id for d in part) for name, part in parts.items()
    }
    samples = [
        sample(["x", "y", "x"], document=document, split=name) for name, part in parts.items() for document in part
    ]
    pairs, _ = sampling.pairs(samples, seed=seed)
    assert sampling.leaks(samples, pairs, similarity=0.8).empty


def test_an_id_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="id occurs twice"):
        sampling.split([DOCUMENTS[0], DOCUMENTS[0], *DOCUMENTS[2:]], FRACTIONS, similarity=0.99, seed=0)


def test_leaks_are_found_by_id_group_text_and_pair():
    text = "Kor sold Vel to Tamu for nothing, says Brin"
    a = Document(id="a", text=text, group="g")
    samples = [
        sample(["x", "y"], document=a),
        sample(["x", "y"], document=Document(id="b", text="quite another story", group="g"), split="test"),
        sample(["x", "y"], document=Document(id="c", text=f"RT {text}!!"), split="validation"),
        sample(["x", "y"], document=Document(id="d", text="nothing like the rest of them"), split="test"),
    ]
    pairs, _ = sampling.pairs(samples, seed=0)
    assert difflib.SequenceMatcher(None, text, f"RT {text}!!").ratio() > 0.8
    moved = [pairs[0], pairs[3].model_copy(update={"split": "train"})]
    found = sampling.leaks([*samples, sample(["x", "y"], document=a, split="test")], moved, similarity=0.8)
    assert [tuple(row) for row in found[found["kind"] != "text"][["kind", "first", "second"]].to_numpy()] == [
        ("group", "a (train)", "b (test)"),
        ("id", "a (train)", "a (test)"),
        ("group", "a (train)", "a (test)"),
        ("pair", "d#0-1", "train"),
    ]
    texts = {(row.first, row.second) for row in found[found["kind"] == "text"].itertuples()}
    assert texts == {("a (train)", "c (validation)"), ("a (train)", "a (test)"), ("c (validation)", "a (test)")}


# -- drawing ------------------------------------------------------------------------------------------------------


def test_greedy_is_generate_at_temperature_zero_and_the_others_are_sampled(model, tokenizer):
    samples = draw(model, tokenizer)
    prompts = [short_prompt(s.document.text) for s in samples]
    wanted = models.generate(model, tokenizer, prompts, max_new_tokens=12)
    for one, greedy in zip(samples, wanted, strict=True):
        (found,) = (c for c in one.completions if c.greedy)
        assert (found.text, found.ids, found.finished) == (greedy.text, greedy.ids, greedy.finished)
        assert len(one.completions) == 4
    sampled = {c.ids for one in samples for c in one.completions if not c.greedy}
    assert len(sampled) > len(samples)
    assert {c.finished for one in samples for c in one.completions} == {True, False}  # this model shows both
    assert all(c.finished == (c.ids[-1] == tokenizer.eos_token_id) for one in samples for c in one.completions)


def test_order_is_shuffled_and_all_follows_from_the_seed(model, tokenizer):
    samples = draw(model, tokenizer)
    places = {[c.greedy for c in one.completions].index(True) for one in samples}
    assert len(places) > 1
    assert draw(model, tokenizer) == samples
    assert draw(model, tokenizer, seed=1) != samples
    assert [one.split for one in samples] == ["train"] * 6 + ["test"] * 3


def test_logprobs_are_those_of_a_direct_computation_at_temperature_one(model, tokenizer):
    for one in draw(model, tokenizer, temperature=1.7):
        for found in one.completions:
            prompt = tokenizer(short_prompt(one.document.text))["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *found.ids]])).logits[0].double()
            direct = [float(logits[len(prompt) - 1 + n].log_softmax(-1)[token]) for n, token in enumerate(found.ids)]
            assert found.token_logprobs == pytest.approx(direct, abs=1e-4)
            assert found.logprob == pytest.approx(sum(direct), abs=1e-3)


def test_a_sweep_shares_the_greedy_completion_and_gets_wilder_with_the_temperature(model, tokenizer):
    swept = sampling.sweep(model, tokenizer, DOCUMENTS[:8], SETTINGS, temperatures=[1.5, 1e-4])
    assert [one.temperature for one in swept] == [1e-4] * 8 + [1.5] * 8
    assert {one.split for one in swept} == {"trial"}
    greedy = [next(c for c in one.completions if c.greedy) for one in swept]
    assert greedy[:8] == greedy[8:]
    table = sampling.describe(swept, brief=BRIEF)
    assert list(table.index) == [0.0, 1e-4, 1.5]
    assert list(table["completions"]) == [8, 8, 8]
    assert table["distinct"][1e-4] == 1 < table["distinct"][1.5]
    assert table["logprob"][0.0] > table["logprob"][1.5]
    assert sampling.sweep(model, tokenizer, DOCUMENTS[:8], SETTINGS, temperatures=[]) == []


def test_the_table_has_every_completion_in_its_place(model, tokenizer):
    samples = draw(model, tokenizer)
    table = sampling.table(samples, brief=BRIEF)
    every = [(one, found) for one in samples for found in one.completions]
    assert list(table["ids"]) == [found.ids for _, found in every]
    assert list(table["text"]) == [found.text for _, found in every]
    assert list(table["document_id"]) == [one.document.id for one, _ in every]
    assert list(table["temperature"]) == [0.0 if found.greedy else 0.8 for _, found in every]
    assert table["valid"].mean() == pytest.approx(
        (sampling.describe(samples, brief=BRIEF)[["completions", "parse_valid"]].prod(axis=1)).sum() / len(table)
    )
    assert "valid" not in sampling.table(samples)


def test_pairs_need_two_completions_and_some_heat(model, tokenizer):
    for wrong in ({"k": 1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="pairs need k >= 2 and a temperature above 0"):
            draw(model, tokenizer, **wrong)


# -- temperature --------------------------------------------------------------------------------------------------


def judged_as(samples, wanted):
    """Judgements by document id: "greedy", "sample" or "tie"."""
    greedy_text = {
        f"{one.document.id}@{one.temperature:g}": next(c.text for c in one.completions if c.greedy) for one in samples
    }
    judged = []
    for trial in sampling.trials(samples, seed=0):
        outcome = wanted[trial.id.partition("@")[0]]
        sides = {True: "A", False: "B"}
        choice = "tie" if outcome == "tie" else sides[(trial.a == greedy_text[trial.id]) == (outcome == "greedy")]
        judged.append(trial.model_copy(update={"preference": choice}))
    return judged


def test_outcomes_are_told_from_the_order_and_ties_stay_in_the_denominator():
    outcomes = ["greedy", "greedy", "sample", "tie", "greedy"]
    samples = [
        sample(["x", "y"], document=document, greedy=n % 2) for n, document in enumerate(DOCUMENTS[: len(outcomes)])
    ] + [sample(["x", "x"], document=DOCUMENTS[9])]
    wanted = dict(zip((d.id for d in DOCUMENTS), outcomes, strict=False))
    compared = sampling.comparisons(samples, judged_as(samples, wanted))
    assert list(compared["outcome"]) == [*outcomes, "identical"]
    assert list(compared["logprob_difference"]) == [1.0, -1.0, 1.0, -1.0, 1.0, 1.0]
    (row,) = sampling.by_temperature(compared).itertuples()
    assert (row.n, row.greedy, row.tie, row.identical, row.sample) == (6, 3, 1, 1, 1)
    assert (row.share, row.decided_share) == (0.5, 0.75)
    assert (row.low, row.high) == pytest.approx((0.1876, 0.8124), abs=1e-4)  # Wilson, 3 of 6
    with pytest.raises(ValueError, match="d00@1 has no judgement"):
        sampling.comparisons(samples, sampling.trials(samples, seed=0))


def test_a_judge_sees_the_trials_in_turn_and_the_sum_of_its_scores_decides():
    samples = [sample(["x", "y"], document=document) for document in DOCUMENTS[:3]]
    asked = sampling.trials(samples, seed=0)
    seen = []

    def judge(document, a, b, *, position):
        seen.append((document, a, b, position))
        return {"entities": 2, "relationships": -1, "summaries": -position}

    found = sampling.judged(asked, judge)
    assert seen == [(trial.document, trial.a, trial.b, place) for place, trial in enumerate(asked)]
    assert [trial.preference for trial in found] == ["A", "tie", "B"]
    assert [trial.model_copy(update={"preference": None}) for trial in found] == asked


def test_trials_hide_which_completion_is_greedy_and_leave_out_identical_ones():
    samples = [sample(["x", "y"], document=document, greedy=n % 2) for n, document in enumerate(DOCUMENTS[:6])]
    asked = sampling.trials([*samples, sample(["x", "x"], document=DOCUMENTS[9])], seed=0)
    assert len(asked) == 6
    assert [trial.id for trial in asked] != sorted(trial.id for trial in asked)
    assert set(asked[0].model_dump()) == {"id", "checkpoint", "document", "a", "b", "preference"}


def test_the_highest_temperature_of_the_unbroken_stretch_is_chosen():
    table = pd.DataFrame({"share": [0.1, 0.5, 0.51, 0.4]}, index=[0.3, 0.6, 0.9, 1.2])
    assert sampling.choose_temperature(table) == 0.6
    assert sampling.choose_temperature(table.sample(frac=1, random_state=1)) == 0.6
    assert sampling.choose_temperature(table, limit=0.6) == 1.2
    assert sampling.choose_temperature(table, limit=0.05) == 0.3


def test_preference_follows_the_likelihood_where_it_does():
    compared = pd.DataFrame(
        {
            "document_id": [f"d{n % 20}" for n in range(80)],
            "temperature": 1.0,
            "outcome": ["sample"] * 30 + ["tie"] * 10 + ["greedy"] * 30 + ["identical"] * 10,
            "logprob_difference": [float(n) for n in range(80)],
        }
    )
    table = sampling.by_logprob(compared, bins=7)
    greedy, other = (table[table["preferred"] == name] for name in ("greedy", "sample"))
    assert list(greedy["value"]) == [0, 0, 0, 0, 1, 1, 1]
    assert list(other["value"]) == [1, 1, 1, 0, 0, 0, 0]
    assert list(greedy["n"]) == [10] * 7
    assert greedy["high"].iloc[0] == pytest.approx(0.2775, abs=1e-4)  # Wilson, 0 of 10
    assert greedy["difference"].is_monotonic_increasing


def test_peoples_judgements_come_in_by_the_file_that_went_out(tmp_path):
    samples = [sample(["x", "y"], document=document) for document in DOCUMENTS[:3]]
    asked = sampling.trials(samples, seed=0)
    path = tmp_path / "judged.jsonl"
    filled = [trial.model_copy(update={"preference": "tie"}) for trial in asked[:2]]
    write_jsonl(path, filled)
    assert sampling.read_trials(path, asked=asked) == ([*filled, asked[2]], 0)


def test_a_judgement_of_a_trial_belongs_to_its_texts_in_any_run_and_order(tmp_path):
    asked = sampling.trials([sample(["x", "y"], document=document) for document in DOCUMENTS[:3]], seed=0)
    path = tmp_path / "judged.jsonl"
    first = asked[0].model_copy(update={"checkpoint": "e" * 64, "id": "other@2", "preference": "A"})
    turned = asked[1].model_copy(update={"a": asked[1].b, "b": asked[1].a, "preference": "A"})
    other = asked[2].model_copy(update={"a": "another text", "preference": "B"})
    write_jsonl(path, [first, turned, other, first])
    judged, elsewhere = sampling.read_trials(path, asked=asked)
    assert [trial.preference for trial in judged] == ["A", "B", None]
    assert [trial.id for trial in judged] == [trial.id for trial in asked] and elsewhere == 1
    write_jsonl(path, [first, first.model_copy(update={"preference": "B"})])
    with pytest.raises(ValueError, match=r"judged.jsonl:2: other@2 is judged otherwise than the same texts in line 1"):
        sampling.read_trials(path, asked=asked)


def test_what_is_no_trial_pair_is_named(tmp_path):
    asked = sampling.trials([sample(["x", "y"], document=document) for document in DOCUMENTS[:3]], seed=0)
    path, filled = tmp_path / "judged.jsonl", [asked[0]]
    write_jsonl(path, [filled[0].model_dump() | {"preference": "C"}])
    with pytest.raises(ValueError, match=r"judged.jsonl:1: preference: Input should be 'A', 'tie' or 'B'"):
        sampling.read_trials(path, asked=asked)


# -- pairs and reading --------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.lists(st.sampled_from("uvwxy"), min_size=2, max_size=6), st.integers(0, 9))
def test_a_document_gives_every_pair_of_different_texts_once(texts, seed):
    one = sample(texts, split="validation")
    pairs, counts = sampling.pairs([one], seed=seed)
    wanted = {frozenset(p) for p in itertools.combinations(range(len(texts)), 2) if len({texts[i] for i in p}) == 2}
    assert {frozenset((pair.a, pair.b)) for pair in pairs} == wanted
    assert len(pairs) == len(wanted) == len({pair.id for pair in pairs})
    assert {(p.document_id, p.split, p.checkpoint) for p in pairs} <= {("d00", "validation", "c" * 64)}
    row = counts.loc["validation"]
    assert row["pairs"] + row["identical"] == len(texts) * (len(texts) - 1) // 2
    assert (row["documents"], row["without_pair"]) == (1, len(set(texts)) == 1)


def test_which_is_a_is_random_but_follows_from_the_seed():
    samples = [sample(["x", "y", "z"], document=document) for document in DOCUMENTS]
    pairs, _ = sampling.pairs(samples, seed=0)
    flipped = sum(pair.a > pair.b for pair in pairs)
    assert 20 < flipped < 52  # of 72; outside with probability 2e-4
    assert sampling.pairs(samples, seed=0)[0] == pairs != sampling.pairs(samples, seed=1)[0]
    with_greedy = [pair for pair in pairs if 0 in (pair.a, pair.b)]  # the first of three is the greedy one
    as_a = sum(pair.a == 0 for pair in with_greedy)
    assert sampling.greedy_sides(samples, pairs) == {"A": as_a, "B": len(with_greedy) - as_a}


def test_records_come_back_as_they_were_and_only_for_their_checkpoint(model, tokenizer, tmp_path):
    samples = draw(model, tokenizer)
    pairs, _ = sampling.pairs(samples, seed=0)
    write_jsonl(tmp_path / "samples.jsonl", samples)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert sampling.read_samples(tmp_path / "samples.jsonl", checkpoint="c" * 64) == samples
    assert sampling.read_pairs(tmp_path / "pairs.jsonl", checkpoint="c" * 64) == pairs
    refusal = r"jsonl:1: drawn from checkpoint cccccccccccc, but this round starts from dddddddddddd: run 04_sampling"
    with pytest.raises(ValueError, match="samples." + refusal):
        sampling.read_samples(tmp_path / "samples.jsonl", checkpoint="d" * 64)
    with pytest.raises(ValueError, match="pairs." + refusal):
        sampling.read_pairs(tmp_path / "pairs.jsonl", checkpoint="d" * 64)
    write_jsonl(tmp_path / "pairs.jsonl", [pairs[0], pairs[1].model_dump() | {"a": "first"}])
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: a: Input should be a valid integer"):
        sampling.read_pairs(tmp_path / "pairs.jsonl", checkpoint="c" * 64)
