"""Multi-adapter PPO: update, checkpoints and the guarded training loop.

After Schulman et al. (1707.06347), Ziegler et al. (1909.08593: KL in the reward, its controller) and Ye et al.
(1912.09729: dual clip). What departs from these:

1. policy, reward, value and reference are adapters on one base (`multiadapter`);
2. policy and value share no trained weight: a mini-batch is a forward and backward of the one, then of the other;
3. every process knows all rollouts of a step, and the work on them is divided: any number of processes takes the same
   step as one;
4. a guard on the distribution of rewards (`rewards.guard`) can send training back to its last good checkpoint.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from erlib.chain import memory
from erlib.lm import models
from erlib.policy import losses, rollouts
from erlib.policy.multiadapter import MultiAdapter, RewardModel, check_start, require
from erlib.policy.multiadapter import read_reward_model as read_reward_model
from erlib.policy.rollouts import Sampling, Shaping
from erlib.rewards.guard import Alarm, Guard

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Harness = Callable[["PreTrainedModel"], dict[str, float]]


# -- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """How policy and value model learn from a step's rollouts."""

    learning_rate: float = 1e-3  # of the policy's LoRA on a small LM; 1e-5 to 1e-4 suits one of 7 B parameters
    value_learning_rate: float = 1e-3  # of the value model's
    warmup_steps: int = 1  # steps in which the value model learns alone: advantages of an untrained one are noise
    epochs: int = 2  # passes over a step's rollouts
    mini_batch_size: int = 8  # prompts, with all their samples, per optimiser step
    micro_batch_size: int = 2  # prompts, with all their samples, in memory at once
    clip_range: float = 0.2  # of the ratio (1707.06347)
    value_clip: float = 0.2  # of a value's change, from the end of the warm-up on
    value_coef: float = 0.1  # weight of the value loss
    dual_clip: float = 3.0  # bound on the loss of a bad token that became likelier (1912.09729)
    ratio_threshold: float = 10.0  # a mini-batch whose mean ratio passes it is skipped and counted
    target_kl: float = 0.1  # an update ends where the KL from the policy that sampled passes 1.5 times this
    max_grad_norm: float = 1.0  # of policy and value model, each


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapters of policy and value model."""

    lora_rank: int = 16  # of the reward adapter as well, which the value model starts as
    lora_alpha: int = 32  # twice the rank
    gradient_checkpointing: bool = False  # activations are computed again instead of kept: for large LMs


@dataclass(frozen=True)
class Upkeep:
    """What is watched and kept while training runs."""

    guard_window: int = 5  # steps that the guard looks at together
    alarm_lr_factor: float = 0.25  # of the learning rates after the first alarm
    harness_every: int = 5  # steps between two measurements on gold
    checkpoint_every: int = 5  # steps between two checkpoints


@dataclass(frozen=True)
class Settings:
    """All that a training depends on, beside checkpoint, reward model and prompts."""

    steps: int = 20  # rollouts, scores and updates
    sampling: Sampling = Sampling()
    shaping: Shaping = Shaping()
    update: Update = Update()
    adapter: Adapter = Adapter()
    upkeep: Upkeep = Upkeep()
    seed: int = 0  # every random choice follows from it


# -- the update -----------------------------------------------------------------------------------------------------


def _gradients(
    core: MultiAdapter,
    accelerator: "Accelerator",
    batch: rollouts.Batch,
    groups: list[int],
    *,
    train_policy: bool,
    samples: int,
    update: Update,
) -> dict[str, float]:
    """Gradients of one mini-batch, summed over all processes; gives its losses and ratios, means over its tokens."""
    lengths = batch.mask.sum(dim=1).long()
    tokens = int(lengths.view(-1, samples)[groups].sum())
    parts = rollouts.blocks(batch.rows, groups, samples, accelerator, update.micro_batch_size)
    sums, max_ratio = torch.zeros(5, device=core.device), torch.zeros(1, device=core.device)

    def of(part: list[int], *measures: torch.Tensor) -> list[torch.Tensor]:
        return [measure[part, : int(lengths[part].max())].to(core.device) for measure in measures]

    core.use("policy")  # no switch between a forward pass and its backward pass
    for part in parts if train_policy else []:
        logprobs, _ = core.logprobs([batch.rows[index] for index in part])
        old, advantages, mask = of(part, batch.logprobs, batch.advantages, batch.mask)
        clips = {"clip_range": update.clip_range, "dual_clip": update.dual_clip}
        found = losses.policy_loss(logprobs, old, advantages, mask, **clips)
        (found.loss / tokens).backward()
        sums[:4] += torch.stack([found.loss.detach(), *found[1:4]])
        max_ratio = torch.maximum(max_ratio, found.max_ratio)
    core.use("value")
    for part in parts:
        values = core.values([batch.rows[index] for index in part])
        loss = losses.value_loss(values, *of(part, batch.values, batch.returns, batch.mask), clip=update.value_clip)
        (update.value_coef * loss / tokens).backward()
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
    update: Update,
) -> dict[str, float]:
    """Train policy and value for some epochs on a batch; the means of what its mini-batches measured, and counts."""
    policy, value = (list(core.trained(name).values()) for name in ("policy", "value"))
    exact = core.model.dtype == torch.float32
    measured, skipped, stopped = [], 0, False
    for _ in range(update.epochs):
        order = rng.permutation(len(batch.rows) // samples).tolist()
        for start in range(0, len(order), update.mini_batch_size):
            optimiser.zero_grad(set_to_none=True)
            chosen = order[start : start + update.mini_batch_size]
            shape = {"train_policy": train_policy, "samples": samples, "update": update}
            found = _gradients(core, accelerator, batch, chosen, **shape)
            if train_policy and not measured:
                require(_unmoved(found, exact=exact), "before the first update of a step every ratio is 1")
            if train_policy and found["mean_ratio"] > update.ratio_threshold:
                skipped += 1  # the policy ran away: learn nothing from this
                continue
            stopped = train_policy and found["approx_kl"] > 1.5 * update.target_kl
            if stopped:
                break
            if train_policy:
                found["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(policy, update.max_grad_norm))
                alive = found["grad_norm"] > 0 or not batch.advantages.any()
                require(alive or not first or measured, "the policy's gradient norm is above 0")
            found["value_grad_norm"] = float(torch.nn.utils.clip_grad_norm_(value, update.max_grad_norm))
            optimiser.step()
            measured.append(found)
        if stopped:
            break
    largest = max((found["max_ratio"] for found in measured), default=float("nan"))
    means = {name: float(np.mean([found[name] for found in measured])) for name in (measured[0] if measured else {})}
    counts = {"mini_batches": len(measured), "skipped": skipped, "stopped_early": int(stopped)}
    return means | {"max_ratio": largest} | counts


def _unmoved(found: dict[str, float], *, exact: bool) -> bool:
    """Whether the ratios of a mini-batch are those of a policy that has not moved since it sampled.

    In half precision a row's log-probabilities depend on the rows beside it, and single ratios of 1.6 were seen: there
    the share of them beyond the clip range decides.
    """
    if exact:
        return abs(found["max_ratio"] - 1) < 1e-3 and abs(found["mean_ratio"] - 1) < 1e-3
    return found["clip_fraction"] <= 0.05 and abs(found["mean_ratio"] - 1) < 0.05


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


@dataclass
class _Run:
    """What stays the same while a training runs."""

    core: MultiAdapter
    tokenizer: "PreTrainedTokenizerBase"
    accelerator: "Accelerator"
    optimiser: torch.optim.Optimizer
    prompts: list[list[int]]
    reward: RewardModel
    harness: Harness
    folder: Path  # of the checkpoints
    guard: Guard
    settings: Settings


def train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    reward: RewardModel,
    out: Path,
    checkpoints: Path,
    harness: Harness,
    settings: Settings = Settings(),
) -> Trained:
    """Train a policy adapter on `model`, the merged checkpoint, against a frozen reward model; save it in `out`.

    Each step samples completions at the reward model's temperature, scores all of them, and then trains; the policy
    stays for the first `warmup_steps` while the value model learns. KL is in nats per completion. Log row s belongs to
    the policy after s steps; the last one is sampled and judged, too. A killed run goes on from its last whole
    checkpoint, bit for bit on a CPU. The guard's first alarm restores the last good checkpoint at a lower learning
    rate, the second ends training there. Under `accelerate launch` every process calls this alike, and the main one
    writes. Raises RuntimeError where an invariant is broken.
    """
    import pandas as pd

    ids = [models.encode_prompt(tokenizer, prompt) for prompt in prompts]
    run, state, frozen = _open(model, tokenizer, ids, reward, checkpoints, harness, settings)
    rng = np.random.default_rng()
    while state.alarms < 2:
        rng.bit_generator.state = state.rng
        row = {"step": state.step, "kl_coef": state.kl_coef, "lr_scale": state.lr_scale}
        state.log.append(row)
        # 1. Sample, score with all four models, look.
        batch = _look(run, state, row, rng)
        # 2. Guard: back to the last good checkpoint, and the second time no further.
        alarm = run.guard.update(batch.scores.numpy())
        if alarm is not None:
            state = _go_back(run, state, alarm)
            continue
        if state.step == settings.steps:
            break
        # 3. Advantages over the whole batch, then the update, at a rate that falls to 0.
        _learn(run, state, row, batch, rng)
        # 4. Controller, cursor, checkpoint.
        _advance(run, state, row, rng, completions=len(batch.rows))
    require(run.core.frozen_digest() == frozen, "base, reward adapter and head are byte-identical to the start")
    run.core.use("policy")
    if run.accelerator.is_main_process:
        _save_policy(run.core, out)
        shutil.rmtree(run.folder)
    run.accelerator.wait_for_everyone()
    return Trained(run.core.model, pd.DataFrame(state.log), state.events)


def _open(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    reward: RewardModel,
    checkpoints: Path,
    harness: Harness,
    settings: Settings,
) -> tuple[_Run, _State, str]:
    """Put the adapters on the base and go to the newest whole checkpoint; gives the digest of all that is frozen."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=model.device.type == "cpu")
    model.to(accelerator.device)
    probe = torch.tensor([(prompts[0] * 3)[:64]], device=model.device)  # any text that is long enough
    with models.evaluating(model):
        plain = model(input_ids=probe, use_cache=False).logits
    adapter = settings.adapter
    shape = {"lora_rank": adapter.lora_rank, "lora_alpha": adapter.lora_alpha}
    core = MultiAdapter(model, tokenizer, reward, temperature=reward.temperature, seed=settings.seed, **shape)
    if adapter.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        core.model.train()  # it works in training mode only; dropout is off
    frozen = core.frozen_digest()
    folder = checkpoints / _key(frozen, reward, prompts, settings)
    groups = [{"params": [*core.trained(name).values()]} for name in ("policy", "value")]
    optimiser = torch.optim.Adam(groups, eps=1e-5)
    state = _State(settings.shaping.kl_coef, np.random.default_rng(settings.seed).bit_generator.state)
    newest = _valid(folder)
    if newest:
        state = _restore(newest, core, optimiser)
    accelerator.wait_for_everyone()
    if not newest:
        _save(folder, core, optimiser, state, accelerator)
    check_start(core, plain, probe, fresh=state.step == 0)
    guard = Guard(reward.evaluation, window=settings.upkeep.guard_window)
    guard.load(state.guard)
    run = _Run(core, tokenizer, accelerator, optimiser, prompts, reward, harness, folder, guard, settings)
    return run, state, frozen


def _look(run: _Run, state: _State, row: dict[str, float], rng: np.random.Generator) -> rollouts.Batch:
    """Sample a step's prompts and score the completions; `row` gets what they say of the policy."""
    settings, sampling = run.settings, run.settings.sampling
    drawn = _draw(run.prompts, state.cursor, sampling.prompts_per_step, seed=settings.seed)
    asked = [prompt for prompt in drawn for _ in range(sampling.samples)]
    with _timed(row, "generation"):
        rows = rollouts.collect(run.core, run.tokenizer, run.accelerator, asked, sampling=sampling, rng=rng)
    with _timed(row, "scoring"):
        shape = {"samples": sampling.samples, "batch_size": settings.update.micro_batch_size}
        batch = rollouts.score(run.core, run.accelerator, rows, **shape)
    row |= rollouts.measures(batch, run.reward)
    unmoved = state.step <= settings.update.warmup_steps and state.alarms == 0
    require(not unmoved or not (batch.logprobs - batch.reference).any(), "a policy that has not moved has KL 0")
    due = state.step % settings.upkeep.harness_every == 0 or state.step == settings.steps
    if due and run.accelerator.is_main_process:
        with run.core.scoring():
            row |= run.harness(run.core.model)
    return batch


def _learn(run: _Run, state: _State, row: dict[str, float], batch: rollouts.Batch, rng: np.random.Generator) -> None:
    """Turn scores into advantages and train policy and value model on them; `row` gets what the update measured."""
    settings, update = run.settings, run.settings.update
    with _timed(row, "update"):
        batch = rollouts.with_advantages(batch, run.reward, kl_coef=state.kl_coef, shaping=settings.shaping)
        rates = (update.learning_rate, update.value_learning_rate)
        for group, rate in zip(run.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * state.lr_scale * (1 - state.step / settings.steps)
        begins, moves = state.step == update.warmup_steps, state.step >= update.warmup_steps
        if not moves:
            update = replace(update, value_clip=math.inf)  # it has far to go, and nothing rests on it
        row |= _update(
            run.core, run.optimiser, run.accelerator, batch,
            rng=rng, train_policy=moves, first=begins, samples=settings.sampling.samples, update=update,
        )  # fmt: skip
    row["learning_rate"] = run.optimiser.param_groups[0]["lr"]
    row["explained_variance"] = losses.explained_variance(batch.values, batch.returns, batch.mask)
    row["peak_memory_mb"] = memory.peak_bytes(run.core.device.type) / 2**20


def _advance(run: _Run, state: _State, row: dict[str, float], rng: np.random.Generator, *, completions: int) -> None:
    """Go to the next step: the KL controller, the prompts that come next, a checkpoint where one is due."""
    settings, shaping, upkeep = run.settings, run.settings.shaping, run.settings.upkeep
    controller = losses.AdaptiveKL(state.kl_coef, shaping.kl_target, shaping.kl_horizon)
    controller.update(row["kl"], completions)
    state.kl_coef = controller.coef
    state.step, state.cursor = state.step + 1, state.cursor + settings.sampling.prompts_per_step
    state.rng, state.guard = rng.bit_generator.state, run.guard.state_dict()
    if state.step % upkeep.checkpoint_every == 0 or state.step == settings.steps:
        _save(run.folder, run.core, run.optimiser, state, run.accelerator)
        _prune(run.folder, settled=state.step - upkeep.guard_window)


def _key(frozen: str, reward: RewardModel, prompts: Sequence[list[int]], settings: Settings) -> str:
    """Name of a training run: another checkpoint or reward model, other prompts or settings never resume it."""
    judged = [reward.mean, reward.std, reward.temperature, reward.evaluation.tolist()]
    content = json.dumps([frozen, judged, prompts, asdict(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _draw(prompts: Sequence[list[int]], cursor: int, n: int, *, seed: int) -> list[list[int]]:
    """The `n` prompts from `cursor` on; each pass over them has an order of its own."""
    orders = {
        turn: np.random.default_rng([seed, turn]).permutation(len(prompts))
        for turn in range(cursor // len(prompts), (cursor + n - 1) // len(prompts) + 1)
    }
    return [prompts[orders[at // len(prompts)][at % len(prompts)]] for at in range(cursor, cursor + n)]


def _go_back(run: _Run, state: _State, alarm: Alarm) -> _State:
    """Restore the newest checkpoint whose policy was sampled before the alarm's window, and save it as the newest.

    Log and alarms stay; the learning rate falls.
    """
    upkeep = run.settings.upkeep
    good = _valid(run.folder, up_to=max(0, state.step - upkeep.guard_window))
    if good is None:
        raise RuntimeError(f"{run.folder}: no whole checkpoint to go back to after an alarm at step {state.step}")
    before = _restore(good, run.core, run.optimiser)
    for path in run.folder.glob("step-*.safetensors"):
        if path > good:
            path.unlink(missing_ok=True)
    action = "restored" if state.alarms == 0 else "ended"
    event = {"step": state.step, "action": action, "restored_step": before.step, **alarm._asdict()}
    before.log, before.events, before.alarms = state.log, [*state.events, event], state.alarms + 1
    before.lr_scale, before.guard = state.lr_scale * upkeep.alarm_lr_factor, {"steps": []}
    run.guard.load(before.guard)
    run.accelerator.wait_for_everyone()  # all have read what main now replaces
    _save(run.folder, run.core, run.optimiser, before, run.accelerator)
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
