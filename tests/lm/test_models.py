"""Local models: generation and log-probabilities against plain oracles, merging, the engine."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from erlib.lm import models
from erlib.lm.checkpoints import (
    MERGE_RECORD,
    QUANTISATION_RECORD,
    Quantised,
    fingerprint,
    merge_adapter,
    quantise,
    require_merged,
)
from erlib.reports import local
from erlib.task.forms import short_prompt
from erlib.task.schema import Document
from erlib.world import pretrain

TEXTS = [
    "Korvex bought Velia Labs for $40M.",
    "Who saw </s> that? <pad>",
    "Ann leads Tamu.\n\nnone",
    "a|b\n>leads|c 12",
]


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.train_tokenizer(TEXTS * 4, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    made = pretrain.new_model(
        tokenizer,
        seed=0,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,  # far apart logits: no ties that rounding could decide
    )
    return made.eval()


def plain_greedy(model, tokenizer, prompt, n):
    """Oracle: the whole sequence is read anew for each token, one prompt at a time."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:]


# -- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["", "Instructions of some length that all prompts share.\n"])
def test_greedy_equals_the_plain_loop_whatever_the_batch(model, tokenizer, shared):
    prompts = [shared + text for text in TEXTS]
    wanted = [plain_greedy(model, tokenizer, prompt, 24) for prompt in prompts]
    for batch_size in (1, 3, 8):
        found = models.generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=batch_size)
        assert [list(completion.ids) for completion in found] == wanted
        assert [completion.n_prompt_tokens for completion in found] == [len(tokenizer(p)["input_ids"]) for p in prompts]


def test_greedy_equals_transformers_generate(model, tokenizer):
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    output = model.generate(**batch, do_sample=False, max_new_tokens=16)[:, batch["input_ids"].shape[1] :].tolist()
    found = models.generate(model, tokenizer, TEXTS, max_new_tokens=16)
    for ours, theirs in zip(found, output, strict=True):
        assert list(ours.ids) == theirs[: len(ours.ids)]


def test_a_generation_config_of_the_model_changes_nothing(model, tokenizer):
    before = models.generate(model, tokenizer, TEXTS, max_new_tokens=8, temperature=1.0, seed=3)
    model.generation_config.update(top_k=1, repetition_penalty=9.0, min_new_tokens=8, do_sample=True)
    assert models.generate(model, tokenizer, TEXTS, max_new_tokens=8, temperature=1.0, seed=3) == before


def test_samples_depend_on_seed_and_position_not_on_the_batch(model, tokenizer):
    def sample(seed, batch_size):
        found = models.generate(
            model, tokenizer, TEXTS, max_new_tokens=12, temperature=0.8, seed=seed, batch_size=batch_size
        )
        return [completion.ids for completion in found]

    assert sample(1, 2) == sample(1, 4)
    assert sample(1, 4) != sample(2, 4)


def test_samples_follow_the_model_s_distribution(model, tokenizer):
    ids = tokenizer("Ann")["input_ids"]
    with torch.no_grad():
        wanted = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1] / 1.5, dim=-1)
    n = 4000
    found = models.generate(model, tokenizer, [ids] * n, max_new_tokens=1, temperature=1.5, seed=0, batch_size=n)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in found]), minlength=len(wanted))
    assert (counts / n - wanted).abs().max() < 4 * (0.25 / n) ** 0.5


class Scripted:
    """Stands in for a model: whatever it reads, it writes the given text and the end token."""

    def __init__(self, model, tokenizer, text):
        self.model, self.vocabulary = model, len(tokenizer)
        self.script = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        self.config, self.device, self.training = model.config, model.device, False

    def eval(self):
        self.step = -1

    def train(self, mode):
        pass

    def __call__(self, input_ids, **values):
        output = self.model(input_ids, **values)
        self.step += output.logits.shape[0] > 1 or self.step >= 0  # the common beginning is read on its own, first
        token = torch.full(output.logits.shape[:2], self.script[max(0, self.step)])
        output.logits = torch.nn.functional.one_hot(token, self.vocabulary).float()
        return output


@pytest.mark.parametrize(
    ("written", "text", "finished"),
    [
        ("a|b", "a|b", True),
        ("a|b\n\nDocument:\nmore", "a|b", True),
        ("\n\nx", "", True),
        ("12345678901234567890", "1234567890", False),
    ],
)
def test_stops_at_the_end_token_or_a_blank_line(model, tokenizer, written, text, finished):
    script = Scripted(model, tokenizer, written)
    found = models.generate(script, tokenizer, ["Korvex a", "Korvex b"], max_new_tokens=10, stop=(models.BLANK_LINE,))
    assert [(completion.text, completion.finished) for completion in found] == [(text, finished)] * 2


def test_too_long_a_prompt_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="prompt 1 has .* context of 256"):
        models.generate(model, tokenizer, ["a", "b " * 300], max_new_tokens=8)


def test_generation_restores_the_training_mode(model, tokenizer):
    model.train()
    models.generate(model, tokenizer, ["a"], max_new_tokens=1)
    assert model.training
    model.eval()


# -- text and tokens ----------------------------------------------------------------------------------------------


def test_special_tokens_in_a_document_stay_text(tokenizer):
    ids = models.encode_prompt(tokenizer, "say </s> and <pad> and <s>")
    assert tokenizer.eos_token_id not in ids and tokenizer.pad_token_id not in ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == "say </s> and <pad> and <s>"


def test_a_document_fits_where_its_prompt_and_the_longest_report_do(tokenizer):
    document = Document(id="d", text=TEXTS[0])
    prompt = len(models.encode_prompt(tokenizer, short_prompt(document.text)))
    assert models.fits(tokenizer, max_tokens=prompt + 20, max_new_tokens=20)(document)
    assert not models.fits(tokenizer, max_tokens=prompt + 19, max_new_tokens=20)(document)


def test_a_chat_template_becomes_special_tokens_but_contents_do_not(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}<s>"
    try:
        ids = models.encode_messages(tokenizer, [{"role": "user", "content": "stop </s> here"}])
    finally:
        tokenizer.chat_template = None
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (2, 1)
    assert tokenizer.decode(ids) == "<s>user\nstop </s> here</s>\n<s>"


# -- log-probabilities --------------------------------------------------------------------------------------------


@pytest.fixture
def ends_with_its_padding(model, tokenizer, tmp_path):
    """The model in a folder, with a tokenizer whose only special token is the end token: Qwen's are of this kind."""
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, pad_token=tokenizer.eos_token
    )
    model.save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    return tmp_path


def test_a_tokenizer_whose_padding_is_its_end_gives_what_another_padding_gives(model, tokenizer, ends_with_its_padding):
    loaded, bare = models.load(ends_with_its_padding)
    assert bare.pad_token_id == bare.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    encoded = [models.encode_prompt(tokenizer, text) for text in TEXTS]
    assert [models.encode_prompt(bare, text) for text in TEXTS] == encoded
    by_other = models.generate(model, tokenizer, TEXTS, max_new_tokens=12, batch_size=4)
    assert [each.ids for each in models.generate(loaded, bare, TEXTS, max_new_tokens=12, batch_size=4)] == [
        each.ids for each in by_other
    ]
    reports = ["none", "Korvex|firm", "a|b|c", ""]
    found = models.completion_logprobs(loaded, bare, TEXTS, reports, batch_size=4)
    for one, other in zip(
        found, models.completion_logprobs(model, tokenizer, TEXTS, reports, batch_size=4), strict=True
    ):
        assert torch.equal(one, other)
    assert all(
        len(each) == len(models.encode_completion(bare, text)) for each, text in zip(found, reports, strict=True)
    )


def test_log_probabilities_equal_a_plain_forward(model, tokenizer):
    prompts, answers = TEXTS[:3], ["none", "Korvex|organisation\n>leads|Tamu", "x"]
    found = models.completion_logprobs(model, tokenizer, prompts, answers, batch_size=2, temperature=0.7)
    for prompt, answer, logprobs in zip(prompts, answers, found, strict=True):
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        wanted = torch.log_softmax(logits / 0.7, dim=-1)[torch.arange(len(tail)), torch.tensor(tail)]
        torch.testing.assert_close(logprobs, wanted)


# -- merged checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture
def merged(model, tokenizer, tmp_path):
    """Folders of a base, an adapter with weights that matter, and their merge."""
    from peft import LoraConfig, get_peft_model

    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "merged"))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    copy, _ = models.load(base)
    torch.manual_seed(1)
    adapted = get_peft_model(copy, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(adapter)
    return base, adapter, out, adapted, merge_adapter(base, adapter, out)


def test_a_merge_gives_the_adapter_s_outputs(merged, tokenizer):
    base, _, out, adapted, stated = merged
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        wanted, found = adapted.eval()(input_ids=ids).logits, models.load(out)[0](input_ids=ids).logits
        unadapted = models.load(base)[0](input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (unadapted - wanted).abs().max() > 0.01
    assert require_merged(out) == stated == fingerprint(out)


def test_only_the_merged_checkpoint_is_accepted(merged):
    base, adapter, out, _, stated = merged
    for folder in (base, adapter):
        with pytest.raises(ValueError, match="not a merged checkpoint"):
            require_merged(folder)
    with pytest.raises(ValueError, match="use one 03_sft"):
        require_merged(out, expected="0" * 64)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="changed after the merge"):
        require_merged(out)


def test_a_quantised_base_is_refused(merged, tmp_path):
    base, adapter, *_ = merged
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ValueError, match="full-precision"):
        merge_adapter(base, adapter, tmp_path / "again")


# -- 4-bit checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Folders of a merged checkpoint whose linear layers are large enough to show in its size, and of its NF4 form."""
    folder = tmp_path_factory.mktemp("four-bit")
    tokenizer = pretrain.train_tokenizer(TEXTS * 4, vocab_size=300)
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = pretrain.new_model(tokenizer, seed=0, max_position_embeddings=256, initializer_range=0.1, **shape)
    model.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    record = {"merged": fingerprint(folder / "merged")}
    (folder / "merged" / MERGE_RECORD).write_text(json.dumps(record))
    return folder / "merged", folder / "nf4", quantise(folder / "merged", folder / "nf4")


def test_a_checkpoint_in_nf4_is_smaller_and_says_where_it_comes_from(quantised):
    merged, folder, record = quantised
    assert record.checkpoint == fingerprint(merged) and record.quantised == fingerprint(folder)
    assert (record.method, record.compute_dtype) == ("nf4", "float32")
    assert record.bytes == (folder / "model.safetensors").stat().st_size
    assert record.checkpoint_bytes == (merged / "model.safetensors").stat().st_size
    assert record.bytes < 0.35 * record.checkpoint_bytes
    assert Quantised(**json.loads((folder / QUANTISATION_RECORD).read_text())) == record


def test_the_saved_nf4_model_is_the_one_that_loading_in_nf4_makes(quantised):
    from bitsandbytes.nn import Linear4bit

    merged, folder, _ = quantised
    saved, tokenizer = models.load(folder)
    made, _ = models.load(merged, quantisation="nf4")
    layer = saved.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit) and layer.weight.quant_type == "nf4"
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(saved(input_ids=ids).logits, made(input_ids=ids).logits)
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        wanted = models.load(merged)[0].model.layers[0].mlp.up_proj(x)
        error = (layer(x) - wanted).norm() / wanted.norm()
    assert error == pytest.approx(0.09, abs=0.02)  # of normal weights in blocks of 64 (2305.14314)
    found = models.generate(saved, tokenizer, TEXTS, max_new_tokens=8)
    assert [list(completion.ids) for completion in found] == [plain_greedy(saved, tokenizer, t, 8) for t in TEXTS]


def test_an_nf4_checkpoint_is_no_start_for_training_and_only_a_merged_one_becomes_it(quantised, merged, tmp_path):
    _, folder, _ = quantised
    base, *_ = merged
    with pytest.raises(ValueError, match="not a merged checkpoint"):
        require_merged(folder)
    with pytest.raises(ValueError, match="not a merged checkpoint"):
        quantise(base, tmp_path / "nf4")


def test_a_missing_model_is_told_how_to_be_had(tmp_path):
    with pytest.raises(FileNotFoundError, match="allow_download"):
        models.load(tmp_path / "nothing")


# -- DSPy ---------------------------------------------------------------------------------------------------------


def test_the_engine_batches_concurrent_requests(model, tokenizer, monkeypatch):
    from dspy.lm15 import Config, Message, Request

    batches = []
    generate = models.generate
    monkeypatch.setattr(local, "generate", lambda *a, **k: batches.append(len(a[2])) or generate(*a, **k))
    engine = local.LocalEngine(model, tokenizer, wait_seconds=1.0)
    requests = [
        Request(model="local", messages=(Message.user(text),), system="Read.", config=Config(max_tokens=6))
        for text in TEXTS * 2
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        responses = list(pool.map(engine.complete, requests))
    assert sum(batches) == len(requests) and len(batches) <= 2
    prompts = [f"Read.\n\n{text}\n" for text in TEXTS]
    wanted = [c.text or " " for c in generate(model, tokenizer, prompts, max_new_tokens=6)]
    assert [response.message.parts[0].text for response in responses] == wanted * 2
    assert responses[0].usage.input_tokens == len(tokenizer(prompts[0])["input_ids"])


def test_an_error_reaches_every_caller_of_the_batch(model, tokenizer):
    from dspy.lm15 import Message, Request

    engine = local.LocalEngine(model, tokenizer, max_new_tokens=300, wait_seconds=0.1)
    with ThreadPoolExecutor(3) as pool:
        futures = [
            pool.submit(engine.complete, Request(model="local", messages=(Message.user(text),))) for text in TEXTS[:3]
        ]
        for future in futures:
            with pytest.raises(ValueError, match="context"):
                future.result(timeout=30)


def test_a_blank_line_does_not_end_an_answer_but_a_stop_of_the_request_does(model, tokenizer, monkeypatch):
    from dspy.lm15 import Config, Message, Request

    stops = []
    generate = models.generate
    monkeypatch.setattr(local, "generate", lambda *a, **k: stops.append(k["stop"]) or generate(*a, **k))
    engine = local.LocalEngine(model, tokenizer, max_new_tokens=2)
    for config in (Config(), Config(stop=("##",))):
        engine.complete(Request(model="local", messages=(Message.user("Korvex."),), config=config))
    assert stops == [(), ("##",)]


def test_the_engine_serves_dspy(model, tokenizer):
    import dspy

    lm = dspy.LM("local", engine=local.LocalEngine(model, tokenizer, max_new_tokens=4), cache=False)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        assert isinstance(lm("Korvex bought Velia.")[0], str)


def test_a_process_trains_on_one_device_however_many_it_sees(tmp_path):
    from trl import SFTConfig

    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert models.one_device(arguments).n_gpu == 0
    arguments._n_gpu = 4  # as where four GPUs are visible
    assert models.one_device(arguments).n_gpu == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_looking_seldom_at_which_rows_ended_changes_nothing(model, tokenizer, monkeypatch, temperature):
    asking = {"max_new_tokens": 24, "temperature": temperature, "seed": 5, "batch_size": 4, "stop": ("|",)}
    wanted = models.generate(model, tokenizer, TEXTS * 3, **asking)
    assert temperature == 0 or len({completion.n_new_tokens for completion in wanted}) > 2  # rows end here and there
    for every in (3, 24, 100):
        monkeypatch.setattr(models, "LOOK", {"cpu": every})
        found = models.generate(model, tokenizer, TEXTS * 3, **asking)
        assert [(c.text, c.ids, c.finished) for c in found] == [(c.text, c.ids, c.finished) for c in wanted]
