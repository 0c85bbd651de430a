"""What training leaves on disk: adapters, logs, merged checkpoints with their fingerprint, 4-bit checkpoints."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from erlib.lm.models import EMBEDDED, ends, load, saved_dtype

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


# -- what a trainer leaves ----------------------------------------------------------------------------------------


def save_adapter(model: "PreTrainedModel", folder: Path) -> None:
    """Save an adapter with its modules in order: peft writes sets, which Python orders anew in each process."""
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save"):
        settings[name] = settings[name] and sorted(settings[name])
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def training_table(history: Sequence[dict]) -> "pd.DataFrame":
    """A trainer's log, one row per step (all entries of a step in one), without the timings, which differ by run."""
    import pandas as pd

    steps: dict[int, dict] = {}
    for entry in history:
        if "train_runtime" not in entry:  # the summary at the end
            kept = {key: value for key, value in entry.items() if not key.endswith(("_runtime", "_per_second"))}
            steps.setdefault(entry["step"], {}).update(kept)
    return pd.DataFrame([steps[step] for step in sorted(steps)])


# -- merged checkpoints -------------------------------------------------------------------------------------------

MERGE_RECORD = "merge.json"


def fingerprint(folder: Path) -> str:
    """sha256 over names and bytes of the safetensors files in a folder; raises FileNotFoundError when it has none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors weights")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def merge_adapter(
    base: str | Path,
    adapter: Path,
    out: Path,
    *,
    dtype: str = "auto",
    allow_download: bool = False,
    chat: bool = True,
) -> str:
    """Add a LoRA adapter to its base at full precision (fp32), save the sum in `dtype` with the tokenizer in `out`.

    By default that is the type of the base on disk. Gives the fingerprint. `out/merge.json`, written last, records
    where the weights come from; `require_merged` checks it.
    """
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig

    model, tokenizer = load(base, dtype="float32", device="cpu", allow_download=allow_download, chat=chat)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{base} is quantised: an adapter is merged into the full-precision base only")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    if dtype == "auto":
        dtype = saved_dtype(EMBEDDED if base == "embedded" else base, allow_download=allow_download)
    ended = [*ends(tokenizer)]  # whoever loads the checkpoint ends an answer where training did
    merged.generation_config = GenerationConfig(  # afresh: what a base has there may be refused when it is saved
        eos_token_id=ended if len(ended) > 1 else ended[0],
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    merged.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    folder = EMBEDDED if base == "embedded" else Path(base)
    origin = fingerprint(folder) if folder.is_dir() else str(base)
    record = {"merged": fingerprint(out), "base": origin, "adapter": fingerprint(adapter), "precision": dtype}
    (out / MERGE_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record["merged"]


def require_merged(folder: Path, *, expected: str | None = None) -> str:
    """Fingerprint of a merged checkpoint; raises ValueError for anything else, or for another than `expected`."""
    record = Path(folder) / MERGE_RECORD
    if not record.is_file():
        raise ValueError(f"{folder} is not a merged checkpoint (no {MERGE_RECORD}): take the folder that 03_sft wrote")
    stated, found = json.loads(record.read_text(encoding="utf-8"))["merged"], fingerprint(Path(folder))
    if found != stated:
        raise ValueError(f"{folder}: the weights changed after the merge ({found[:12]}, not {stated[:12]})")
    if expected not in (None, found):
        raise ValueError(f"{folder} is checkpoint {found[:12]}, not {expected[:12]}: use one 03_sft throughout")
    return found


# -- 4-bit checkpoints --------------------------------------------------------------------------------------------

QUANTISATION_RECORD = "quantisation.json"


class Quantised(NamedTuple):
    """What `quantise` wrote: the weights' fingerprint, that of the merged checkpoint, and bytes of weights of both."""

    quantised: str
    checkpoint: str
    method: str
    compute_dtype: str
    bytes: int
    checkpoint_bytes: int


def quantise(folder: Path, out: Path, *, compute_dtype: str = "auto", device: str = "auto") -> Quantised:
    """Write a merged checkpoint in 4-bit NF4 (QLoRA, 2305.14314) with its tokenizer to `out`, which `load` reads.

    Linear layers are packed, their scales quantised too, and computed in `compute_dtype`, by default the checkpoint's;
    embeddings, norms and output head keep that type. `out/quantisation.json`, written last, is the record that is
    given. Raises ValueError for anything but a merged checkpoint.
    """
    checkpoint = require_merged(folder)
    model, tokenizer = load(folder, dtype=compute_dtype, device=device, quantisation="nf4")
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size, before = (sum(file.stat().st_size for file in Path(f).glob("*.safetensors")) for f in (out, folder))
    computed = str(model.dtype).removeprefix("torch.")
    record = Quantised(fingerprint(out), checkpoint, "nf4", computed, size, before)
    (out / QUANTISATION_RECORD).write_text(json.dumps(record._asdict(), indent=1) + "\n", encoding="utf-8")
    return record
