"""TRL 1.12.0's PPO, the last one it had, measured on a workload that `ppo_step` prepared.

Runs in the environment that `make peer` makes, where most of what erlib needs is missing; so it imports the meter of
memory alone, and `ppo_step` takes from here what both sides must do alike: the model, and the counting of memory.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erlib.chain.memory import peak_bytes

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel

PARTS = ("generation", "scoring", "update")


# -- what both sides do alike -------------------------------------------------------------------------------------


def llama(workload: dict[str, Any]) -> "LlamaConfig":
    """The model's shape; no token ends a completion, so that both sides write as many tokens."""
    from transformers import LlamaConfig

    width = workload["width"]
    return LlamaConfig(
        vocab_size=workload["vocabulary"],
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=workload["layers"],
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def build(workload: dict[str, Any], *, classifier: bool = False) -> "PreTrainedModel":
    """A model of random weights in float32, the same ones for the same seed; a `classifier` has one score."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(workload["seed"])
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    config = llama(workload)
    if classifier:
        config.num_labels = 1
    return kind.from_config(config, dtype=torch.float32)


def storage_bytes(tensors: Iterable["torch.Tensor"]) -> int:
    """Bytes of the storages behind tensors, shared ones once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def memory(models: "list[torch.nn.Module]") -> Iterator[dict[str, int]]:
    """Bytes that training holds: `weights` of `models` (which the caller fills), `gradients`, `optimiser`, and `peak`.

    The first three are counted exactly after each optimiser step. `peak` is the process's peak of resident memory less
    what it held before, and is there when the context ends.
    """
    import psutil
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    found: dict[str, int] = {}

    def count(optimiser: torch.optim.Optimizer, *_: object) -> None:
        trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        state = [tensor for kept in optimiser.state.values() for tensor in kept.values() if torch.is_tensor(tensor)]
        held = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        found["weights"] = storage_bytes([*held, *trained])
        found["gradients"] = storage_bytes(parameter.grad for parameter in trained if parameter.grad is not None)
        found["optimiser"] = storage_bytes(state)

    gc.collect()
    before = psutil.Process().memory_info().rss
    hook = register_optimizer_step_post_hook(count)
    try:
        yield found
    finally:
        hook.remove()
    found["peak"] = peak_bytes() - before


def toy(workload: dict[str, Any]) -> dict[str, Any]:
    """The same at toy size: run first, so that nothing is counted that libraries load only when they are used."""
    return workload | {"width": 64, "layers": 1, "steps": 1}


def write(path: Path, steps: list[dict[str, float]], held: dict[str, int]) -> None:
    """Write a side's measurements: seconds of each step's parts, and bytes."""
    path.write_text(json.dumps({"steps": steps, "bytes": held}, indent=1) + "\n", encoding="utf-8")


# -- TRL's side ---------------------------------------------------------------------------------------------------


def train(
    folder: Path, workload: dict[str, Any], *, lora: bool, models: "list[torch.nn.Module]"
) -> list[dict[str, float]]:
    """Train with TRL's defaults, or with its LoRA policy; append its models to `models`, give seconds of each step.

    By default all of policy and value model is trained, and reference and reward model are copies of their own. With
    LoRA the reference is the policy with its adapter off; the value model is trained in full all the same. TRL knows
    no samples of one prompt: it gets each prompt as many times.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left")
    rank = workload["lora_rank"]
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    prompts = [ids for ids in workload["prompts"] for _ in range(workload["samples"])]
    batch = workload["prompts_per_step"] * workload["samples"]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=scratch,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,
                num_mini_batches=workload["prompts_per_step"] // workload["mini_batch_size"],
                num_ppo_epochs=workload["epochs"],
                total_episodes=batch * workload["steps"],
                local_rollout_forward_batch_size=batch,
                response_length=workload["new_tokens"],
                temperature=1.0,
                learning_rate=workload["learning_rate"],
                num_sample_generations=0,
                gradient_checkpointing=False,  # as on our side: it trades time for memory
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=workload["seed"],
            ),
            processing_class=tokenizer,
            model=build(workload),
            ref_model=None,  # made by the trainer: a copy, or with LoRA none
            reward_model=build(workload, classifier=True),
            value_model=build(workload, classifier=True),
            train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
            peft_config=adapter if lora else None,
        )
        models += [trainer.model, trainer.reward_model, *([] if lora else [trainer.ref_model])]
        marks = _timed(trainer)
    return [
        dict(zip(PARTS, (b - a for a, b in zip(marks[at:], marks[at + 1 : at + 4], strict=False)), strict=True))
        for at in range(0, len(marks) - 1, 3)
    ]


def _timed(trainer: Any) -> list[float]:
    """Train; clock readings in each step before generation, after it and before the first update, and at the end.

    What a step tidies up at its end counts as update.
    """
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_train_end(self, *_: object, **__: object) -> None:
            marks.append(time.perf_counter())

    def generation(*args: Any, **kwargs: Any) -> Any:
        marks.append(time.perf_counter())
        found = generate(*args, **kwargs)
        marks.append(time.perf_counter())
        return found

    def update_begins(*_: object) -> None:
        if len(marks) % 3 == 2:  # of all the mini-batches of a step, the first
            marks.append(time.perf_counter())

    generate, ppo_trainer.batch_generation = ppo_trainer.batch_generation, generation
    trainer.model.register_forward_pre_hook(update_begins)  # policy and value model together: in updates only
    trainer.add_callback(Clock())
    try:
        trainer.train()
    finally:
        ppo_trainer.batch_generation = generate
    return marks


def main() -> None:
    """Measure the workload in a folder and write the measurements."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lora", action="store_true", help="a LoRA policy in place of TRL's default")
    given = parser.parse_args()
    workload = json.loads((given.folder / "workload.json").read_text(encoding="utf-8"))
    train(given.folder, toy(workload), lora=given.lora, models=[])
    models: list[torch.nn.Module] = []
    with memory(models) as held:
        steps = train(given.folder, workload, lora=given.lora, models=models)
    write(given.out, steps, held)


if __name__ == "__main__":
    main()
