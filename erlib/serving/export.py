"""The folder that leaves the project: weights, tokenizer, how to ask, 4-bit settings, and a model card.

Plain transformers, vLLM and OpenVINO GenAI load it, each with a few lines that the card shows; `engines` does with what
`erlib.json` says. `bulk` and `python -m erlib serve` work on such folders.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erlib.chain.manifest import write_text

RECORD, NF4, CARD = "erlib.json", "nf4.json", "README.md"


class Settings(NamedTuple):
    """How the exported model is asked: `prompt` with `{text}`, and the text form of the report; sizes in tokens.

    `before` and `after` are the token ids around the prompt's (a start token, a chat template's own text), `ends` those
    that end an answer, `window` is the longest prompt, `weights` the fingerprint of the safetensors files.
    """

    prompt: str
    before: list[int]
    after: list[int]
    ends: list[int]
    form: str
    window: int
    max_new_tokens: int
    weights: str


def export(folder: Path, out: Path, *, prompt: str, window: int, max_new_tokens: int, card: str) -> Settings:
    """Write a merged checkpoint as a folder to be served; it appears complete or not at all.

    Where OpenVINO is installed and the model has a plain cache, its form lies in `openvino/`. Raises ValueError for
    anything but a merged checkpoint, for a prompt without `{text}`, and for a window that exceeds the context.
    """
    from transformers import AutoConfig, GenerationConfig

    from erlib.lm import models
    from erlib.lm.checkpoints import require_merged

    checkpoint = require_merged(folder)
    if "{text}" not in prompt:
        raise ValueError(f"the prompt has no place for the document, {{text}}: {prompt!r}")
    context = AutoConfig.from_pretrained(folder).max_position_embeddings
    if window + max_new_tokens > context:
        raise ValueError(f"window={window} and max_new_tokens={max_new_tokens} exceed the context of {context} tokens")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):  # never a pickle
            shutil.copyfile(file, temporary / file.name)
    tokenizer = models.load_tokenizer(folder)
    before, after, ends = map(list, (*models.frame(tokenizer), models.ends(tokenizer)))
    settings = Settings(prompt, before, after, ends, "compact", window, max_new_tokens, checkpoint)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(temporary)
    write_text(temporary / RECORD, json.dumps(settings._asdict(), ensure_ascii=False, indent=1) + "\n")
    write_text(temporary / NF4, json.dumps(models.nf4(models.saved_dtype(folder)).to_dict(), indent=1) + "\n")
    write_text(temporary / CARD, card)
    if importlib.util.find_spec("openvino"):
        from erlib.serving import openvino_ir

        if openvino_ir.convertible(temporary):
            openvino_ir.write(temporary, temporary / openvino_ir.FOLDER)
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)
    return settings


def read_settings(folder: Path) -> Settings:
    """Read how an exported model is asked; FileNotFoundError for another folder, ValueError for one of another time."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no exported model (no {RECORD}): phase 11 writes one, runs/<run>/model")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.keys() != set(Settings._fields):
        raise ValueError(f"{path} is of another version of erlib ({', '.join(found)}): run phase 11 again")
    return Settings(**found)


def publish(folder: Path, link: Path) -> None:
    """Let `link` name an exported folder; an older link is replaced, anything else there is an error."""
    if link.exists() and not link.is_symlink():
        raise FileExistsError(f"{link} is in the way: move it, the exported model is to be found there")
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
    temporary.replace(link)


def require_server() -> None:
    """Raise ModuleNotFoundError, which says how to install it, where transformers' server lacks a package."""
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if not importlib.util.find_spec(name)]:
        raise ModuleNotFoundError(f"{', '.join(missing)} not installed: pip install -c constraints.txt -e '.[serve]'")


def loaded_bytes(folder: Path) -> int:
    """Bytes of a model's weights on disk."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


# -- the card -----------------------------------------------------------------------------------------------------

_USE = """\
With transformers:

```python
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

settings = json.load(open("erlib.json"))
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".", dtype="auto")
prompt = settings["prompt"].replace("{text}", "Ada Morn now leads Brinvex Labs, a maker of heat pumps.")
ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
ids = torch.tensor([[*settings["before"], *ids, *settings["after"]]])
written = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
print(tokenizer.decode(written, skip_special_tokens=True))
```

With vLLM, on a GPU:

```python
import json

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

settings, tokenizer = json.load(open("erlib.json")), AutoTokenizer.from_pretrained(".")
llm = LLM(model=".", max_model_len=settings["window"] + settings["max_new_tokens"])
prompt = settings["prompt"].replace("{text}", "Ada Morn now leads Brinvex Labs, a maker of heat pumps.")
ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
ids = [*settings["before"], *ids, *settings["after"]]
greedy = SamplingParams(temperature=0.0, max_tokens=settings["max_new_tokens"], stop_token_ids=settings["ends"])
print(llm.generate([{"prompt_token_ids": ids}], greedy)[0].outputs[0].text)
```

With OpenVINO GenAI, fast on a CPU (the folder `openvino` is there where the export found it installed):

```python
import json

import numpy as np
import openvino
import openvino_genai
from transformers import AutoTokenizer

settings = json.load(open("erlib.json"))
tokenizer = AutoTokenizer.from_pretrained(".")
prompt = settings["prompt"].replace("{text}", "Ada Morn now leads Brinvex Labs, a maker of heat pumps.")
ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
ids = openvino.Tensor(np.array([[*settings["before"], *ids, *settings["after"]]]))
scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size = 1  # GB
pipeline = openvino_genai.ContinuousBatchingPipeline("openvino", scheduler, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
config = openvino_genai.GenerationConfig(max_new_tokens=settings["max_new_tokens"], do_sample=False)
config.eos_token_id, config.stop_token_ids = settings["ends"][0], set(settings["ends"])
written = pipeline.generate([ids], [config])[0].m_generation_ids[0]
print(tokenizer.decode(written, skip_special_tokens=True))
```

In 4 bits: `from_pretrained(".", quantization_config=BitsAndBytesConfig(**json.load(open("nf4.json"))))`.
Many documents: `python -m erlib extract documents.jsonl reports.jsonl --model .`
"""


def card(*, client: str, base: str, data: Sequence[str], manifests: Sequence[Mapping[str, Any]]) -> str:
    """Write the model card (Hugging Face's conventions) with the verdicts of the given phases as its evaluation."""
    simulated = any(manifest["simulated"] for manifest in manifests)
    tags = ["information-extraction", "entity-relationship-extraction", *(["synthetic"] if simulated else [])]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "license: apache-2.0",
        "language: en",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        "# Entities and relationships from short documents",
        "",
        f"A small LM that reads one noisy, short web document and writes the report that {client} wants, in lines: "
        "`Name|type|summary` for an entity, below it `>relationship|Target`, or `none`. It was made from "
        f"`{base}` by supervised fine-tuning on a frontier LM's reports and by preference rounds (`erlib`).",
        "",
        *(["**Simulated**: the documents, the frontier LM and the annotators come from erlib's embedded world.", ""]
          if simulated else []),
        "## Use",
        "",
        _USE,
        "## Training data",
        "",
        *(f"* {line}" for line in data),
        "",
        "## Evaluation",
        "",
        "From the manifests of the run, each phase's verdict as it came out:",
        "",
        "| phase | check | value | 95 % interval | target | outcome |",
        "|---|---|---|---|---|---|",
        *(_row(manifest["phase"], row) for manifest in manifests for row in manifest["verdict"]),
        "",
        "## Limits",
        "",
        "* It knows one client's brief; other kinds of entity it was taught to leave out.",
        "* It copies names from the document, yet may copy a wrong one: check that names occur there (erlib lists "
        "those that do not).",
        "* It learned from a frontier LM, faults included; preferences removed some of them.",
        *(["* Trained on an invented world: of no use on real text, and its figures say nothing about it."]
          if simulated else []),
        "* A document is data: text that gives orders may still mislead it.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(phase: str, row: Mapping[str, Any]) -> str:
    def number(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    interval = "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
    outcome = {"missed": "**missed**", None: ""}.get(row["outcome"], row["outcome"])
    cells = (phase, row["check"], number(row["value"]), interval, row["target"] or "", outcome)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
