"""Multi-adapter PPO: update, checkpoints and the guarded training loop.

After Schulman et al. (1707.06347), Ziegler et al. (1909.08593: KL in the reward, its controller) and Ye et al.
(1912.09729: dual clip). What departs from these:

1. policy, reward, value and reference are adapters on one base (`multiadapter`);
2. policy and value share no trained weight: a mini-batch is a forward and backward of the one, then of the other;
3. every process knows all rollouts of a step, and the work on them is divided: any number of processes takes the same
   step as one;
4. a guard on the distribution of rewards (`monitor`) can send training back to its last good checkpoint.
"""

import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from erlib.lm import models
from erlib.policy import losses, rollouts
from erlib.policy.multiadapter import MultiAdapter, RewardModel, check_start, require
from erlib.policy.multiadapter import read_reward_model as read_reward_model
from erlib.rewards.guard import Alarm, Guard

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Harness = Callable[["PreTrainedModel"], dict[str, float]]


# -- the update -----------------------------------------------------------------------------------------------------


def _gradients(
    core: MultiAdapter,
    accelerator: "Accelerator",
    batch: rollouts.Batch,
    groups: list[int],
    *,
    train_policy: bool,
    samples: int,
    micro_batch_size: int,
    clip_range: float,
    dual_clip: float,
    value_clip: float,
    value_coef: float,
) -> dict[str, float]:
    """Gradients of one mini-batch, summed over all processes; gives its losses and ratios, means over its tokens."""
    lengths = batch.mask.sum(dim=1).long()
    tokens = int(lengths.view(-1, samples)[groups].sum())
    parts = rollouts.blocks(batch.rows, groups, samples, accelerator, micro_batch_size)
    sums, max_ratio = torch.zeros(5, device=core.device), torch.zeros(1, device=core.device)

    def of(part: list[int], *measures: torch.Tensor) -> list[torch.Tensor]:
        return [measure[part, : int(lengths[part].max())].to(core.device) for measure in measures]

    core.use("policy")  # no switch between a forward pass and its backward pass
    for part in parts if train_policy else []:
        logprobs, _ = core.logprobs([batch.rows[index] for index in part])
        old, advantages, mask = of(part, batch.logprobs, batch.advantages, batch.mask)
        found = losses.policy_loss(logprobs, old, advantages, mask, clip_range=clip_range, dual_clip=dual_clip)
        (found.loss / tokens).backward()
        sums[:4] += torch.stack([found.loss.detach(), *found[1:4]])
        max_ratio = torch.maximum(max_ratio, found.max_ratio)
    core.use("value")
    for part in parts:
        values = core.values([batch.rows[index] for index in part])
        loss = losses.value_loss(values, *of(part, batch.values, batch.returns, batch.mask), clip=value_clip)
        (value_coef * loss / tokens).backward()
        sums[4] += loss.detach()
    core.use("policy")
    if accelerator.num_processes > 1:
        trained = [*(core.trained("policy").values() if train_policy else ()), *core.trained("value").values()]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="sum")
        for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            parameter.grad = part.view_as(parameter)
        sums, max_ratio = accelerator.reduce(sums, reduction="sum"), accelerator.gather(max_ratio).max()
    names = ("policy_loss", "clip_fraction", "mean_ratio", "approx_kl", "value_loss")
    return dict(zip(names, (sums / tokens).tolist(), strict=True)) | {"max_ratio": float(max_ratio)}


def _update(
    core: MultiAdapter,
    optimiser: torch.optim.Optimizer,
    accelerator: "Accelerator",
    batch: rollouts.Batch,
    *,
    rng: np.random.Generator,
    train_policy: bool,
    first: bool,
    samples: int,
    epochs: int,
    mini_batch_size: int,
    ratio_threshold: float,
    target_kl: float,
    max_grad_norm: float,
    **shape: Any,
) -> dict[str, float]:
    """Train policy and value for some epochs on a batch; the means of what its mini-batches measured, and counts."""
    policy, value = (list(core.trained(name).values()) for name in ("policy", "value"))
    tolerance = 1e-3 if core.model.dtype == torch.float32 else 0.5  # bf16 depends on the rows beside a row
    measured, skipped, stopped = [], 0, False
    for _ in range(epochs):
        order = rng.permutation(len(batch.rows) // samples).tolist()
        for start in range(0, len(order), mini_batch_size):
            optimiser.zero_grad(set_to_none=True)
            chosen = order[start : start + mini_batch_size]
            found = _gradients(core, accelerator, batch, chosen, train_policy=train_policy, samples=samples, **shape)
            if train_policy and not measured:
                unmoved = abs(found["max_ratio"] - 1) < tolerance and abs(found["mean_ratio"] - 1) < tolerance
                require(unmoved, "before the first update of a step every ratio is 1")
            if train_policy and found["mean_ratio"] > ratio_threshold:  # the policy ran away: learn nothing from this
                skipped += 1
                continue
            stopped = train_policy and found["approx_kl"] > 1.5 * target_kl
            if stopped:
                break
            if train_policy:
                found["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(policy, max_grad_norm))
                alive = found["grad_norm"] > 0 or not batch.advantages.any()
                require(alive or not first or measured, "the policy's gradient norm is above 0")
            found["value_grad_norm"] = float(torch.nn.utils.clip_grad_norm_(value, max_grad_norm))
            optimiser.step()
            measured.append(found)
        if stopped:
            break
    largest = max((found["max_ratio"] for found in measured), default=float("nan"))
    means = {name: float(np.mean([found[name] for found in measured])) for name in (measured[0] if measured else {})}
    counts = {"mini_batches": len(measured), "skipped": skipped, "stopped_early": int(stopped)}
    return means | {"max_ratio": largest} | counts


# -- checkpoints: one file each, so that it is there whole or not at all ----------------------------------------------


@dataclass
class _State:
    """Where training stands, beside the weights: all of it is in every checkpoint."""

    kl_coef: float
    rng: dict[str, Any]
    step: int = 0
    cursor: int = 0  # prompts drawn so far
    lr_scale: float = 1.0
    alarms: int = 0
    log: list[dict[str, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    guard: dict[str, Any] = field(default_factory=lambda: {"steps": []})


def _tensors(core: MultiAdapter, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every trained weight and every moment of the optimiser, by name: the tensors themselves, not copies."""
    weights = core.trained("policy") | core.trained("value")
    moments = {
        f"adam.{key}.{name}": optimiser.state[parameter][key]
        for name, parameter in weights.items()
        for key in optimiser.state.get(parameter, {})
    }
    return {name: parameter.data for name, parameter in weights.items()} | moments


def _save(
    folder: Path, core: MultiAdapter, optimiser: torch.optim.Optimizer, state: _State, accelerator: "Accelerator"
) -> None:
    """Write a checkpoint of the state's step from the main process; the others wait."""
    from safetensors.torch import save_file

    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state.step:06d}.safetensors"
    part = path.with_suffix(".part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(core, optimiser).items()}
    save_file(tensors, part, metadata={"state": json.dumps(asdict(state))})
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    accelerator.wait_for_everyone()


def _restore(path: Path, core: MultiAdapter, optimiser: torch.optim.Optimizer) -> _State:
    """Put weights and moments back, and give the state; raises SafetensorError on a truncated file."""
    from safetensors import safe_open

    weights = core.trained("policy") | core.trained("value")
    with safe_open(path, framework="pt") as file:
        state = _State(**json.loads(file.metadata()["state"]))
        optimiser.state.clear()
        for name in file.keys():  # noqa: SIM118 - not a dict
            if not name.startswith("adam."):
                weights[name].data.copy_(file.get_tensor(name))
                continue
            _, key, parameter = name.split(".", 2)
            tensor = file.get_tensor(name)
            moments = optimiser.state[weights[parameter]]
            moments[key] = tensor if key == "step" else tensor.to(core.device)
    return state


def _valid(folder: Path, *, up_to: int | None = None) -> Path | None:
    """The newest whole checkpoint, of step `up_to` at most; truncated ones that are met on the way are removed."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            path.unlink(missing_ok=True)
            continue
        if up_to is None or int(path.stem.removeprefix("step-")) <= up_to:
            return path
    return None


def _prune(folder: Path, *, settled: int) -> None:
    """Keep the two newest checkpoints up to step `settled`, and all behind it: an alarm may still condemn those."""
    old = [path for path in sorted(folder.glob("step-*.safetensors")) if int(path.stem[5:]) <= settled]
    for path in old[:-2]:
        path.unlink(missing_ok=True)


# -- training -------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """The model with the policy switched on, one log row for each policy that was sampled, and the guard's events."""

    model: "PreTrainedModel"
    log: "pd.DataFrame"
    events: list[dict[str, Any]]


def train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    reward: RewardModel,
    out: Path,
    checkpoints: Path,
    harness: Harness,
    steps: int = 20,
    prompts_per_step: int = 16,
    samples: int = 4,
    max_new_tokens: int = 192,
    stop: Sequence[str] = (models.BLANK_LINE,),
    learning_rate: float = 1e-3,
    value_learning_rate: float = 1e-3,
    warmup_steps: int = 1,
    epochs: int = 2,
    mini_batch_size: int = 8,
    micro_batch_size: int = 2,
    kl_coef: float = 0.15,
    kl_target: float | None = 6.0,
    kl_horizon: int = 10_000,
    reward_clip: float = 5.0,
    missing_end_penalty: float = 1.0,
    dense_reward: bool = True,
    whiten_rewards: bool = False,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip_range: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    dual_clip: float = 3.0,
    ratio_threshold: float = 10.0,
    target_kl: float = 0.1,
    max_grad_norm: float = 1.0,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    guard_window: int = 5,
    alarm_lr_factor: float = 0.25,
    generation_batch_size: int = 64,
    harness_every: int = 5,
    checkpoint_every: int = 5,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Trained:
    """Train a policy adapter on `model`, the merged checkpoint, against a frozen reward model; save it in `out`.

    Sizes of mini-batches and micro-batches (what fits into memory at once) are in prompts with all their samples. Each
    step samples `samples` completions of `prompts_per_step` prompts at the reward model's temperature, scores all of
    them, and then trains for `epochs` epochs; the policy stays for `warmup_steps` steps while the value model learns.
    KL is in nats a completion. With `dense_reward` each token gets what it adds to the score, else the last one gets
    all of it: the sum is the same, and credit falls nearer to what earned it. Log row s belongs to the policy after s
    steps; the last one is sampled and judged, too. A killed run goes on from its last whole checkpoint, bit for bit on
    a CPU. The guard's first alarm restores the last good checkpoint at a lower learning rate, the second ends training
    there. Under `accelerate launch` every process calls this alike, and the main one writes.
    """
    import pandas as pd
    from accelerate import Accelerator

    settings = {k: v for k, v in locals().items() if isinstance(v, int | float | None)} | {"stop": list(stop)}
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    model.to(accelerator.device)
    ids = [models.encode_prompt(tokenizer, prompt) for prompt in prompts]
    probe = torch.tensor([(ids[0] * 3)[:64]], device=model.device)  # any text that is long enough
    with models.evaluating(model):
        plain = model(input_ids=probe, use_cache=False).logits
    core = MultiAdapter(
        model, tokenizer, reward, lora_rank=lora_rank, lora_alpha=lora_alpha, temperature=reward.temperature, seed=seed
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        core.model.train()  # it works in training mode only; dropout is off
    frozen = core.frozen_digest()
    folder = checkpoints / _key(frozen, reward, ids, settings)
    rates = {"policy": learning_rate, "value": value_learning_rate}
    optimiser = torch.optim.Adam([{"params": [*core.trained(name).values()]} for name in rates], eps=1e-5)
    newest = _valid(folder)
    state = _State(kl_coef, np.random.default_rng(seed).bit_generator.state)
    if newest:
        state = _restore(newest, core, optimiser)
    accelerator.wait_for_everyone()
    if not newest:
        _save(folder, core, optimiser, state, accelerator)
    check_start(core, plain, probe, fresh=state.step == 0)
    sampling = {"batch_size": generation_batch_size, "max_new_tokens": max_new_tokens, "stop": stop}
    shaping = {
        "clip": reward_clip, "missing_end": missing_end_penalty, "dense": dense_reward,
        "whiten_rewards": whiten_rewards, "gamma": gamma, "lam": lam,
    }  # fmt: skip
    updating = {
        "samples": samples, "epochs": epochs, "mini_batch_size": mini_batch_size, "micro_batch_size": micro_batch_size,
        "clip_range": clip_range, "dual_clip": dual_clip, "value_clip": value_clip, "value_coef": value_coef,
        "ratio_threshold": ratio_threshold, "target_kl": target_kl, "max_grad_norm": max_grad_norm,
    }  # fmt: skip
    guard, rng = Guard(reward.evaluation, window=guard_window), np.random.default_rng()
    guard.load(state.guard)
    while state.alarms < 2:
        rng.bit_generator.state = state.rng
        drawn = [p for p in _draw(ids, state.cursor, prompts_per_step, seed=seed) for _ in range(samples)]
        row = {"step": state.step, "kl_coef": state.kl_coef, "lr_scale": state.lr_scale}
        # 1. Sample, score with all four models, look.
        with _timed(row, "generation"):
            rows = rollouts.collect(core, tokenizer, accelerator, drawn, rng=rng, **sampling)
        with _timed(row, "scoring"):
            batch = rollouts.score(core, accelerator, rows, samples=samples, batch_size=micro_batch_size)
        row |= rollouts.measures(batch, reward)
        unmoved = state.step <= warmup_steps and state.alarms == 0
        require(not unmoved or not (batch.logprobs - batch.reference).any(), "a policy that has not moved has KL 0")
        if accelerator.is_main_process and (state.step % harness_every == 0 or state.step == steps):
            with core.scoring():
                row |= harness(core.model)
        state.log.append(row)
        # 2. Guard: back to the last good checkpoint, and the second time no further.
        alarm = guard.update(batch.scores.numpy())
        if alarm is not None:
            state = _go_back(folder, core, optimiser, state, alarm, window=guard_window, factor=alarm_lr_factor)
            guard.load(state.guard)
            accelerator.wait_for_everyone()  # all have read what main now replaces
            _save(folder, core, optimiser, state, accelerator)
            continue
        if state.step == steps:
            break
        # 3. Advantages over the whole batch, then the update, at a rate that falls to 0.
        with _timed(row, "update"):
            batch = rollouts.with_advantages(batch, reward, kl_coef=state.kl_coef, **shaping)
            for group, rate in zip(optimiser.param_groups, rates.values(), strict=True):
                group["lr"] = rate * state.lr_scale * (1 - state.step / steps)
            begins, moves = state.step == warmup_steps, state.step >= warmup_steps
            shape = updating | ({} if moves else {"value_clip": math.inf})  # it has far to go, and nothing rests on it
            row |= _update(core, optimiser, accelerator, batch, rng=rng, train_policy=moves, first=begins, **shape)
        row["learning_rate"] = optimiser.param_groups[0]["lr"]
        row["explained_variance"] = losses.explained_variance(batch.values, batch.returns, batch.mask)
        row["peak_memory_mb"] = _peak_memory_mb(core.device)
        # 4. Controller, cursor, checkpoint.
        controller = losses.AdaptiveKL(state.kl_coef, kl_target, kl_horizon)
        controller.update(row["kl"], len(rows))
        state.step, state.cursor, state.kl_coef = state.step + 1, state.cursor + prompts_per_step, controller.coef
        state.rng, state.guard = rng.bit_generator.state, guard.state_dict()
        if state.step % checkpoint_every == 0 or state.step == steps:
            _save(folder, core, optimiser, state, accelerator)
            _prune(folder, settled=state.step - guard_window)
    require(core.frozen_digest() == frozen, "base, reward adapter and reward head are byte-identical to the start")
    core.use("policy")
    if accelerator.is_main_process:
        _save_policy(core, out)
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    return Trained(core.model, pd.DataFrame(state.log), state.events)


def _key(frozen: str, reward: RewardModel, prompts: Sequence[list[int]], settings: dict[str, Any]) -> str:
    """Name of a training run: another checkpoint or reward model, other prompts or settings never resume it."""
    judged = [reward.mean, reward.std, reward.temperature, reward.evaluation.tolist()]
    return hashlib.sha256(json.dumps([frozen, judged, prompts, settings], sort_keys=True).encode()).hexdigest()[:16]


def _draw(prompts: Sequence[list[int]], cursor: int, n: int, *, seed: int) -> list[list[int]]:
    """The `n` prompts from `cursor` on; each pass over them has an order of its own."""
    orders = {
        turn: np.random.default_rng([seed, turn]).permutation(len(prompts))
        for turn in range(cursor // len(prompts), (cursor + n - 1) // len(prompts) + 1)
    }
    return [prompts[orders[at // len(prompts)][at % len(prompts)]] for at in range(cursor, cursor + n)]


def _go_back(
    folder: Path,
    core: MultiAdapter,
    optimiser: torch.optim.Optimizer,
    state: _State,
    alarm: Alarm,
    *,
    window: int,
    factor: float,
) -> _State:
    """Restore the newest checkpoint whose policy was sampled before the alarm's window; log and alarms stay."""
    good = _valid(folder, up_to=max(0, state.step - window))
    if good is None:
        raise RuntimeError(f"{folder}: no whole checkpoint to go back to after an alarm at step {state.step}")
    before = _restore(good, core, optimiser)
    for path in folder.glob("step-*.safetensors"):
        if path > good:
            path.unlink(missing_ok=True)
    action = "restored" if state.alarms == 0 else "ended"
    event = {"step": state.step, "action": action, "restored_step": before.step, **alarm._asdict()}
    before.log, before.events, before.alarms = state.log, [*state.events, event], state.alarms + 1
    before.lr_scale, before.guard = state.lr_scale * factor, {"steps": []}
    return before


def _save_policy(core: MultiAdapter, out: Path) -> None:
    """Write the policy as a plain LoRA folder, with its modules in order: peft writes a set."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(core.model, adapter_name="policy")
    save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, out / "adapter_model.safetensors")
    config = core.model.peft_config["policy"].to_dict()
    config |= {"target_modules": sorted(config["target_modules"]), "inference_mode": True}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, default=sorted) + "\n", encoding="utf-8")


@contextmanager
def _timed(row: dict[str, float], part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    row[f"seconds_{part}"] = time.perf_counter() - began


def _peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
