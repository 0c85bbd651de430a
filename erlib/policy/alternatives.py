"""The alternatives to PPO, from the same pairs and reward model: DPO and RLOO through trl, and best-of-n.

Every method starts from the same merged checkpoint with a fresh LoRA adapter, and its reference is that checkpoint, the
adapter switched off. Where this departs from trl's own path:

1. DPO gets ready-made tokens. trl adds the end token as text before it tokenises, so either the text of a special token
   in a document becomes that token, or the end token becomes text.
2. Ties and identical pairs are left out and counted, and a run that lost a row on the way is an error.
3. RLOO encodes prompts and samples with `models`, as PPO does. trl's own way took three times as long with the embedded
   LM, and what a model's generation_config holds (penalties, minimum lengths) can come back through it.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from erlib.chain import memory
from erlib.lm import models
from erlib.lm.checkpoints import save_adapter
from erlib.task import metrics
from erlib.task.forms import short_prompt
from erlib.task.schema import Document

if TYPE_CHECKING:
    import pandas as pd
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from erlib.judgements.annotation import Preference

# Rewards (N,) of N prompts and completions; a completion is given as its token ids, with the end token if it has one.
Score = Callable[[Sequence[str], Sequence[Sequence[int]]], np.ndarray]


def normalised(score: Score, *, mean: float, std: float) -> Score:
    """The same rewards in standard deviations from their mean on samples of the start checkpoint."""
    if not std > 0:
        raise ValueError(f"the reward model's std is {std}: it gives every sample the same reward, train it again")
    return lambda prompts, completions: (score(prompts, completions) - mean) / std


# -- settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DPO:
    """What DPO alone is told."""

    beta: float = 0.1  # price of distance from the start
    epochs: int = 1  # passes over the pairs
    batch_size: int = 16  # pairs per step


@dataclass(frozen=True)
class RLOO:
    """What RLOO alone is told."""

    max_new_tokens: int = 192  # longest completion
    prompts_per_step: int = 16  # prompts of a step, each once
    samples: int = 4  # completions of each prompt: the others of a prompt are the baseline of one
    temperature: float = 1.0  # of sampling; the round's own, as the reward model knows no other
    kl_coef: float = 0.05  # price of a nat of distance from the start, in rewards
    missing_end_penalty: float = 1.0  # rewards that a completion without its end token loses


@dataclass(frozen=True)
class Tuning:
    """What both are told alike."""

    learning_rate: float = 5e-4  # for LoRA: trl's default of 1e-6 is for full tuning
    lora_rank: int = 16  # of the fresh adapter on every linear layer; alpha is twice that
    points: int = 3  # adapters kept, at equal distances, the last one at the end
    gradient_checkpointing: bool = False  # activations are computed again instead of kept: for large LMs
    seed: int = 0  # every random choice follows from it


# -- training -----------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Rows `prompt_ids`, `chosen_ids`, `rejected_ids` as trl's collator takes them, and counts of what was left out."""

    rows: list[dict[str, list[int]]]
    dropped: dict[str, int]


class Trained(NamedTuple):
    """A training run: its log, the adapter folder of each kept step, and what it cost.

    `tokens` are those of the completions that were learnt from; `peak_mb` is the process's resident memory on a CPU and
    what torch had allocated on a GPU, models and libraries included.
    """

    log: "pd.DataFrame"
    adapters: dict[int, Path]
    seconds: float
    peak_mb: float
    tokens: int


def encode(preferences: "Sequence[Preference]", tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int) -> Pairs:
    """Lay decided pairs out for `dpo` by the token ids that were sampled.

    Ties, identical pairs and pairs with a row above `max_tokens` are left out and counted.
    """
    rows, dropped = [], {"tie": 0, "identical": 0, "too long": 0}
    for preference in preferences:
        a, b = list(preference.a_ids), list(preference.b_ids)
        prompt = models.encode_prompt(tokenizer, preference.prompt)
        if preference.preference == "tie":
            dropped["tie"] += 1
        elif a == b:
            dropped["identical"] += 1
        elif len(prompt) + max(len(a), len(b)) > max_tokens:
            dropped["too long"] += 1
        else:
            chosen, rejected = (a, b) if preference.preference == "A" else (b, a)
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return Pairs(rows, dropped)


def dpo(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict[str, list[int]]],
    *,
    out: Path,
    settings: DPO = DPO(),
    tuning: Tuning = Tuning(),
) -> Trained:
    """Direct preference optimisation (2305.18290) of a fresh adapter on encoded pairs; the reference is `model`.

    Adapters are saved in `out/step-<n>`. `model` carries the adapter afterwards. Raises RuntimeError where a row or a
    step was lost on the way.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class ReadyMade(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset

    steps = math.ceil(len(rows) / settings.batch_size) * settings.epochs
    trainer = ReadyMade(
        model=model,
        processing_class=tokenizer,
        args=models.one_device(
            DPOConfig(
                beta=settings.beta,
                max_length=None,
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch_size,
                train_sampling_strategy="group_by_length",  # less padding
                remove_unused_columns=False,  # it would remove the lengths
                **_arguments(model, out, steps, tuning),
            )
        ),
        train_dataset=Dataset.from_list([row | {"length": sum(map(len, row.values()))} for row in rows]),
        peft_config=_lora(tuning),
    )
    if len(trainer.train_dataset) != len(rows):
        raise RuntimeError(f"{len(trainer.train_dataset)} of {len(rows)} pairs are left: rows were lost on the way")
    tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows) * settings.epochs
    return Trained(*_run(trainer, out=out, points=tuning.points, steps=steps), tokens)


def rloo(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    score: Score,
    *,
    out: Path,
    settings: RLOO = RLOO(),
    tuning: Tuning = Tuning(),
) -> Trained:
    """REINFORCE leave-one-out (2402.14740) of a fresh adapter: each prompt is used once, with its samples.

    `score` gives the rewards, from which the penalty for a missing end and the KL from `model` as given are subtracted.
    Adapters are saved as by `dpo`. Raises ValueError unless the prompts fill whole steps, and RuntimeError where a
    prompt was lost on the way.
    """
    from datasets import Dataset
    from trl import RLOOConfig

    if not prompts or len(prompts) % settings.prompts_per_step:
        raise ValueError(
            f"{len(prompts)} prompts are not whole steps of {settings.prompts_per_step}: trl would drop the rest"
        )
    ends, lengths = models.ends(tokenizer), []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        lengths.extend(map(len, completion_ids))
        missing = np.array([ids[-1] not in ends for ids in completion_ids])
        return (score(prompts, completion_ids) - settings.missing_end_penalty * missing).tolist()

    steps = len(prompts) // settings.prompts_per_step
    parts = math.gcd(4, settings.prompts_per_step)  # backward passes per step: a quarter of the memory
    trainer = _rloo_trainer(settings, tuning.seed)(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=models.one_device(
            RLOOConfig(
                beta=settings.kl_coef,
                per_device_train_batch_size=settings.prompts_per_step // parts * settings.samples,
                gradient_accumulation_steps=parts,
                num_generations=settings.samples,
                max_completion_length=settings.max_new_tokens,
                temperature=settings.temperature,
                max_steps=steps,
                **_arguments(model, out, steps, tuning),
            )
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        peft_config=_lora(tuning),
    )
    ran = _run(trainer, out=out, points=tuning.points, steps=steps)
    if len(lengths) != len(prompts) * settings.samples:
        wanted = len(prompts) * settings.samples
        raise RuntimeError(f"{len(lengths)} of {wanted} completions were scored: prompts were lost on the way")
    return Trained(*ran, sum(lengths))


def _rloo_trainer(settings: RLOO, seed: int) -> type:
    """trl's RLOO trainer, sampling with `models.generate` (point 3 above)."""
    from trl import RLOOTrainer

    class Ours(RLOOTrainer):
        def _tokenize_prompts(self, prompts: list[str]) -> tuple:
            return [models.encode_prompt(self.processing_class, prompt) for prompt in prompts], None, {}

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: object) -> list[list[int]]:
            model = self.accelerator.unwrap_model(self.model)
            with models.folded(model):
                written = models.generate(
                    model,
                    self.processing_class,
                    prompt_ids,
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=len(prompt_ids),
                    temperature=settings.temperature,
                    seed=int(np.random.default_rng([seed, self.state.global_step]).integers(2**31)),
                )
            return [list(completion.ids) for completion in written]

    return Ours


def _arguments(model: "PreTrainedModel", out: Path, steps: int, tuning: Tuning) -> dict:
    """What both trainers are told alike."""
    return {
        "output_dir": str(out),
        "use_cpu": model.device.type == "cpu",
        "learning_rate": tuning.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": math.ceil(0.1 * steps),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": model.dtype == torch.bfloat16,
        "gradient_checkpointing": tuning.gradient_checkpointing,
        "seed": tuning.seed,
    }


def _lora(tuning: Tuning) -> "LoraConfig":
    from peft import LoraConfig

    models.seed_everything(tuning.seed)  # LoRA's weights are drawn before the trainer seeds anything
    rank = tuning.lora_rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _run(
    trainer: "Trainer", *, out: Path, points: int, steps: int
) -> "tuple[pd.DataFrame, dict[int, Path], float, float]":
    """Train, and give log, adapters, seconds and peak memory."""
    import pandas as pd
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    wanted = {round(steps * point / points) for point in range(1, points + 1)} - {0}
    adapters: dict[int, Path] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in wanted:
                adapters[state.global_step] = out / f"step-{state.global_step}"
                save_adapter(trainer.model, adapters[state.global_step])

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Keep())
    began = time.monotonic()
    gc.collect()
    memory.reset(trainer.model.device.type)
    trainer.train()
    if trainer.state.global_step != steps:
        raise RuntimeError(f"{trainer.state.global_step} of {steps} steps were taken: rows were lost on the way")
    seconds = time.monotonic() - began
    log = pd.DataFrame([entry for entry in trainer.state.log_history if "train_runtime" not in entry])
    log = log.drop(columns="step_time", errors="ignore")  # it would differ from run to run
    return log, adapters, seconds, memory.peak_bytes(trainer.model.device.type) / 2**20


# -- what a policy writes -----------------------------------------------------------------------------------------


def with_adapters(model: "PreTrainedModel", folders: Mapping[str, Path]) -> "PeftModel":
    """Put adapters on one base under their names, the first of them switched on: `set_adapter` switches."""
    from peft import PeftModel

    (first, folder), *others = folders.items()
    policies = PeftModel.from_pretrained(model, folder, adapter_name=first)
    for name, folder in others:
        policies.load_adapter(folder, adapter_name=name)
    return policies.eval()


def draw(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    score: Score,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
) -> "pd.DataFrame":
    """Reports of the active policy, `samples` a document: document, text, tokens, finished and reward."""
    import pandas as pd

    asked = [document for document in documents for _ in range(samples)]
    prompts = [short_prompt(document.text) for document in asked]
    with models.folded(model):
        written = models.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            seed=seed,
        )
    ids = [list(completion.ids) for completion in written]
    return pd.DataFrame(
        {
            "document": [document.id for document in asked],
            "text": [completion.text for completion in written],
            "tokens": [completion.n_new_tokens for completion in written],
            "finished": [completion.finished for completion in written],
            "reward": score(prompts, ids),
        }
    )


# -- best of n ----------------------------------------------------------------------------------------------------


def best(drawn: "pd.DataFrame", *, column: str = "reward", n: int | None = None) -> "pd.DataFrame":
    """The row with the highest `column` among the first `n` samples of each document (all by default)."""
    groups = drawn.groupby("document", sort=False)
    first = drawn if n is None else groups.head(n)
    return drawn.loc[first.groupby("document", sort=False)[column].idxmax()].reset_index(drop=True)


def expected_best(drawn: "pd.DataFrame", value: str, *, n: int, by: str = "reward") -> np.ndarray:
    """Mean `value` (D,) of the sample with the highest `by`, over all draws of `n` from a document's N samples.

    The sample of rank r (0 is the best) wins C(N - 1 - r, n - 1) of the C(N, n) draws: all samples serve every n, as in
    2112.09332 and 2210.10760.
    """
    ordered = drawn.sort_values(by, ascending=False, kind="stable").groupby("document", sort=False)[value]
    values = ordered.apply(list).loc[list(dict.fromkeys(drawn["document"]))]
    total = len(values.iloc[0])
    if not 1 <= n <= total or any(len(row) != total for row in values):
        raise ValueError(f"best of {n} needs the same number of samples of every document, and at least {n}")
    weights = np.array([math.comb(total - 1 - rank, n - 1) / math.comb(total, n) for rank in range(total)])
    return np.array(values.tolist(), dtype=float) @ weights


def best_of_n_kl(n: int) -> float:
    """Upper bound on the KL of best-of-n from the policy that draws, in nats: log n - (n - 1) / n (2401.01879)."""
    return math.log(n) - (n - 1) / n


# -- is it my SFT, my reward model or my PPO? ---------------------------------------------------------------------

# Question, two columns whose difference answers it, what the difference must be, and what to suspect when it is not.
_QUESTIONS = (
    (
        "Do samples of the start hold better reports than its greedy one?",
        *("best-of-n by truth, utility", "start greedy, utility", "above 0"),
        "SFT: its samples lack diversity; more or better reports, or a higher temperature",
    ),
    (
        "Does the reward model find better reports among them?",
        *("best-of-n by reward, utility", "start, utility", "above 0"),
        "reward model: it does not see what the panel sees; more pairs, better agreement",
    ),
    (
        "Does PPO raise the reward?",
        *("PPO, reward", "start, reward", "above 0"),
        "PPO: it does not climb; learning rate, KL coefficient, critic, steps",
    ),
    (
        "Does PPO leave the true utility unharmed?",
        *("PPO, utility", "start, utility", "not below 0"),
        "reward model: PPO exploits it; a higher KL coefficient, or a new round of pairs from the policy",
    ),
    (
        "Does PPO keep up with best-of-n?",
        *("PPO, utility", "best-of-n by reward, utility", "not below 0"),
        "PPO: the reward model has more to give; more steps, a lower KL coefficient",
    ),
    (
        "Does PPO keep up with DPO on the same pairs?",
        *("PPO, utility", "DPO, utility", "not below 0"),
        "PPO: the pairs have more to give; compare its KL with DPO's",
    ),
    (
        "Does PPO keep up with RLOO on the same reward model?",
        *("PPO, utility", "RLOO, utility", "not below 0"),
        "PPO: its critic is no help; more warm-up of the critic, or RLOO instead",
    ),
)


def diagnose(measured: "pd.DataFrame", *, seed: int) -> "pd.DataFrame":
    """Answer the questions in order from one row per document: question, value, low, high, wanted, holds, suspect.

    `measured` has the columns that `_QUESTIONS` names. A value is a mean paired difference with its 95 % interval:
    "above 0" asks for the whole interval, "not below 0" for its upper end. `holds` is None where a column is not known
    (nan), and `suspect` is empty unless the answer is no.
    """
    import pandas as pd

    rows = []
    for question, one, other, wanted, suspect in _QUESTIONS:
        known = not measured[[one, other]].isna().any(axis=None)
        found = metrics.Interval(math.nan, math.nan, math.nan)
        if known:
            found = metrics.paired_bootstrap_mean(measured[one], measured[other], seed=seed)
        holds = (found.low > 0 if wanted == "above 0" else found.high >= 0) if known else None
        rows.append((question, *found, wanted, holds, suspect if holds is False else ""))
    return pd.DataFrame(rows, columns=["question", "value", "low", "high", "wanted", "holds", "suspect"])
