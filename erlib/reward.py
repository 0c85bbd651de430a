"""The reward model: LoRA with a score head on the round's checkpoint, trained on preferences.

Bradley-Terry (1706.03741, 2203.02155): P(A preferred to B) = sigmoid(score(A) - score(B)), a score being read at the
end token of prompt and completion, or, with `reread`, at the end of the prompt's second reading after them: a small
causal LM can then look up each name of the document in the report, which it cannot before the report is there (echo
embeddings, 2402.15449; re-reading, 2309.06275). `fidelity` says what the scores are worth. Trained through
`trl.RewardTrainer`, with two departures:

1. rows are tokenised here, as in `sft`: nothing is cut off or dropped silently, special tokens in a text stay text;
2. a step reads each completion once, however many of its pairs it is in (2203.02155, section 3.5): the six pairs of a
   document's four completions cost four readings, not twelve.

Preferences that are ties teach no order: they are left out of training and of accuracies, and counted.

`adapter/adapter_model.safetensors` holds the LoRA weights of the backbone as `base_model.model.model.…lora_A.weight`
and `…lora_B.weight`, the names that they have in a causal LM's adapter too, and the head as
`base_model.model.score.weight` (1, hidden size).
"""

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from . import metrics, models
from .manifest import write_text

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import RewardTrainer

    from .annotation import Preference


# -- rows ---------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Training rows, and the ids of the pairs left out.

    A row is a document: `document_id`, `chosen_ids` and `rejected_ids` (token ids of each of its pairs), and `length`,
    the tokens of the longest.
    """

    rows: list[dict]
    ties: list[str]
    too_long: list[str]

    @property
    def n_pairs(self) -> int:
        return sum(len(row["chosen_ids"]) for row in self.rows)


def encode(
    preferences: "Sequence[Preference]",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
    reread: bool = False,
    leave_out: bool = False,
) -> Encoded:
    """Tokenise preferences as `score` reads them: each side ends with the end token, or with the prompt read again.

    Ties are left out and listed. Pairs with a side of more than `max_tokens` tokens raise ValueError with their ids, or
    are listed and left out if `leave_out`.
    """
    rows: dict[str, dict] = {}
    ties, too_long = [], []
    for pair in preferences:
        if pair.preference == "tie":
            ties.append(pair.pair_id)
            continue
        a, b = (_sequence(tokenizer, pair.prompt, text, reread=reread) for text in (pair.a, pair.b))
        if max(len(a), len(b)) > max_tokens:
            too_long.append(pair.pair_id)
            continue
        empty = {"document_id": pair.document_id, "chosen_ids": [], "rejected_ids": [], "length": 0}
        row = rows.setdefault(pair.document_id, empty)
        row["chosen_ids"].append(a if pair.preference == "A" else b)
        row["rejected_ids"].append(b if pair.preference == "A" else a)
        row["length"] = max(row["length"], len(a), len(b))
    if too_long and not leave_out:
        raise ValueError(
            f"{len(too_long)} pairs have more than max_tokens={max_tokens} tokens: {', '.join(too_long[:10])}; "
            "raise the limit, or set leave_out to train without them"
        )
    return Encoded(list(rows.values()), ties, too_long)


def _sequence(
    tokenizer: "PreTrainedTokenizerBase", prompt: models.Prompt, completion: models.Prompt, *, reread: bool
) -> list[int]:
    ids = models.encode_prompt(tokenizer, prompt)
    return [*ids, *models.encode_completion(tokenizer, completion), *(models.again(tokenizer, ids) if reread else ())]


# -- training -----------------------------------------------------------------------------------------------------


def train(
    checkpoint: Path,
    rows: Sequence[dict],
    *,
    out: Path,
    validation: Sequence[dict] = (),
    expected: str | None = None,
    epochs: int = 2,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    warmup_share: float = 0.05,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> "pd.DataFrame":
    """Train a reward adapter with its head on a merged checkpoint, `batch_size` documents a step, and save it in `out`.

    `out` appears complete or not at all; a killed training starts again. Raises ValueError for a checkpoint that is
    not merged or not the `expected` one. Returns the log: `step`, `loss`, `accuracy`, `eval_loss`, `eval_accuracy`, ….
    """
    models.require_merged(checkpoint, expected=expected)
    if not rows:
        raise ValueError("no pair has a preference to learn from: every one is a tie or too long")
    models.seed_everything(seed)  # head and LoRA weights are drawn before the trainer seeds anything
    model, tokenizer = load(checkpoint, dtype="bfloat16" if bf16 else "float32", device=device)
    steps = math.ceil(len(rows) / batch_size) * epochs
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer = _trainer(
        model,
        tokenizer,
        rows,
        validation,
        lora={"r": lora_rank, "lora_alpha": lora_alpha},
        arguments={
            "output_dir": str(partial),
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "learning_rate": learning_rate,
            "warmup_steps": math.ceil(warmup_share * steps),
            "eval_steps": math.ceil(steps / 4),
            "logging_steps": max(1, steps // 20),
            "bf16": bf16,
            "gradient_checkpointing": gradient_checkpointing,
            "seed": seed,
        },
    )
    trainer.train()
    if trainer.state.global_step != steps or len(trainer.train_dataset) != len(rows):
        raise RuntimeError(f"{trainer.state.global_step} of {steps} steps were taken: rows were lost on the way")
    models.save_adapter(trainer.model, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    return models.training_table(trainer.state.log_history)


def _trainer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict],
    validation: Sequence[dict],
    *,
    lora: dict[str, int],
    arguments: dict,
) -> "RewardTrainer":
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        """Distinct sequences (S, T), and where the chosen, then the rejected ones of P pairs are among them (2 P,)."""
        sequences = [tuple(ids) for side in ("chosen_ids", "rejected_ids") for row in rows for ids in row[side]]
        place = {ids: index for index, ids in enumerate(dict.fromkeys(sequences))}
        ids, mask = _pad(list(place), tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask, "places": torch.tensor([place[ids] for ids in sequences])}

    class EachOnce(RewardTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            places = inputs.pop("places")

            def scores(**inputs):
                output = model(**inputs)
                output.logits = output.logits[places]
                return output

            return super().compute_loss(scores, inputs, **kwargs)

    trainer = EachOnce(
        model=model,
        processing_class=tokenizer,
        args=RewardConfig(
            use_cpu=model.device.type == "cpu",
            max_length=None,  # anything else drops rows silently
            lr_scheduler_type="cosine",
            train_sampling_strategy="group_by_length",  # less padding
            logging_first_step=True,
            eval_strategy="steps" if validation else "no",
            eval_on_start=bool(validation),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **arguments,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list(list(rows)),
        eval_dataset=Dataset.from_list(list(validation)) if validation else None,
        peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.0, task_type="SEQ_CLS", **lora),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _pad(sequences: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask (N, T) of sequences, padded on the right: positions then count from 0 by themselves."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[pad] * (width - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
    return ids, mask


# -- scores -------------------------------------------------------------------------------------------------------


def load(
    checkpoint: Path, adapter: Path | None = None, *, dtype: str = "float32", device: str = "auto"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a merged checkpoint as a classifier of one score, with a reward adapter and its head, and the tokenizer.

    Without an adapter the head is random: the start of training. Raises ValueError for an adapter without a score head.
    """
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = models.load(checkpoint, dtype=dtype, device=device)
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    with torch.device("meta"):  # its body is the causal LM's, so nothing is drawn or loaded twice
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    head = torch.nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=0.02)
    classifier.score = head.to(model.device, model.dtype)
    if adapter is None:
        return classifier.eval(), tokenizer
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        if not any(name.endswith("score.weight") for name in file.keys()):  # noqa: SIM118 - not a dict
            raise ValueError(f"{adapter} has no score head, its scores would be random: train it with {__name__}.train")
    return PeftModel.from_pretrained(classifier, adapter).eval(), tokenizer


def score(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[models.Prompt],
    completions: Sequence[models.Prompt],
    *,
    reread: bool = False,
    batch_size: int = 64,
) -> np.ndarray:
    """Raw scores (N,) float64 of completions, each read at the last token of prompt, completion and, with `reread`, the
    prompt again.

    A completion given as text gets the end token; given as ids (`Completion.ids`) it is taken as it is.
    """
    sequences = [
        _sequence(tokenizer, prompt, completion, reread=reread)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    found = np.empty(len(sequences))
    with models.evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = _pad([sequences[index] for index in rows], tokenizer.pad_token_id)
            scores = last_scores(model, ids.to(model.device), mask.to(model.device))
            found[rows] = scores.double().cpu().numpy()
    return found


def last_scores(model: "PreTrainedModel", ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores (B,) at the last position that `mask` (B, T) marks as real; `ids` (B, T) padded on either side.

    The classifier's own forward looks for the last token that is not the padding token instead, and is wrong where a
    model wrote that token itself.
    """
    from peft import PeftModel

    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    body = getattr(classifier, classifier.base_model_prefix)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    hidden = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
    return classifier.score(hidden[torch.arange(len(ids), device=ids.device), last]).squeeze(-1)


def margins(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    preferences: "Sequence[Preference]",
    *,
    reread: bool = False,
    batch_size: int = 64,
) -> np.ndarray:
    """score(A) - score(B) of each preference, (N,); a completion that several pairs share is scored once."""
    texts = list(dict.fromkeys((pair.prompt, text) for pair in preferences for text in (pair.a, pair.b)))
    prompts, completions = [prompt for prompt, _ in texts], [text for _, text in texts]
    scores = score(model, tokenizer, prompts, completions, reread=reread, batch_size=batch_size)
    found = dict(zip(texts, scores, strict=True))
    return np.array([found[pair.prompt, pair.a] - found[pair.prompt, pair.b] for pair in preferences])


def save_record(
    path: Path,
    *,
    checkpoint: str,
    scores: Sequence[float],
    accuracy: metrics.Interval,
    temperature: float,
    reread: bool,
) -> None:
    """Write what PPO must know of a reward model: its checkpoint, and mean and deviation of its scores on samples.

    `temperature` divides a margin before it is read as a log-odds; it changes no score. Raises ValueError when all
    scores are equal, for nothing can then be learnt from them.
    """
    mean, std = float(np.mean(scores)), float(np.std(scores))
    if not std > 0:
        raise ValueError(f"the reward model gives all {len(scores)} samples the score {mean}: it has learnt nothing")
    record = {"checkpoint": checkpoint, "mean": mean, "std": std, "temperature": temperature, "reread": reread}
    record |= {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}
    write_text(path, json.dumps(record, indent=1) + "\n")
