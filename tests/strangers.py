"""Small checkpoints of other families: random weights, tokenizers of their kinds, written as a hub has them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from erlib.task.schema import Document, Entity, Report

NAMES = ["Korvex", "Velia", "Tamu", "Brinvex", "Ardox", "Mel"]
DOCUMENTS = [
    Document(id=f"d{n}", text=f"{name} Labs bought 17 pumps for $40M. 😀 <|im_end|> </s> <bos> {name} <|end|>")
    for n, name in enumerate(NAMES)
]
REPORTS = [
    Report(entities=(Entity(name=f"{name} Labs", type="organisation", summary="bought pumps"),)) for name in NAMES
]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe useful.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined %}"
    "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}{% endif %}"
)
HEADERS = (  # writes its own start token, and today's date
    "{{ bos_token }}{{ '<|start|>system<|head|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '<|eot|>' }}"
    "{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|head|>\\n\\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|head|>\\n\\n' }}{% endif %}"
)
TURNS = (  # refuses a system message
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
BARS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What is particular to a family: tokenizer, chat template, ends, configuration."""

    model_type: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None  # put before every text by the tokenizer
    pad: str | None = None
    byte_level: bool = True  # else as SentencePiece does: "▁" for a blank, bytes for what is unknown
    template: str | None = None
    turn_end: str | None = None  # what ends an answer, where it is not the end token
    config: dict = field(default_factory=dict)


FAMILIES = {
    "llama": Family(
        "llama", ("<|begin|>", "<|endoftext|>", "<|start|>", "<|head|>", "<|eot|>"), eos="<|endoftext|>",
        bos="<|begin|>", template=HEADERS, turn_end="<|eot|>",
    ),
    "qwen3": Family(
        "qwen3", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|endoftext|>", pad="<|endoftext|>",
        template=CHATML, turn_end="<|im_end|>", config={"tie_word_embeddings": True},
    ),
    "gemma3": Family(
        "gemma3_text", ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), eos="<eos>",
        bos="<bos>", pad="<pad>", byte_level=False, template=TURNS, turn_end="<end_of_turn>",
        config={
            "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 5.0, "tie_word_embeddings": True,
        },
    ),
    "mistral": Family(
        "mistral", ("<unk>", "<s>", "</s>"), eos="</s>", bos="<s>", byte_level=False, config={"sliding_window": 16},
    ),
    "phi3": Family(
        "phi3", ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>",
        pad="<|endoftext|>", template=BARS, turn_end="<|end|>",
    ),
}  # fmt: skip


def write(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint of a family: config, generation_config, weights and tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    family = FAMILIES[name]
    tokenizer = _tokenizer(family)
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in family.special}
    ends = [ids[token] for token in (family.eos, family.turn_end) if token]
    config = AutoConfig.for_model(
        family.model_type, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        bos_token_id=ids.get(family.bos), eos_token_id=ids[family.eos], pad_token_id=ids.get(family.pad),
        **family.config,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # far apart logits: no ties that rounding could decide
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(eos_token_id=ends, bos_token_id=ids.get(family.bos), do_sample=True)
    model.to(dtype).save_pretrained(folder)
    return folder


def _tokenizer(family: Family):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [document.text for document in DOCUMENTS] * 20
    made = Tokenizer(models.BPE(byte_fallback=not family.byte_level, unk_token=None if family.byte_level else "<unk>"))
    alphabet = []
    if family.byte_level:
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = [] if family.byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    special = [*family.special, *pieces]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    )
    if pieces:  # they were trained as special tokens, which they are not
        made = Tokenizer.from_str(_without_added(made.to_str(), set(pieces)))
    if family.bos:
        number = made.token_to_id(family.bos)
        made.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, number)]
        )
    names = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{name: token for name, token in names.items() if token},
        additional_special_tokens=[token for token in family.special if token not in names.values()],
    )
    tokenizer.chat_template = family.template
    return tokenizer


def _without_added(content: str, pieces: set[str]) -> str:
    import json

    found = json.loads(content)
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] not in pieces]
    return json.dumps(found)
