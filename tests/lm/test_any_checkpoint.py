"""Checkpoints of other families: prompts, sampling, SFT, merge, rewards, PPO, 4 bits, export, in fp32 and bf16."""

import numpy as np
import pytest
import strangers
import torch
import yaml
from strangers import DOCUMENTS, FAMILIES, REPORTS

from erlib.judgements import sampling
from erlib.judgements.annotation import Preference
from erlib.lm import models, sft
from erlib.lm.checkpoints import merge_adapter, quantise, require_merged
from erlib.policy import ppo
from erlib.policy.multiadapter import RewardModel
from erlib.rewards import reward_model
from erlib.serving import engines, export
from erlib.task.forms import short_prompt, to_compact
from erlib.task.schema import Brief


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("strangers")
    return {name: strangers.write(name, made / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: models.load(folder) for name, folder in folders.items()}


@pytest.fixture
def brief():
    with open("params/brief.yml", encoding="utf-8") as file:
        return Brief.model_validate(yaml.safe_load(file))


# -- prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_framed_once_and_what_looks_like_a_special_token_in_it_is_text(loaded, name):
    _, tokenizer = loaded[name]
    family, text = FAMILIES[name], short_prompt(DOCUMENTS[0].text)
    ids = models.encode_prompt(tokenizer, text)
    before, after = models.frame(tokenizer)
    assert ids[: len(before)] == list(before) and ids[len(ids) - len(after) :] == list(after)
    inside = ids[len(before) : len(ids) - len(after)]
    assert tokenizer.decode(inside) == text
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert not special & set(inside)
    starts = ids.count(tokenizer.bos_token_id) if family.bos else 0
    assert starts == (1 if family.bos else 0)
    assert bool(after) == bool(family.template)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ends_are_those_of_the_model_and_the_first_is_what_its_template_writes(loaded, name):
    model, tokenizer = loaded[name]
    family = FAMILIES[name]
    assert set(models.ends(tokenizer)) == set(model.generation_config.eos_token_id)
    assert models.ends(tokenizer)[0] == tokenizer.convert_tokens_to_ids(family.turn_end or family.eos)
    assert models.encode_completion(tokenizer, "a|b")[-1] == models.ends(tokenizer)[0]
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.template])
def test_without_chat_the_prompt_is_bare_text_and_the_choice_is_kept(folders, tmp_path, name):
    tokenizer = models.load_tokenizer(folders[name], chat=False)
    before, after = models.frame(tokenizer)
    assert len(before) <= 1 and after == ()
    assert models.ends(tokenizer)[0] == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folders[name] / "config.json").read_text())
    assert models.frame(models.load_tokenizer(tmp_path)) == (before, after)


@pytest.mark.parametrize("name", FAMILIES)
def test_messages_go_in_whole_also_where_the_template_refuses_a_system_message(loaded, name):
    _, tokenizer = loaded[name]
    messages = [{"role": "system", "content": "List what you see."}, {"role": "user", "content": "Velia <eos> 17"}]
    ids = models.encode_messages(tokenizer, messages)
    text = tokenizer.decode(ids)
    assert text.index("List what you see.") < text.index("Velia <eos> 17")
    if "<eos>" in FAMILIES[name].special:
        assert tokenizer.convert_tokens_to_ids("<eos>") not in ids


def test_the_day_in_a_template_is_always_the_same(loaded):
    _, tokenizer = loaded["llama"]
    assert "Today: 26 Jul 2024" in tokenizer.decode(models.frame(tokenizer)[0])


# -- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_that_of_transformers_alone_and_in_batches(loaded, name):
    model, tokenizer = loaded[name]
    prompts = [short_prompt(document.text[:n]) for document, n in zip(DOCUMENTS, (70, 20, 45), strict=False)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([models.encode_prompt(tokenizer, prompt)])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        wanted.append(written[0, ids.shape[1] :].tolist())
    for size in (1, 3):
        found = models.generate(model, tokenizer, prompts, max_new_tokens=20, batch_size=size)
        assert [list(completion.ids) for completion in found] == wanted
    again = models.completion_logprobs(model, tokenizer, prompts, [list(completion.ids) for completion in found])
    for completion, logprobs in zip(found, again, strict=True):
        assert torch.allclose(torch.tensor(completion.logprobs), logprobs, atol=1e-3)


# -- the whole way --------------------------------------------------------------------------------------------------


def preferences(samples, checkpoint):
    """Preferences between the completions of each document: the shorter one is better."""
    found = []
    for sample in samples:
        a, b = sample.completions[:2]
        if a.ids == b.ids:
            continue
        sign = 1.0 if len(a.text) < len(b.text) else -1.0
        side = "A" if sign > 0 else "B"
        aspects = dict.fromkeys(reward_model.ASPECTS, sign)
        common = {"pair_id": sample.document.id, "document_id": sample.document.id, "split": "train"}
        texts = {"prompt": short_prompt(sample.document.text), "a": a.text, "b": b.text, "a_ids": a.ids, "b_ids": b.ids}
        votes = {"preference": side, "score": sign, "votes": (side,), "aspects": aspects}
        found.append(Preference(**common, **texts, **votes, checkpoint=checkpoint))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in FAMILIES), ("qwen3", "bfloat16"), ("gemma3", "bfloat16")]
)
def test_it_goes_the_whole_way(folders, tmp_path, brief, name, dtype):
    # SFT, and the merge in the precision of the run.
    model, tokenizer = models.load(folders[name], dtype=dtype)
    own = sft.rows(DOCUMENTS, REPORTS)
    rows = sft.encode(own, tokenizer, max_tokens=400).rows
    before = np.mean(sft.loss_per_row(model, tokenizer, own, batch_size=3))
    training = sft.Training(epochs=30, batch_size=3, learning_rate=1e-2, lora_rank=8, points=1)
    where = {"out": tmp_path / "adapter", "checkpoints": tmp_path / "checkpoints"}
    log = sft.train(model, tokenizer, rows, validation=[], harness=lambda _: {}, training=training, **where)
    assert log["loss"].dropna().iloc[-1] < before / 2
    merged = tmp_path / "merged"
    checkpoint = merge_adapter(folders[name], tmp_path / "adapter", merged, dtype=dtype)
    start, tokenizer = models.load(merged)
    assert str(start.dtype) == f"torch.{dtype}" and require_merged(merged) == checkpoint
    assert set(models.ends(tokenizer)) == set(models.ends(models.load_tokenizer(folders[name])))
    near = sft.apart(model, start, tokenizer, own, batch_size=3, seed=0)
    assert near.value < (1e-3 if dtype == "float32" else 0.2)

    # It writes the reports that it learnt, in the engine that serves it, too.
    written = sft.extract(start, tokenizer, DOCUMENTS, brief=brief, max_new_tokens=40, batch_size=3)
    after = np.mean(sft.loss_per_row(start, tokenizer, own, batch_size=3))
    assert after < before / 2
    settings = export.export(
        merged, tmp_path / "model", prompt=short_prompt("{text}"), window=200, max_new_tokens=40, card="# a card"
    )
    engine = engines.open_engine(tmp_path / "model", engine="transformers", batch_size=2)
    served = {one.index: one for one in engines.extract(engine, DOCUMENTS, brief=brief)}
    if dtype == "float32":
        assert [served[n].parsed.report for n in range(len(DOCUMENTS))] == [parsed.report for parsed in written]
    framed = [*settings.before, *tokenizer(short_prompt("x"), add_special_tokens=False)["input_ids"], *settings.after]
    assert framed == models.encode_prompt(tokenizer, short_prompt("x"))

    # Samples, a reward model on them, a step of PPO with all its invariants.
    drawing = sampling.Sampling(checkpoint=checkpoint, max_new_tokens=24, batch_size=4)
    samples = sampling.draw(start, tokenizer, {"train": DOCUMENTS}, drawing, k=4, temperature=1.5)
    pairs = reward_model.encode(preferences(samples, checkpoint), tokenizer, max_tokens=400)
    reward_model.train(
        merged, pairs.rows, reward_model.Training(batch_size=3, lora_rank=4, lora_alpha=8), out=tmp_path / "reward"
    )
    scorer, _ = reward_model.load(merged, tmp_path / "reward")
    prompts = [short_prompt(document.text) for document in DOCUMENTS]
    texts = [(short_prompt(each.document.text), list(one.ids)) for each in samples for one in each.completions]
    scores = reward_model.score(scorer, tokenizer, *map(list, zip(*texts, strict=True)))
    assert np.isfinite(scores).all() and scores.std() > 0
    reward = RewardModel(tmp_path / "reward", float(scores.mean()), float(scores.std()), scores, 1.0)
    trained = ppo.train(
        models.load(merged)[0],
        tokenizer,
        prompts,
        reward=reward,
        out=tmp_path / "policy",
        checkpoints=tmp_path / "ppo",
        harness=lambda _: {},
        settings=ppo.Settings(
            steps=2,
            sampling=ppo.Sampling(prompts_per_step=4, samples=2, max_new_tokens=24),
            update=ppo.Update(learning_rate=1e-4, mini_batch_size=2, warmup_steps=1),
            adapter=ppo.Adapter(lora_rank=4, lora_alpha=8, gradient_checkpointing=dtype == "bfloat16"),
        ),
    )
    assert len(trained.log) == 3 and trained.log["eos_rate"].sum() > 0
    merge_adapter(merged, tmp_path / "policy", tmp_path / "merged-2", dtype=dtype)

    # 4 bits.
    quantise(tmp_path / "merged-2", tmp_path / "nf4")
    packed, its_tokenizer = models.load(tmp_path / "nf4")
    assert packed.is_loaded_in_4bit
    assert len(models.generate(packed, its_tokenizer, prompts, max_new_tokens=8)) == len(prompts)


@pytest.mark.slow
def test_dpo_and_rloo_train_a_chat_model_whose_padding_is_its_end_token(folders, tmp_path):
    from erlib.policy import alternatives

    tokenizer = models.load_tokenizer(folders["qwen3"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    prompts = [short_prompt(document.text) for document in DOCUMENTS[:4]]
    rows = []
    for prompt, a, b in zip(prompts, REPORTS, REPORTS[1:], strict=False):
        ids = [models.encode_completion(tokenizer, to_compact(report)) for report in (a, b)]
        rows.append(
            {"prompt_ids": models.encode_prompt(tokenizer, prompt), "chosen_ids": ids[0], "rejected_ids": ids[1]}
        )
    tuning = alternatives.Tuning(learning_rate=1e-3, lora_rank=4, points=1)
    learnt = alternatives.dpo(
        models.load(folders["qwen3"])[0], tokenizer, rows,
        out=tmp_path / "dpo", settings=alternatives.DPO(batch_size=2), tuning=tuning,
    )  # fmt: skip
    assert learnt.log["loss"].iloc[0] == pytest.approx(0.693, abs=0.01) and learnt.adapters

    seen = []

    def score(asked, completions):
        seen.extend(zip(asked, map(tuple, completions), strict=True))
        return np.array([float(len(ids)) for ids in completions])

    settings = alternatives.RLOO(max_new_tokens=8, prompts_per_step=2, samples=2, temperature=1.5)
    ran = alternatives.rloo(
        models.load(folders["qwen3"])[0], tokenizer, prompts, score,
        out=tmp_path / "rloo", settings=settings, tuning=tuning,
    )  # fmt: skip
    assert ran.tokens == sum(len(ids) for _, ids in seen) and {prompt for prompt, _ in seen} == set(prompts)
