"""A GGUF file is read as the LM that it was made of: weights, tokenizer, chat template, ends."""

import json
from pathlib import Path

import numpy as np
import pytest
import strangers
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from erlib.lm import gguf, models
from erlib.lm.checkpoints import merge_adapter

writing = pytest.importorskip("gguf")

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS, KV_HEADS, CONTEXT = 4, 2, 128
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp orders them: pairs of a rotation beside each other."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: torch.nn.Module, tokenizer) -> None:
    file = writing.GGUFWriter(path, "llama")
    file.add_context_length(CONTEXT)
    file.add_embedding_length(SHAPE["hidden_size"])
    file.add_feed_forward_length(SHAPE["intermediate_size"])
    file.add_block_count(SHAPE["num_hidden_layers"])
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV_HEADS)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(10_000.0)
    file.add_vocab_size(len(tokenizer))
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(tokens)
    file.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    file.add_token_merges([" ".join(merge) for merge in parts["merges"]])
    file.add_eos_token_id(tokenizer.eos_token_id)
    file.add_pad_token_id(tokenizer.pad_token_id)
    file.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        where = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        if where[0] == "layers":
            for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
                values = interleaved(values, heads) if part in name else values
            file.add_tensor(f"blk.{where[1]}.{NAMES[where[2]]}.weight", np.ascontiguousarray(values))
        else:
            plain = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[where[0]]
            file.add_tensor(f"{plain}.weight", values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = models.load_tokenizer(strangers.write("qwen3", folder / "tokens"))
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, vocab_size=len(tokenizer), num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    write(folder / "small.gguf", model, tokenizer)
    return folder / "small.gguf", model, tokenizer


def test_it_is_the_lm_that_it_was_made_of(made):
    path, original, tokenizer = made
    model, found = models.load(path, dtype="float32")
    texts = ["Korvex Labs bought 17 pumps. 😀", "<|im_end|> is text"]
    for text in texts:
        assert models.encode_prompt(found, text) == models.encode_prompt(tokenizer, text)
    assert models.ends(found) == models.ends(tokenizer)
    ids = torch.tensor([models.encode_prompt(found, texts[0])])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-4)


def test_it_becomes_a_folder_that_everything_reads(made, tmp_path):
    path, original, _ = made
    gguf.convert(path, tmp_path / "folder", dtype="float32")
    model, tokenizer = models.load(tmp_path / "folder")
    prompts = ["Velia Labs", "Tamu"]
    wanted = models.generate(*models.load(path, dtype="float32"), prompts, max_new_tokens=8)
    assert models.generate(model, tokenizer, prompts, max_new_tokens=8) == wanted
    assert not list(tmp_path.glob("*.part"))


def test_an_adapter_is_merged_into_it(made, tmp_path):
    from peft import LoraConfig, get_peft_model

    path, _, _ = made
    model, _ = models.load(path, dtype="float32")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["base"] == str(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is not there: name a .gguf file"), (b"GGUF\x03\x00", "is no whole GGUF file"), (b"", "no whole")],
)
def test_what_is_no_gguf_file_is_an_error_that_names_it(tmp_path, content, said):
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        models.load(path)
