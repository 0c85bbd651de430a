"""Train a tokenizer and a small Llama from scratch: how the embedded base model was made.

Where it departs from a textbook loop, because it must learn to copy names on one CPU thread within the hour:

1. Capitalised words never carry their leading space, so a name has the same tokens in a document and in its report.
2. Rows are never cut: a batch holds whole rows of about the same length, padded on the right.
3. Tokens outside the targets are in the loss with probability `prompt_loss_weight` (an unbiased estimate of weighting
   them), so that most of them need no logits.
4. Rows longer than `sequence_length` wait for the last `long_share` of the tokens: few-shot prompts, at little cost.
5. The weight matrices learn by Muon (Jordan et al. 2024, as in `torch.optim`), the rest by AdamW.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch

from erlib.chain import manifest
from erlib.lm import models
from erlib.task import metrics
from erlib.task.answers import parse_json
from erlib.task.forms import ask, parse_compact, to_compact, to_json
from erlib.task.schema import Parsed, Report

if TYPE_CHECKING:
    import pandas as pd
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Evaluate = Callable[["LlamaForCausalLM"], dict[str, float]]

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2
# One token per newline: a blank line is always the same two tokens, and no token spans the border of prompt and report.
_WORDS = r"\n|\p{N}|\p{Lu}\p{L}*| ?\p{Ll}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+?(?= ?\S)|[^\S\n]+|\p{L}+|\s"
FINISHED = "finished.json"  # written last: the settings' key and the log
_POOL = 2048  # rows sorted by length at a time
_TAIL = 0.22  # share of the tokens that are read at the lowest rates


@dataclass(frozen=True)
class Shape:
    """The Llama, in the names of `LlamaConfig`."""

    hidden_size: int = 192  # width: about 2 M parameters in all, so that a laptop trains it
    intermediate_size: int = 512  # of the feed-forward layers, 8/3 of the width as usual
    num_hidden_layers: int = 4  # two are not enough to copy names
    num_attention_heads: int = 6  # of 32 dimensions: faster on a CPU than eight of 24
    max_position_embeddings: int = 8192  # longer than any few-shot prompt; rotary positions have no weights


@dataclass(frozen=True)
class Batching:
    """Which rows and tokens a step sees."""

    sequence_length: int = 768  # tokens; longer rows wait for the end
    long_sequence_length: int = 6144  # tokens; as long as a few-shot prompt, and never exceeded
    long_share: float = 0.15  # of the tokens, at the end, may come in long rows
    batch_tokens: int = 2048  # a step: many small steps beat few large ones, copying sets in by steps
    prompt_loss_weight: float = 0.1  # of tokens outside reports: a little reading helps, most is noise


@dataclass(frozen=True)
class Optimisation:
    """Learning rates and precision."""

    learning_rate: float = 6e-3  # peak of Muon, for the weight matrices
    embedding_learning_rate: float = 2e-3  # peak of AdamW, for embeddings and norms
    warmup_share: float = 0.02  # of the tokens
    bf16: bool = True  # matrix products in bfloat16; weights stay in fp32


@dataclass(frozen=True)
class Bookkeeping:
    """What may differ when a run is resumed: it is in no key."""

    threads: int = 1  # CPU threads; two help only on a machine that does nothing else
    log_every: int = 50  # steps
    save_seconds: float = 120  # between two checkpoints
    evaluate_every: int = 1_000_000  # tokens


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 1536) -> "PreTrainedTokenizerFast":
    """Fit a lossless byte-level BPE that adds `<s>` and reads the text of a special token as plain text."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode(rows: list[dict], tokenizer: "PreTrainedTokenizerFast") -> list[tuple[list[int], list[bool]]]:
    """Encode rows `{"parts": [(text, is_target)]}` as `<s> parts </s>`: ids, and which of them are targets.

    The end token is a target when the last part is one.
    """
    texts = [text for row in rows for text, _ in row["parts"]]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    sequences = []
    for row in rows:
        ids, targets = [tokenizer.bos_token_id], [False]
        for _, is_target in row["parts"]:
            part = next(encoded)
            ids += part
            targets += [is_target] * len(part)
        sequences.append(([*ids, tokenizer.eos_token_id], [*targets, row["parts"][-1][1]]))
    return sequences


def batches(
    rows: Iterable[dict],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    tokens: int,
    batching: Batching,
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `(ids, in_loss)`, both `(B, T)`, until `tokens` have passed; the same arguments give the same batches.

    Raises ValueError for a row of more than `batching.long_sequence_length` tokens and when the rows run out.
    """
    longest = batching.long_sequence_length
    generator = torch.Generator().manual_seed(seed)
    source, waiting, seen = iter(rows), [], 0
    while seen < tokens:
        short = seen < tokens * (1 - batching.long_share)
        pool = [] if short else waiting[: _POOL // 2]
        waiting = waiting[len(pool) :]
        fresh = list(islice(source, _POOL - len(pool)))
        if not fresh:
            raise ValueError(f"the rows ran out after {seen:,} of {tokens:,} tokens; give an endless stream of rows")
        for ids, targets in encode(fresh, tokenizer):
            if len(ids) > longest:
                raise ValueError(f"a row has {len(ids)} tokens, more than long_sequence_length={longest}")
            (waiting if short and len(ids) > batching.sequence_length else pool).append((ids, targets))
        grouped = list(_by_length(pool, batching.batch_tokens))
        for index in torch.randperm(len(grouped), generator=generator).tolist():
            ids, targets, length = _pad(grouped[index], tokenizer.pad_token_id)
            sampled = torch.rand(ids.shape, generator=generator) < batching.prompt_loss_weight
            yield ids, (targets | sampled) & (torch.arange(ids.shape[1]) < length[:, None])
            seen += int(length.sum())
            if seen >= tokens:
                return


def _by_length(pool: list[tuple[list[int], list[bool]]], batch_tokens: int) -> Iterator[list]:
    """Cut the pool, sorted by length, into groups of at most `batch_tokens` tokens after padding."""
    group: list = []
    for sequence in sorted(pool, key=lambda sequence: len(sequence[0])):
        if group and len(sequence[0]) * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _pad(group: list[tuple[list[int], list[bool]]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-pad to `(ids (B, T), targets (B, T), length (B,))`; causal attention then needs no mask."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(ids) for ids, _ in group], batch_first=True, padding_value=pad)
    targets = pad_sequence([torch.tensor(targets) for _, targets in group], batch_first=True, padding_value=False)
    return ids, targets, torch.tensor([len(ids) for ids, _ in group])


def loss_at(model: "LlamaForCausalLM", ids: torch.Tensor, in_loss: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the tokens marked `in_loss` (B, T); logits exist only at the positions before them."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    chosen = in_loss[:, 1:]
    logits = model.lm_head(hidden[chosen])  # (N, vocabulary)
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][chosen])


def _attention(module, query, key, value, mask, *, scaling: float, **_) -> tuple[torch.Tensor, None]:
    """Causal attention in fp32 under a bf16 autocast: on a CPU its backward pass is about twice as fast."""
    with torch.autocast("cpu", enabled=False):
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), is_causal=True, scale=scaling
        )
    return mixed.transpose(1, 2).contiguous(), None


def new_model(tokenizer: "PreTrainedTokenizerFast", *, seed: int, **shape: int) -> "LlamaForCausalLM":
    """Make a Llama with random weights and tied embeddings; `shape` holds names of `LlamaConfig`."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("causal_fp32", _attention)
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **shape,
        )
    )


def train(
    rows: Iterable[dict],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    out: Path,
    tokens: int,
    shape: Shape = Shape(),
    batching: Batching = Batching(),
    optimisation: Optimisation = Optimisation(),
    bookkeeping: Bookkeeping = Bookkeeping(),
    evaluate: Evaluate | None = None,
    seed: int = 0,
) -> "pd.DataFrame":
    """Train on `tokens` real tokens (warm-up, then decay); fp32 weights and tokenizer end in `out`.

    Resumes from `out/checkpoint.pt` when killed: the same rows in the same order are needed and are read past. Raises
    ValueError where the checkpoint was made with other settings. A model that was finished with the same settings is
    kept. Returns the log, one row every `bookkeeping.log_every` steps, with the figures of `evaluate` where it was
    called; progress with the time left goes to `out/train.log`.
    """
    # 1. Is it finished, or begun?
    key = _key(tokenizer, tokens, shape, batching, optimisation, seed)
    if (kept := _finished(out, key)) is not None:
        return kept
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(bookkeeping.threads)
    model = new_model(tokenizer, seed=seed, **asdict(shape))
    optimizers = _optimizers(model, optimisation)
    state = _begun(out / "checkpoint.pt", key, model, optimizers)
    first, started_at = state["step"], (state["seconds"], state["tokens"])
    started = saved = time.monotonic() - state["seconds"]

    # 2. Read past what was read, then take a step per batch.
    model.train().set_attn_implementation("causal_fp32")
    for step, (ids, in_loss) in enumerate(batches(rows, tokenizer, tokens=tokens, batching=batching, seed=seed)):
        if step < first:
            continue
        if step == first and first:
            started = time.monotonic() - state["seconds"]  # reading past the consumed rows is not training time
        rate = _schedule(state["tokens"] / tokens, optimisation.warmup_share)
        state["losses"].append(_update(model, optimizers, ids, in_loss, rate=rate, bf16=optimisation.bf16))
        before = state["tokens"]
        state |= {"step": step + 1, "tokens": before + int((ids != tokenizer.pad_token_id).sum())}
        state["seconds"] = time.monotonic() - started

        # 3. Log, measure, save.
        due = (
            evaluate is not None
            and state["tokens"] // bookkeeping.evaluate_every > before // bookkeeping.evaluate_every
        )
        if (step + 1) % bookkeeping.log_every == 0 or due or state["tokens"] >= tokens:
            figures = {"loss": mean(state["losses"]), "learning_rate": optimisation.learning_rate * rate}
            figures |= _evaluated(model, evaluate) if due else {}
            state["log"].append({k: state[k] for k in ("step", "tokens", "seconds")} | figures)
            state["losses"] = []
            _progress(out / "train.log", state, tokens, started_at)
        if time.monotonic() - saved > bookkeeping.save_seconds:
            _save(out / "checkpoint.pt", state, model, optimizers)
            saved = time.monotonic()
    return _finish(out, state, model, tokenizer)


def _finished(out: Path, key: str) -> "pd.DataFrame | None":
    """The log of a run with that key that was finished in `out`; None where there is none."""
    import pandas as pd

    path = out / FINISHED
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"key": None}
    return pd.DataFrame(kept["log"]) if kept["key"] == key else None


def _finish(out: Path, state: dict, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast") -> "pd.DataFrame":
    """Save model, tokenizer and log, the key last, and remove the checkpoint."""
    import pandas as pd

    model.eval().set_attn_implementation("sdpa")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    manifest.write_text(out / FINISHED, json.dumps({"key": state["key"], "log": state["log"]}))
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return pd.DataFrame(state["log"])


def _key(
    tokenizer: "PreTrainedTokenizerFast",
    tokens: int,
    shape: Shape,
    batching: Batching,
    optimisation: Optimisation,
    seed: int,
) -> str:
    """Name of a training run: what has another one is never resumed. Positions have no weights and are left out."""
    settings = asdict(shape) | asdict(batching) | asdict(optimisation) | {"tokens": tokens, "seed": seed}
    del settings["max_position_embeddings"]
    text = json.dumps(settings, sort_keys=True) + tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(text.encode()).hexdigest()


def _update(
    model: "LlamaForCausalLM",
    optimizers: list[torch.optim.Optimizer],
    ids: torch.Tensor,
    in_loss: torch.Tensor,
    *,
    rate: float,
    bf16: bool,
) -> float:
    """One step on a batch `(ids, in_loss)`, both (B, T), at `rate` times the peak rates; gives the loss."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        loss = loss_at(model, ids, in_loss)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _optimizers(model: "LlamaForCausalLM", optimisation: Optimisation) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for embeddings and norms; each group keeps its peak rate as `peak`."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    known = set(map(id, inner))
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizers = [
        # An update of the size that AdamW's has, so that the two rates and the weight decay compare (2502.16982).
        torch.optim.Muon(inner, lr=optimisation.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            rest, lr=optimisation.embedding_learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        ),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def _schedule(progress: float, warmup: float) -> float:
    """Share of the peak rate at `progress` in 0..1: linear warm-up, cosine to 10 %, then linear to 2 % at the end.

    Most of what is learnt of relationships comes at low rates, so that the last `_TAIL` of the tokens have them.
    """
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    body = 1 - _TAIL
    if progress < body:
        return 0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (body - warmup))
    return 0.1 - 0.08 * min(1.0, (progress - body) / _TAIL)


def _evaluated(model: "LlamaForCausalLM", evaluate: Evaluate) -> dict[str, float]:
    model.eval()
    model.set_attn_implementation("sdpa")  # padding on the left and a cache need masks
    with torch.no_grad():
        figures = evaluate(model)
    model.train()
    model.set_attn_implementation("causal_fp32")
    return figures


def _progress(path: Path, state: dict, tokens: int, started_at: tuple[float, int]) -> None:
    row = state["log"][-1]
    rate = (row["tokens"] - started_at[1]) / max(row["seconds"] - started_at[0], 1e-9)
    left = (tokens - row["tokens"]) / rate / 60
    rest = " ".join(f"{k}={v:.4g}" for k, v in row.items() if k not in ("step", "tokens", "seconds"))
    with path.open("a", encoding="utf-8") as file:
        file.write(f"step {row['step']} tokens {row['tokens']:,}/{tokens:,} {rate:,.0f}/s {left:.1f} min left {rest}\n")


def _save(path: Path, state: dict, model: "LlamaForCausalLM", optimizers: list[torch.optim.Optimizer]) -> None:
    """Write a checkpoint so that a kill at any instant leaves the old one or the new one."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        saved = {"state": state, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        torch.save(saved, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _begun(path: Path, key: str, model: "LlamaForCausalLM", optimizers: list[torch.optim.Optimizer]) -> dict:
    """The state to go on from: a checkpoint's, which is loaded, or a new one; refuses one made with other settings."""
    if not path.exists():
        return {"key": key, "step": 0, "tokens": 0, "seconds": 0.0, "losses": [], "log": []}
    saved = torch.load(path, weights_only=True)
    if saved["state"]["key"] != key:
        raise ValueError(f"{path} belongs to a run with other settings or another tokenizer: remove it to start anew")
    model.load_state_dict(saved["model"])
    for optimizer, optimizer_state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return saved["state"]


# -- what the base model can do -----------------------------------------------------------------------------------


def read(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    documents: Sequence[str],
    *,
    shown: Sequence[tuple[str, Report]] = (),
    form: str = "compact",
    max_new_tokens: int = 512,
) -> list[Parsed]:
    """Extract from documents after `shown` examples `(document, report)` in that text form, without instructions."""
    write, parse = (to_json, parse_json) if form == "json" else (to_compact, parse_compact)
    before = "".join(f"{ask(text)}\n{write(report)}\n\n" for text, report in shown)
    asked = [f"{before}{ask(text)}\n" for text in documents]
    written = models.generate(model, tokenizer, asked, max_new_tokens=max_new_tokens)
    return [parse(completion.text, document=text) for completion, text in zip(written, documents, strict=True)]


def by_form(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    documents: Sequence[str],
    reports: Sequence[Report],
    *,
    shown: Sequence[tuple[str, Report]],
) -> "pd.DataFrame":
    """What `read` gets right of documents in both text forms, without examples and after those `shown`.

    Columns form, examples, entity F1, relationship F1, parse-valid, grounded (rates).
    """
    import pandas as pd

    rows = []
    for form in ("compact", "json"):
        for examples in (shown[:0], shown):
            found = read(model, tokenizer, documents, shown=examples, form=form)
            scores = metrics.score(reports, [parsed.report for parsed in found], None)
            rates = metrics.parse_rate(found), metrics.grounded_rate(found)
            rows.append((form, len(examples), scores.entity_f1, scores.relationship_f1, *rates))
    columns = ["form", "examples", "entity F1", "relationship F1", "parse-valid", "grounded"]
    return pd.DataFrame(rows, columns=columns)


def card(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    table: "pd.DataFrame",
    *,
    documents: int,
    tokens: int,
    exposure: float,
    world_seed: int,
    minutes: float,
    threads: int,
    command: str,
) -> str:
    """The model card, with the figures of `by_form` on that many documents."""
    figures = [
        f"| {row.form}, after {row.examples} examples | {row.entity_f1:.2f} entities, {row.relationship_f1:.2f} "
        "relationships |"
        for row in table.rename(columns=lambda name: name.replace(" ", "_").replace("-", "_").lower()).itertuples()
    ]
    return CARD.format(
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        figures="\n".join(figures),
        documents=documents,
        tokens=tokens,
        exposure=exposure,
        world_seed=world_seed,
        minutes=minutes,
        threads=threads,
        command=command,
    )


def reader(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[str], reports: Sequence[Report]) -> Evaluate:
    """Make an `evaluate` for `train`: exact-match F1 against generic reports, and the share of grounded outputs."""

    def evaluate(model: "LlamaForCausalLM") -> dict[str, float]:
        found = read(model, tokenizer, documents)
        scores = metrics.score(reports, [parsed.report for parsed in found], None)
        grounded = metrics.grounded_rate(found)
        return {"entity_f1": scores.entity_f1, "relationship_f1": scores.relationship_f1, "grounded": grounded}

    return evaluate


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
tags: [information-extraction, synthetic]
---

# The embedded base model

A Llama of {parameters:,} parameters, trained from scratch on {tokens:,} tokens of the synthetic posts of `erlib`, so
that the recipe runs on a laptop without a download. It is a *generic* reader: after `Document:` and `Report:` it writes
every entity, relationship and fact that it sees, in the JSON or the line form. It knows no client's brief, and
it has read {exposure:.0%} of the phrasings of the embedded world. It is of no use on real text.

| measured on {documents} documents with unseen names | F1 |
|---|---|
{figures}

Training data: `curriculum.rows(World(seed={world_seed}))`; no text from elsewhere. Tokenizer: byte-level BPE of
{vocabulary:,} tokens, fitted on the same stream. Time: {minutes:.0f} minutes on {threads} CPU threads.

```bash
{command}
```
"""
