"""The reward model: LoRA and score heads on the round's checkpoint, trained on preferences.

Bradley-Terry (1706.03741, 2203.02155): P(A preferred to B) = sigmoid(score(A) - score(B)). The score of a completion is
the sum over its tokens and over the aspects that annotators judge of

    score(token, aspect) = head_aspect(state that has read it) / 8 + 0.2 / 3 log p(token | all before it),

p being the adapted LM's own probability: a small LM knows less at the end token than along the way, and its
probabilities hold most of what it knows (a policy is a reward model too: 2305.18290, 2404.12358). One pass reads all.
The loss is Bradley-Terry on the summed score and, beside it, on each aspect: three answers a pair teach more than one.
`fidelity` says what the scores are worth. Trained through `trl.RewardTrainer`, with three departures:

1. rows are the prompt's tokens and the very ids that were sampled: nothing is cut off, dropped in silence or tokenised
   again, and a completion that ran out of tokens has no end token;
2. a step reads each document and each completion once, however many of its pairs it is in (2203.02155, section 3.5):
   the six pairs of a document's four completions cost one reading of the document, not twelve;
3. the aspects' loss is added to the summed score's.

Preferences that are ties teach no order: they are left out of training and of accuracies, and counted.

`adapter/adapter_model.safetensors` holds the LoRA weights of the backbone as `base_model.model.model.…lora_A.weight`
and `…lora_B.weight`, the names that they have in any causal LM's adapter, and the head as
`base_model.model.score.weight` (aspects, hidden size), in the order of `schema.ASPECTS`.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from erlib.chain.manifest import write_text
from erlib.lm import models, parallel
from erlib.lm.checkpoints import require_merged, save_adapter, training_table
from erlib.lm.packing import Packed, Rollout, causal_lm, last_states, pack, pack_for, take, token_logprobs
from erlib.task import metrics
from erlib.task.schema import ASPECTS

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import RewardConfig, RewardTrainer

    from erlib.judgements.annotation import Preference

HEAD, LIKELIHOOD = 1 / 8, 0.2  # weights of the heads and of the log-probability in a token's score


# -- rows ---------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Training rows, and the ids of the pairs left out.

    A row is a document: `document_id`, `prompt_ids`, `chosen_ids` and `rejected_ids` (token ids of the completions of
    each of its pairs), `aspects` (for each pair and aspect 1 where the chosen one is better, -1 where the other is, 0
    for a tie), and `length`, the tokens of the prompt with its longest completion.
    """

    rows: list[dict]
    ties: list[str]
    too_long: list[str]

    @property
    def n_pairs(self) -> int:
        """Pairs with a preference that fit."""
        return sum(len(row["chosen_ids"]) for row in self.rows)


def encode(
    preferences: "Sequence[Preference]",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
    leave_out: bool = False,
) -> Encoded:
    """Lay preferences out as rows: the tokens of their prompts, and the token ids that were sampled.

    Ties are left out and listed. Pairs with a side of more than `max_tokens` tokens, prompt included, raise ValueError
    with their ids, or are listed and left out if `leave_out`.
    """
    rows: dict[tuple[str, str], dict] = {}
    ties, too_long = [], []
    for pair in preferences:
        if pair.preference == "tie":
            ties.append(pair.pair_id)
            continue
        prompt = models.encode_prompt(tokenizer, pair.prompt)
        a, b = list(pair.a_ids), list(pair.b_ids)
        length = len(prompt) + max(len(a), len(b))
        if length > max_tokens:
            too_long.append(pair.pair_id)
            continue
        empty = {"document_id": pair.document_id, "prompt_ids": prompt, "chosen_ids": [], "rejected_ids": []}
        row = rows.setdefault((pair.document_id, pair.prompt), empty | {"aspects": [], "length": 0})
        sign = 1.0 if pair.preference == "A" else -1.0
        row["chosen_ids"].append(a if sign > 0 else b)
        row["rejected_ids"].append(b if sign > 0 else a)
        row["aspects"].append([sign * float(np.sign(pair.aspects[aspect])) for aspect in ASPECTS])
        row["length"] = max(row["length"], length)
    if too_long and not leave_out:
        raise ValueError(
            f"{len(too_long)} pairs have more than max_tokens={max_tokens} tokens: {', '.join(too_long[:10])}; "
            "raise the limit, or set leave_out to train without them"
        )
    return Encoded(list(rows.values()), ties, too_long)


def of_earlier_rounds(
    earlier: "Iterable[Preference]", own: "Iterable[Preference]", *, documents: int, seed: int
) -> "list[Preference]":
    """The training pairs of `documents` documents of earlier rounds, drawn at random, or of all where there are fewer.

    Preferences of all rounds train each round's reward model, as in Llama 2 (2307.09288, 3.2.2): what annotators value
    does not change with the checkpoint. Held-out pairs stay held out. ValueError where a document is of this round too.
    """
    train = [pair for pair in earlier if pair.split == "train"]
    both = {pair.document_id for pair in train} & {pair.document_id for pair in own}
    if both:
        raise ValueError(
            f"{len(both)} documents of earlier rounds are of this round, too, such as {min(both)}: accuracy would be "
            "measured on texts that were trained on. Rounds must not share documents; run phase 04 again"
        )
    names = sorted({pair.document_id for pair in train})
    drawn = set(np.random.default_rng(seed).permutation(names)[:documents].tolist())
    return [pair for pair in train if pair.document_id in drawn]


# -- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How a reward model is trained; the defaults are of the embedded LM of 2 M parameters."""

    epochs: int = 2  # passes over the pairs; more learn them by heart, and confidence outgrows accuracy
    batch_size: int = 2  # documents per step; all pairs of a document come together, six where there are four reports
    learning_rate: float = 7e-4  # of LoRA and heads; 1e-4 suits an LM of 7 B parameters
    warmup_share: float = 0.05  # of the steps: the heads begin at random
    lora_rank: int = 16  # of the adapter on every linear layer
    lora_alpha: int = 32  # LoRA adds alpha / rank times its product: twice
    gradient_checkpointing: bool = False  # less memory for more time: with a large LM
    seed: int = 0  # of the first weights and of the order of documents


def train(
    checkpoint: Path,
    rows: Sequence[dict],
    training: Training,
    *,
    out: Path,
    validation: Sequence[dict] = (),
    expected: str | None = None,
    device: str = "auto",
) -> "pd.DataFrame":
    """Train a reward adapter with its heads on a merged checkpoint and save it in `out`.

    `out` appears complete or not at all; a killed training starts again. Raises ValueError for a checkpoint that is
    not merged or not the `expected` one. Returns the log: `step`, `loss`, `accuracy`, `eval_loss`, `eval_accuracy`, ….
    """
    require_merged(checkpoint, expected=expected)
    if not rows:
        raise ValueError("no pair has a preference to learn from: every one is a tie or too long")
    models.seed_everything(training.seed)  # head and LoRA weights are drawn before the trainer seeds anything
    model, tokenizer = load(checkpoint, device=device)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer = _trainer(model, tokenizer, rows, validation, training, out=partial)
    trainer.train()
    steps = _steps(rows, training)
    if trainer.state.global_step != steps or len(trainer.train_dataset) != len(rows):
        raise RuntimeError(f"{trainer.state.global_step} of {steps} steps were taken: rows were lost on the way")
    save_adapter(trainer.model, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    return training_table(trainer.state.log_history)


def _steps(rows: Sequence[dict], training: Training) -> int:
    return math.ceil(len(rows) / training.batch_size) * training.epochs


def _trainer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict],
    validation: Sequence[dict],
    training: Training,
    *,
    out: Path,
) -> "RewardTrainer":
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback

    trainer = _each_once()(
        model=model,
        processing_class=tokenizer,
        args=_arguments(
            _steps(rows, training),
            training,
            out=out,
            cpu=model.device.type == "cpu",
            dtype=model.dtype,
            validation=validation,
        ),
        data_collator=functools.partial(_collate, pad=tokenizer.pad_token_id, dtype=model.dtype, config=model.config),
        train_dataset=Dataset.from_list(list(rows)),
        eval_dataset=Dataset.from_list(list(validation)) if validation else None,
        peft_config=LoraConfig(
            r=training.lora_rank,
            lora_alpha=training.lora_alpha,
            target_modules="all-linear",
            exclude_modules=["score"],
            modules_to_save=["score"],
            task_type="CAUSAL_LM",
            lora_dropout=0.0,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(
    steps: int, training: Training, *, out: Path, cpu: bool, dtype: torch.dtype, validation: Sequence[dict]
) -> "RewardConfig":
    from trl import RewardConfig

    return models.one_device(
        RewardConfig(
            output_dir=str(out),
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            warmup_steps=math.ceil(training.warmup_share * steps),
            lr_scheduler_type="cosine",
            bf16=dtype == torch.bfloat16,
            gradient_checkpointing=training.gradient_checkpointing,
            seed=training.seed,
            use_cpu=cpu,
            max_length=None,  # anything else drops rows silently
            train_sampling_strategy="group_by_length",  # less padding
            eval_strategy="steps" if validation else "no",
            eval_on_start=bool(validation),
            eval_steps=math.ceil(steps / 4),
            logging_first_step=True,
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
    )


def _collate(rows: list[dict], **layout: Any) -> dict:
    """Distinct completions, packed (`layout` is for `pack`); where the chosen, then the rejected ones of P pairs are
    among them (2 P,); and what was preferred in each aspect (P, A)."""
    sides = [
        [(number, tuple(ids)) for number, row in enumerate(rows) for ids in row[side]]
        for side in ("chosen_ids", "rejected_ids")
    ]
    distinct = sorted(set(sides[0] + sides[1]))  # by document: its completions are neighbours
    place = {key: index for index, key in enumerate(distinct)}
    prompts = [tuple(row["prompt_ids"]) for row in rows]
    completions = [Rollout(prompts[number], ids) for number, ids in distinct]
    return {
        "packed": pack(completions, **layout)._asdict(),
        "places": torch.tensor([place[key] for side in sides for key in side]),
        "aspects": torch.tensor([signs for row in rows for signs in row["aspects"]]),
        # trl counts tokens by the mask
        "attention_mask": torch.tensor(sum(map(len, prompts)) + sum(len(row.ids) for row in completions)),
    }


def _each_once() -> "type[RewardTrainer]":
    """trl's trainer with the loss of pairs whose completions are each read once; imported when it is needed."""
    from transformers.modeling_outputs import SequenceClassifierOutput
    from trl import RewardTrainer

    class EachOnce(RewardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            packed, places, aspects = Packed(**inputs.pop("packed")), inputs.pop("places"), inputs.pop("aspects")
            scores = take(token_scores(model, packed).sum(dim=1), places)  # (2 P, A)

            def summed(**_):
                return SequenceClassifierOutput(logits=scores.sum(dim=1, keepdim=True))

            loss, outputs = super().compute_loss(summed, inputs, return_outputs=True, **kwargs)
            loss = loss + aspect_loss(*scores.chunk(2), aspects)
            return (loss, outputs) if return_outputs else loss

    return EachOnce


def aspect_loss(chosen: torch.Tensor, rejected: torch.Tensor, aspects: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss of the scores (P, A) by aspect, the mean over what is decided in `aspects` (P, A)."""
    decided = aspects != 0
    losses = -torch.nn.functional.logsigmoid(aspects * (chosen - rejected)) * decided
    return losses.sum() / decided.sum().clamp(min=1)


# -- scores -------------------------------------------------------------------------------------------------------


def load(
    checkpoint: Path, adapter: Path | None = None, *, device: str = "auto"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a merged checkpoint with score heads beside its LM head, a reward adapter if there is one, and tokenizer.

    Without an adapter the heads are random: the start of training. An adapter is merged, in float32, for it is here to
    score. Raises ValueError for an adapter without heads.
    """
    from peft import PeftModel
    from safetensors import safe_open

    model, tokenizer = models.load(checkpoint, device=device)
    width = model.config.get_text_config().hidden_size
    model.score = torch.nn.Linear(width, len(ASPECTS), bias=False, device=model.device)
    torch.nn.init.normal_(model.score.weight, std=0.02)
    model.config.num_labels = 1  # by this trl knows a reward model
    if adapter is None:
        return model.eval(), tokenizer
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        if not any(name.endswith("score.weight") for name in file.keys()):  # noqa: SIM118 - not a dict
            raise ValueError(f"{adapter} has no score head, its scores would be random: train it with {__name__}.train")
    with_adapter = PeftModel.from_pretrained(model, adapter).eval()
    return with_adapter.merge_and_unload() if model.dtype == torch.float32 else with_adapter, tokenizer


def score(*args: Any, **settings: Any) -> np.ndarray:
    """The reward (N,) of completions: the sum over aspects of `aspect_scores`, which takes the same arguments."""
    return aspect_scores(*args, **settings).sum(axis=1)


def aspect_scores(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[models.Prompt],
    completions: Sequence[models.Prompt],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Raw scores (N, A) float64 of completions by aspect, `batch_size` at a time.

    A completion given as text gets the end token; given as ids (`Completion.ids`) it is taken as it is.
    """
    rows = [
        Rollout(tuple(models.encode_prompt(tokenizer, p)), tuple(models.encode_completion(tokenizer, c)))
        for p, c in zip(prompts, completions, strict=True)
    ]
    # Lines of similar length, the longest first; completions of one prompt come together, so that it is read once.
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].prompt), rows[index].prompt))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def read(some: list[int]) -> np.ndarray:
        packed = pack_for(model, [rows[index] for index in some], pad=tokenizer.pad_token_id)
        return token_scores(model, packed).sum(dim=1).double().cpu().numpy()

    with models.evaluating(model):
        found = parallel.each(read, batches, device=model.device)
    scores = np.empty((len(rows), len(ASPECTS)))
    scores[order] = np.concatenate(found) if found else 0.0
    return scores


def token_scores(model: "PreTrainedModel", packed: Packed) -> torch.Tensor:
    """Score of each completion token by aspect (N, T, A), 0 behind the end, by a model of `load`."""
    inner = causal_lm(model)
    return combine(inner, packed, last_states(inner, packed), heads=inner.score)


def combine(
    model: torch.nn.Module, packed: Packed, states: torch.Tensor, *, heads: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Token scores (N, T, A) from the adapted LM, its backbone's last hidden states (B L, H) and A score heads."""
    own = heads(take(states, packed.at).float()) * packed.mask[..., None]
    likely = token_logprobs(model, packed, states)[0][..., None]
    return HEAD * own + LIKELIHOOD / own.shape[-1] * likely


def margins(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    preferences: "Sequence[Preference]",
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """score(A) - score(B) of each preference, (N,); a completion that several pairs share is scored once."""
    sides = [(pair.prompt, ids) for pair in preferences for ids in (pair.a_ids, pair.b_ids)]
    distinct = list(dict.fromkeys(sides))
    prompts, completions = [prompt for prompt, _ in distinct], [list(ids) for _, ids in distinct]
    found = dict(zip(distinct, score(model, tokenizer, prompts, completions, batch_size=batch_size), strict=True))
    return np.array([found[pair.prompt, pair.a_ids] - found[pair.prompt, pair.b_ids] for pair in preferences])


def save_record(
    path: Path,
    *,
    checkpoint: str,
    scores: Sequence[float],
    accuracy: metrics.Interval,
    temperature: float,
    sampling_temperature: float,
) -> None:
    """Write what PPO must know of a reward model: its checkpoint, and mean and deviation of its scores on samples.

    `sampling_temperature` is the samples': the scores of hotter ones lie elsewhere. `temperature` divides a margin
    before it is read as a log-odds; it changes no score. Raises ValueError when all scores are equal, for nothing can
    then be learnt from them.
    """
    mean, std = float(np.mean(scores)), float(np.std(scores))
    if not std > 0:
        raise ValueError(f"the reward model gives all {len(scores)} samples the score {mean}: it has learnt nothing")
    record = {"checkpoint": checkpoint, "mean": mean, "std": std, "temperature": temperature}
    record |= {"sampling_temperature": sampling_temperature}
    record |= {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}
    write_text(path, json.dumps(record, indent=1) + "\n")
