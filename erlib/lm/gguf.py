"""GGUF files: one file with weights (unpacked to full numbers), tokenizer and chat template, as llama.cpp keeps them.

The package `gguf` is needed: `pip install -c constraints.txt -e '.[gguf]'`.
"""

import shutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTROL = 3  # the kind of a token that is no text, in `tokenizer.ggml.token_type`


def _fields(path: Path) -> dict[str, Any]:
    """The key-value fields of a file; FileNotFoundError, ModuleNotFoundError or ValueError say what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name a .gguf file, or a folder with config.json")
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} needs the package gguf: pip install -c constraints.txt -e '.[gguf]'"
        ) from None
    return _contents(GGUFReader, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _contents(reader: type, path: Path, _: int) -> dict[str, Any]:
    """What the fields of a file hold; kept, for reading its tokens takes seconds, and model and tokenizer need them."""
    try:
        fields = reader(path).fields
    except (ValueError, IndexError, KeyError) as error:  # cut off, or something else
        raise ValueError(f"{path} is no whole GGUF file: {error}; fetch it again") from None
    return {name: field.contents() for name, field in fields.items()}


def load_model(path: Path, *, dtype: torch.dtype) -> "PreTrainedModel":
    """Load the LM of a GGUF file, its weights unpacked to `dtype`, with the file's special tokens in its configs."""
    from transformers import AutoModelForCausalLM, GgufConfig

    fields = _fields(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),  # packed blocks could not be saved
        local_files_only=True,
    )
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        setattr(model.config, f"{name}_token_id", index)
        setattr(model.generation_config, f"{name}_token_id", index)
    return model


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a GGUF file with its chat template.

    A byte-level BPE that splits digits is put together here, for transformers' reader leaves the digits whole; others
    are left to that reader.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fields = _fields(path)
    if fields.get("tokenizer.ggml.pre") not in ("smollm", "gpt-2"):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}
    special = {
        f"{name}_token": tokens[index]
        for name, key in names.items()
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    control = [
        token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL
    ]
    made = _bpe(fields, digits=fields["tokenizer.ggml.pre"] == "smollm")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        **special,
        additional_special_tokens=[token for token in control if token not in special.values()],
        clean_up_tokenization_spaces=False,
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _bpe(fields: dict[str, Any], *, digits: bool):  # noqa: ANN202 - tokenizers.Tokenizer, imported here
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([single, pieces]) if digits else pieces
    made.decoder = decoders.ByteLevel()
    return made


def convert(path: Path, out: Path, *, dtype: str = "bfloat16") -> None:
    """Write a GGUF file as a folder of safetensors that everything reads; it appears complete or not at all."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    load_model(path, dtype=getattr(torch, dtype)).save_pretrained(part)
    load_tokenizer(path).save_pretrained(part)
    shutil.rmtree(out, ignore_errors=True)
    part.replace(out)


def main() -> None:
    """`python -m erlib.lm.gguf FILE.gguf FOLDER`: convert."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m erlib.lm.gguf FILE.gguf FOLDER")
    source, out = map(Path, sys.argv[1:])
    try:
        convert(source, out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from None
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
