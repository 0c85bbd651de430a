"""Supervised fine-tuning: LoRA on the frontier's reports, prompted with the document and next to nothing else.

Rows are tokenised here and handed to `trl.SFTTrainer` ready-made, because its own preparation drops rows that it cuts
off and turns the text of special tokens in a document into those tokens.
"""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from erlib.lm import models
from erlib.lm.checkpoints import save_adapter, training_table
from erlib.task import evaluation, metrics
from erlib.task.forms import parse_compact, short_prompt, to_compact
from erlib.task.schema import Brief, Document, Exemplar, Parsed, Report

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

Harness = Callable[["PreTrainedModel"], dict[str, float]]


# -- rows ---------------------------------------------------------------------------------------------------------


def rows(documents: Sequence[Document], reports: Sequence[Report]) -> list[dict[str, str]]:
    """Training rows `id`, `prompt` (pared back) and `completion` (compact form) of documents and their reports."""
    return [
        {"id": document.id, "prompt": short_prompt(document.text), "completion": to_compact(report)}
        for document, report in zip(documents, reports, strict=True)
    ]


def mix(own: Sequence[dict[str, str]], others: Sequence[dict[str, str]], *, share: float, seed: int) -> list[dict]:
    """Own rows and random rows of another source, which then make up `share` (0 to below 1) of all, shuffled."""
    wanted = round(len(own) * share / (1 - share))
    if wanted > len(others):
        raise ValueError(f"a share of {share} needs {wanted} rows of the other source; it has {len(others)}")
    rng = random.Random(seed)
    mixed = [*own, *rng.sample(list(others), wanted)]
    rng.shuffle(mixed)
    return mixed


class Encoded(NamedTuple):
    """Rows `input_ids` and `labels` (-100 before the completion), the ids they come from, and the ids left out."""

    rows: list[dict[str, list[int]]]
    ids: list[str]
    too_long: list[str]


def encode(
    own: Sequence[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int, leave_out: bool = False
) -> Encoded:
    """Tokenise rows; the end token is part of the completion, and the text of a special token stays text.

    Rows of more than `max_tokens` tokens raise ValueError with their ids, or are listed and left out if `leave_out`.
    """
    kept, ids, too_long = [], [], []
    for row in own:
        prompt = models.encode_prompt(tokenizer, row["prompt"])
        completion = models.encode_completion(tokenizer, row["completion"])
        if len(prompt) + len(completion) > max_tokens:
            too_long.append(row["id"])
            continue
        kept.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
        ids.append(row["id"])
    if too_long and not leave_out:
        raise ValueError(
            f"{len(too_long)} rows have more than max_tokens={max_tokens} tokens: {', '.join(too_long[:10])}; "
            "raise the limit, or set leave_out to train without them"
        )
    return Encoded(kept, ids, too_long)


def loss_per_row(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", own: Sequence[dict[str, str]], *, batch_size: int
) -> list[float]:
    """Mean negative log-likelihood per completion token of each row, in nats: the regression check on other sources."""
    prompts, completions = [row["prompt"] for row in own], [row["completion"] for row in own]
    found = models.completion_logprobs(model, tokenizer, prompts, completions, batch_size=batch_size)
    return [-float(logprobs.mean()) for logprobs in found]


def apart(
    one: "PreTrainedModel",
    other: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    own: Sequence[dict[str, str]],
    *,
    batch_size: int,
    seed: int,
) -> metrics.Interval:
    """How far two models' log-probabilities of the same tokens lie apart: mean over rows of the mean |difference|.

    In nats per completion token: 0 but for rounding where the second is the first with its adapter merged.
    """
    prompts, completions = [row["prompt"] for row in own], [row["completion"] for row in own]
    found = [
        models.completion_logprobs(model, tokenizer, prompts, completions, batch_size=batch_size)
        for model in (one, other)
    ]
    gaps = [float((a - b).abs().mean()) for a, b in zip(*found, strict=True)]
    return metrics.bootstrap_mean(gaps, seed=seed)


# -- the gold harness ---------------------------------------------------------------------------------------------


def extract(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    *,
    brief: Brief,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
) -> list[Parsed]:
    """Greedy reports of documents under the pared-back prompt, parsed against document and brief.

    They end at an end token, as when the LM is served, or at a `stop`: an LM that is not trained yet goes on and on.
    """
    prompts = [short_prompt(document.text) for document in documents]
    written = models.generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, stop=stop
    )
    return [
        parse_compact(completion.text, brief=brief, document=document.text)
        for completion, document in zip(written, documents, strict=True)
    ]


def harness(
    tokenizer: "PreTrainedTokenizerBase",
    sets: Mapping[str, Sequence[Exemplar]],
    *,
    brief: Brief,
    **writing: Any,
) -> Harness:
    """A function of the model: `<set>_entity_f1`, `<set>_relationship_f1` and `<set>_parse_rate` of each gold set.

    `writing` is for `extract`.
    """

    def score(model: "PreTrainedModel") -> dict[str, float]:
        figures = {}
        for name, exemplars in sets.items():
            documents = [exemplar.document for exemplar in exemplars]
            with models.folded(model):
                parsed = extract(model, tokenizer, documents, brief=brief, **writing)
            scores = evaluation.evaluated(exemplars, parsed, brief).scores
            figures |= {
                f"{name}_entity_f1": scores.entity_f1,
                f"{name}_relationship_f1": scores.relationship_f1,
                f"{name}_parse_rate": metrics.parse_rate(parsed),
            }
        return figures

    return score


def gap_closed(base: metrics.Scores, tuned: metrics.Scores, frontier: metrics.Scores, *, seed: int) -> metrics.Interval:
    """(tuned - base) / (frontier - base) in entity F1, with its bootstrap interval over the same documents."""

    def share(sums: np.ndarray) -> np.ndarray:  # (..., 9) summed counts of the three systems to (...)
        tp, fp, fn = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, 3), -1, 0)
        f1 = 2 * tp / np.maximum(1, 2 * tp + fp + fn)
        gap = f1[..., 2] - f1[..., 0]
        return np.where(gap > 0, (f1[..., 1] - f1[..., 0]) / np.where(gap > 0, gap, 1), np.nan)

    rows = np.hstack([scores.entity_counts for scores in (base, tuned, frontier)])
    return metrics.bootstrap(rows, share, seed=seed)


# -- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How an adapter is trained."""

    epochs: int = 1  # the frontier's faults are learnt by heart in the second
    batch_size: int = 1  # rows a step: many small steps suit an LM of a few million parameters
    learning_rate: float = 2e-4  # peak; falls by a cosine. What is usual for LoRA on LMs of any size
    warmup_share: float = 0.05  # of the steps
    lora_rank: int = 64  # of every linear layer's adapter; its alpha is twice that. 16 is enough for 7 B parameters
    points: int = 3  # measurements with harness and validation loss, after the one before training
    gradient_checkpointing: bool = False  # activations are computed again: less memory for a third more time
    seed: int = 0  # of the adapter's first weights and of the order of rows


def train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    encoded: Sequence[dict[str, list[int]]],
    *,
    out: Path,
    checkpoints: Path,
    validation: Sequence[dict[str, list[int]]],
    harness: Harness,
    training: Training = Training(),
) -> "pd.DataFrame":
    """Train a LoRA adapter on encoded rows, completion tokens only, and save it in `out`.

    `model` carries the adapter afterwards. Validation loss and harness are taken at step 0 and at `training.points`
    equal distances. A killed run goes on from its last valid checkpoint under `checkpoints`, bit for bit on a CPU.
    Returns the log: one row per logged step, with `step`, `loss`, `eval_loss`, `learning_rate` and the harness's
    figures. Raises RuntimeError where rows were lost on the way.
    """
    folder = checkpoints / _key(model, encoded, asdict(training))
    steps = math.ceil(len(encoded) / training.batch_size) * training.epochs
    every = math.ceil(steps / training.points)
    trainer = _trainer(
        model, tokenizer, encoded, validation, folder=folder, every=every, steps=steps, training=training
    )
    _attach(trainer, harness, every, steps)
    trainer.train(resume_from_checkpoint=_last_valid(folder))
    if trainer.state.global_step != steps or len(trainer.train_dataset) != len(encoded):
        raise RuntimeError(f"{trainer.state.global_step} of {steps} steps were taken: rows were lost on the way")
    save_adapter(trainer.model, out)
    log = training_table(trainer.state.log_history)
    shutil.rmtree(folder)
    return log


def _key(model: "PreTrainedModel", encoded: Sequence[dict[str, list[int]]], settings: dict) -> str:
    """Name of a training run: another base, other rows or other settings never resume from its checkpoints."""
    digest = hashlib.sha256(json.dumps([settings, list(encoded)], sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item()!r}".encode())
    return digest.hexdigest()[:16]


def _trainer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    encoded: Sequence[dict[str, list[int]]],
    validation: Sequence[dict[str, list[int]]],
    *,
    folder: Path,
    every: int,
    steps: int,
    training: Training,
) -> "SFTTrainer":
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    models.seed_everything(training.seed)  # LoRA's weights are drawn before the trainer seeds anything
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=models.one_device(
            SFTConfig(
                output_dir=str(folder),
                num_train_epochs=training.epochs,
                per_device_train_batch_size=training.batch_size,
                learning_rate=training.learning_rate,
                warmup_steps=math.ceil(training.warmup_share * steps),
                bf16=model.dtype == torch.bfloat16,
                gradient_checkpointing=training.gradient_checkpointing,
                seed=training.seed,
                use_cpu=model.device.type == "cpu",
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                lr_scheduler_type="cosine",
                train_sampling_strategy="group_by_length",  # less padding
                logging_steps=max(1, every // 5),
                logging_first_step=True,
                eval_strategy="steps" if validation else "no",
                eval_on_start=bool(validation),
                eval_steps=every,
                save_strategy="steps",
                save_steps=every,
                save_total_limit=2,
                report_to="none",
                disable_tqdm=True,
            )
        ),
        train_dataset=Dataset.from_list(list(encoded)),
        eval_dataset=Dataset.from_list(list(validation)) if validation else None,
        peft_config=LoraConfig(
            r=training.lora_rank,
            lora_alpha=2 * training.lora_rank,
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _attach(trainer: "SFTTrainer", harness: Harness, every: int, steps: int) -> None:
    """Run the harness at step 0, every `every` steps and at the end, and mark checkpoints that are complete."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            if state.global_step == 0:
                self.measure(state)

        def on_step_end(self, args, state, control, **_):
            if state.global_step % every == 0 or state.global_step == steps:
                self.measure(state)

        def measure(self, state):
            figures = harness(trainer.model)
            state.log_history.append({"step": state.global_step, "epoch": state.epoch or 0.0} | figures)

        def on_save(self, args, state, control, **_):
            _mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    trainer.add_callback(Watch())


# -- checkpoints --------------------------------------------------------------------------------------------------

_COMPLETE = "complete.json"


def _hashes(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != _COMPLETE
    }


def _mark_complete(folder: Path) -> None:
    part = folder / f"{_COMPLETE}.part"
    part.write_text(json.dumps(_hashes(folder)), encoding="utf-8")
    part.replace(folder / _COMPLETE)


def _last_valid(folder: Path) -> str | None:
    """The newest checkpoint whose files are as they were when it was complete; broken ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        mark = checkpoint / _COMPLETE
        if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == _hashes(checkpoint):
            return str(checkpoint)
        shutil.rmtree(checkpoint)
    return None


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Trained and total parameters of a model."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
