"""Our PPO step beside TRL's: same random model, prompts, lengths, batch, epochs and mini-batches, in fresh processes.

`prepare` writes a workload, `measure` times every side on it in turns, `ratios` sets them against TRL. As a program
(`python -m erlib.benchmarks.ppo_step FOLDER OUT`) it is our side of `peer`, which is TRL's.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erlib.benchmarks import peer
from erlib.chain.manifest import ROOT

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformers import PreTrainedTokenizerBase

    from erlib.policy import ppo
    from erlib.policy.multiadapter import RewardModel

PEER = ROOT / ".venv-peer"
TRL = "TRL"
SIDES = ("ours", TRL, "TRL, LoRA policy")
SECONDS = (*peer.PARTS, "step")
MEGABYTES = ("weights", "gradients", "optimiser", "held", "peak")


# -- the workload -------------------------------------------------------------------------------------------------


def peer_python() -> Path:
    """Python of TRL 1.12.0's environment; raises FileNotFoundError, which names the command that makes it."""
    if not (PEER / ".installed").is_file():
        raise FileNotFoundError(f"TRL 1.12.0 lives in an environment of its own, {PEER.name}: make it with `make peer`")
    return PEER / "bin" / "python"


@dataclass(frozen=True)
class Work:
    """The shape of a workload, the same for all sides."""

    width: int  # hidden size of each model
    layers: int
    prompt_tokens: int  # of every prompt
    new_tokens: int  # of every completion: nothing ends early
    prompts_per_step: int
    samples: int  # completions of each prompt
    mini_batch_size: int  # prompts, with all their samples, per optimiser step
    epochs: int  # passes over a step's completions
    steps: int  # the first warms up and is not counted
    lora_rank: int
    seed: int


def prepare(folder: Path, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], work: Work) -> dict[str, Any]:
    """Write a workload and its tokenizer into `folder`, and give the workload.

    Prompts are the first `prompt_tokens` tokens of those texts that have as many; ValueError if they do not fill the
    steps. The tokenizer's end and padding tokens lie outside the model's vocabulary: nothing ends early on any side.
    """
    encoded = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]
    prompts = [ids[: work.prompt_tokens] for ids in encoded if len(ids) >= work.prompt_tokens]
    needed = work.prompts_per_step * (work.steps + 1)  # after the last step the policy is sampled once more
    if len(prompts) < needed:
        raise ValueError(f"{len(prompts)} of {len(texts)} texts have {work.prompt_tokens} tokens; {needed} are needed")
    workload = (
        asdict(work)
        | {
            "vocabulary": len(tokenizer),
            "learning_rate": 1e-5,  # small: random weights have nothing to learn, and no step may be cut short
            "prompts": prompts[:needed],
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "workload.json").write_text(json.dumps(workload) + "\n", encoding="utf-8")
    tokenizer.add_special_tokens({"eos_token": "<never written>", "pad_token": "<never needed>"})
    tokenizer.save_pretrained(folder / "tokenizer")
    return workload


def parameters(workload: dict[str, Any]) -> int:
    """Number of parameters of the workload's model."""
    import torch

    with torch.device("meta"):
        return peer.build(workload).num_parameters()


# -- our side -----------------------------------------------------------------------------------------------------


def train(folder: Path, workload: dict[str, Any], *, models: "list[torch.nn.Module]") -> list[dict[str, float]]:
    """Train with `ppo.train`, append the model to `models`, and give the seconds of each step's parts."""
    from transformers import AutoTokenizer

    from erlib.policy import ppo

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left")
    model = peer.build(workload).eval()
    models.append(model)
    with tempfile.TemporaryDirectory() as scratch:
        log = ppo.train(
            model,
            tokenizer,
            workload["prompts"],
            reward=_reward_model(Path(scratch) / "reward", workload),
            out=Path(scratch) / "policy",
            checkpoints=Path(scratch) / "checkpoints",
            harness=lambda _: {},
            settings=_settings(workload),
        ).log
    steps = log[: workload["steps"]].rename(columns={f"seconds_{part}": part for part in peer.PARTS})
    return steps[list(peer.PARTS)].to_dict("records")


def _settings(workload: dict[str, Any]) -> "ppo.Settings":
    """Our trainer's settings that make it do what TRL does: no warm-up, no limit that ends an update, no alarm."""
    from erlib.policy import ppo

    rank, prompts = workload["lora_rank"], workload["prompts_per_step"]
    return ppo.Settings(
        steps=workload["steps"],
        sampling=ppo.Sampling(
            prompts_per_step=prompts,
            samples=workload["samples"],
            max_new_tokens=workload["new_tokens"],
            generation_batch_size=prompts * workload["samples"],
        ),
        update=ppo.Update(
            learning_rate=workload["learning_rate"],
            value_learning_rate=workload["learning_rate"],
            warmup_steps=0,
            epochs=workload["epochs"],
            mini_batch_size=workload["mini_batch_size"],
            micro_batch_size=prompts,
            ratio_threshold=math.inf,  # TRL knows neither limit
            target_kl=math.inf,
        ),
        adapter=ppo.Adapter(lora_rank=rank, lora_alpha=2 * rank),
        upkeep=ppo.Upkeep(guard_window=workload["steps"] + 2, checkpoint_every=workload["steps"] + 1),
        seed=workload["seed"],
    )


def _reward_model(folder: Path, workload: dict[str, Any]) -> "RewardModel":
    """A reward adapter of random weights with its head, in the form that phase 06 writes."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    from erlib.policy.multiadapter import RewardModel
    from erlib.task.schema import ASPECTS

    rank = workload["lora_rank"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):  # names and shapes without a second model in memory
        shapes = get_peft_model_state_dict(get_peft_model(peer.build(workload), config))
    shapes["base_model.model.score.weight"] = torch.empty(len(ASPECTS), workload["width"], device="meta")
    generator = torch.Generator().manual_seed(workload["seed"])
    weights = {name: 0.02 * torch.randn(meta.shape, generator=generator) for name, meta in shapes.items()}
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    return RewardModel(folder, mean=0.0, std=1.0, evaluation=np.random.default_rng(0).normal(size=100))


# -- measuring ----------------------------------------------------------------------------------------------------


def command(side: str, folder: Path, out: Path) -> list[str]:
    """The command line that measures a side of `SIDES` on a workload's folder."""
    if side == SIDES[0]:
        return [sys.executable, "-m", "erlib.benchmarks.ppo_step", str(folder), str(out)]
    line = [str(peer_python()), "-m", "erlib.benchmarks.peer", str(folder), str(out)]
    return line if side == TRL else [*line, "--lora"]


def read(path: Path) -> dict[str, float]:
    """A process's measurements: seconds, means of its steps without the first, and MB (of 2^20 bytes)."""
    found = json.loads(path.read_text(encoding="utf-8"))
    steps = found["steps"][1:]
    if not steps:
        raise ValueError(f"{path}: the first step warms up and is left out; measure two or more")
    seconds = {part: sum(step[part] for step in steps) / len(steps) for part in peer.PARTS}
    megabytes = {name: value / 2**20 for name, value in found["bytes"].items()}
    megabytes["held"] = sum(megabytes[name] for name in ("weights", "gradients", "optimiser"))
    return seconds | {"step": sum(seconds.values())} | {name: megabytes[name] for name in MEGABYTES}


def measure(folder: Path, *, repetitions: int) -> "pd.DataFrame":
    """Measure every side in turns, each time in a fresh process: columns repetition, side, load, seconds and MB.

    Every second turn goes backwards, so that a machine that slows down slows all sides. Raises RuntimeError with the
    last lines of a process that failed.
    """
    import pandas as pd

    rows = []
    for repetition in range(repetitions):
        for side in SIDES if repetition % 2 == 0 else reversed(SIDES):
            load, out = os.getloadavg()[0], folder / "measured.json"
            out.unlink(missing_ok=True)
            ended = subprocess.run(command(side, folder, out), cwd=ROOT, capture_output=True, text=True)
            if ended.returncode:
                tail = "\n".join(ended.stderr.splitlines()[-15:])
                raise RuntimeError(f"{side} ended with {ended.returncode}:\n{tail}")
            rows.append({"repetition": repetition, "side": side, "load": load, **read(out)})
    return pd.DataFrame(rows)


def ratios(measured: "pd.DataFrame") -> "pd.DataFrame":
    """Each side against TRL's default in the same turn: columns side, measure, value, low, high.

    `value` is the geometric mean over the turns, `low` and `high` are the smallest and the largest ratio.
    """
    import numpy as np
    import pandas as pd

    columns = [*SECONDS, *MEGABYTES]
    turns = measured.set_index(["side", "repetition"])[columns]
    rows = []
    for side in SIDES:
        if side == TRL:
            continue
        logs = np.log(turns.loc[side] / turns.loc[TRL])
        for name in columns:
            low, value, high = np.exp([logs[name].min(), logs[name].mean(), logs[name].max()])
            rows.append({"side": side, "measure": name, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def main() -> None:
    """Measure our side on the workload in a folder, and write the measurements."""
    folder, out = map(Path, sys.argv[1:])
    workload = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    train(folder, peer.toy(workload), models=[])
    models: list[torch.nn.Module] = []
    with peer.memory(models) as held:
        steps = train(folder, workload, models=models)
    held["weights"] += 4 * workload["width"]  # the reward head is no part of the model
    peer.write(out, steps, held)


if __name__ == "__main__":
    main()
