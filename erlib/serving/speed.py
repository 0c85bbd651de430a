"""What serving costs and what it could cost: latency, throughput, memory, the naive loop, the physical floor.

Ratios hold within one run: `interleaved` measures every way in turns. As a program
(`python -m erlib.serving.speed FOLDER ENGINE FILE`) it is the fresh process whose memory `footprint` reports.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from erlib.chain.manifest import ROOT
from erlib.chain.memory import peak_bytes
from erlib.lm import models
from erlib.serving import bulk, engines
from erlib.task.jsonl import read_jsonl
from erlib.task.metrics import Interval, wilson
from erlib.task.schema import Document

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Answering = Callable[[Sequence[list[int]]], list[list[int]]]  # prompts to answers, in their order

NAIVE = "generate, batched"  # the way that all others are compared with


# -- latency and throughput ---------------------------------------------------------------------------------------


def latency(engine: engines.Engine, prompts: Sequence[list[int]]) -> "pd.DataFrame":
    """Answer prompts one at a time, after a warm-up: columns ttft_ms (first token), token_ms (each later one)."""
    import pandas as pd

    rows = []
    for ids in [prompts[0], *prompts]:
        (done,) = engine.complete([ids])
        later = (done.seconds - done.first_seconds) / (len(done.ids) - 1) if len(done.ids) > 1 else float("nan")
        rows.append((1e3 * done.first_seconds, 1e3 * later))
    return pd.DataFrame(rows[1:], columns=["ttft_ms", "token_ms"])


def answers(engine: engines.Engine, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The answers of an engine in the order of the prompts."""
    found = {done.index: done.ids for done in engine.complete(prompts)}
    return [found[index] for index in range(len(prompts))]


@contextmanager
def processes(folder: Path, work: bulk.Work) -> Iterator[Answering]:
    """A way of answering prompts in several processes that share the cores, all of them open: see `bulk.extract`."""
    workers = work.workers
    with bulk.open_pool(folder, work) as pool:
        while len(set(pool.map(_pid, range(4 * workers)))) < workers:
            pass  # a process starts only where no other is idle

        def ask(prompts: Sequence[list[int]]) -> list[list[int]]:
            found: list[list[int]] = [[] for _ in prompts]
            parts = [prompts[place::workers] for place in range(workers)]
            for place, part in enumerate(pool.map(bulk.answer, parts)):
                found[place::workers] = part
            return found

        yield ask


def _pid(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


@contextmanager
def naive_process(folder: Path, **settings: int) -> Iterator[Answering]:
    """`naive` with the model of a folder in a process of its own, as the engines of `processes` have theirs."""
    with ProcessPoolExecutor(1, mp_context=bulk.processes(), initializer=_load, initargs=(folder,)) as pool:
        yield lambda prompts: pool.submit(_naive, prompts, settings).result()


_loaded: list[Any] = []  # of a process: model and tokenizer


def _load(folder: Path) -> None:
    bulk.follow_parent()
    _loaded[:] = models.load(folder)


def _naive(prompts: Sequence[list[int]], settings: dict[str, int]) -> list[list[int]]:
    return naive(*_loaded, prompts, **settings)


def naive(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: str | None = None,
) -> list[list[int]]:
    """Complete with plain `model.generate`, in batches in the order given: what one writes first."""
    found = []
    ends = models.ends(tokenizer)
    stops = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    for start in range(0, len(prompts), batch_size):
        batch = [{"input_ids": ids} for ids in prompts[start : start + batch_size]]
        padded = tokenizer.pad(batch, return_tensors="pt", padding_side="left").to(model.device)
        written = model.generate(
            **padded,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(ends),
            **stops,
        )
        for ids in written[:, padded["input_ids"].shape[1] :].tolist():
            found.append(ids[: next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))])
    return found


class Measured(NamedTuple):
    """Seconds of every way in every turn (columns way, turn, seconds, load) and the answers of the last turn."""

    seconds: "pd.DataFrame"
    answers: dict[str, list[list[int]]]


def interleaved(ways: Mapping[str, Callable[[], list[list[int]]]], *, turns: int) -> Measured:
    """Run every way in turns, every second turn backwards, so that a machine that slows down slows all of them."""
    import pandas as pd

    rows, found = [], {}
    for turn in range(turns):
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            began = time.perf_counter()
            found[name] = ways[name]()
            rows.append((name, turn, time.perf_counter() - began, os.getloadavg()[0]))
    return Measured(pd.DataFrame(rows, columns=["way", "turn", "seconds", "load"]), found)


def measure_ways(
    folder: Path,
    prompts: Sequence[list[int]],
    *,
    names: Sequence[str],
    opened: Mapping[str, engines.Engine],
    shared: bulk.Work,
    max_new_tokens: int,
    turns: int,
) -> Measured:
    """Time every way of answering all prompts in turns, after a batch to warm up: `NAIVE`, each engine of `names`, and
    one engine in several processes (`shared`, see `in_processes`).

    Every way answers in processes of its own, as it would be served; an engine of `opened` answers in this one, for
    what a second process could not have, such as a GPU.
    """
    batch_size = shared.batch_size
    with ExitStack() as stack:
        naive_ = naive_process(folder, batch_size=batch_size, max_new_tokens=max_new_tokens)
        asking: dict[str, Answering] = {NAIVE: stack.enter_context(naive_)}
        for name in names:
            if name not in opened:
                work = bulk.Work(name, batch_size=batch_size)
                asking[name] = stack.enter_context(processes(folder, work))
        asking[in_processes(shared)] = stack.enter_context(processes(folder, shared))
        for ask in asking.values():
            ask(prompts[:batch_size])
        ways = {name: partial(answers, engine, prompts) for name, engine in opened.items()}
        ways |= {name: partial(ask, prompts) for name, ask in asking.items()}
        return interleaved(ways, turns=turns)


def in_processes(work: bulk.Work) -> str:
    """The name of an engine at work in several processes."""
    return f"{work.engine}, {work.workers} processes"


def same_answers(measured: Measured) -> dict[str, Interval]:
    """Share of the prompts that each way answers as `NAIVE` does, token for token, with Wilson's interval."""
    expected = measured.answers[NAIVE]
    found = {}
    for name, given in measured.answers.items():
        same = [ours == theirs for ours, theirs in zip(given, expected, strict=True)]
        found[name] = wilson(sum(same), len(same))
    return found


def step_table(
    steps: Sequence[tuple[str, str | None]], rate: Mapping[str, float], measured: Measured
) -> "pd.DataFrame":
    """One row for each step (name, comparison or None): name, against, documents_per_hour, factor, low, high.

    `rate` is in documents per hour. The interval is that over turns, for ways that were measured in the same turns.
    """
    import pandas as pd

    nan, rows = float("nan"), []
    for name, against in steps:
        factor = rate[name] / rate[against] if against else nan
        together = against in measured.answers and name in measured.answers
        low, high = ratio(measured.seconds, name, against)[1:] if together else (nan, nan)
        rows.append((name, against, rate[name], factor, low, high))
    return pd.DataFrame(rows, columns=["name", "against", "documents_per_hour", "factor", "low", "high"])


def ratio(seconds: "pd.DataFrame", way: str, against: str) -> Interval:
    """How many times faster `way` is than `against`: geometric mean over turns, smallest and largest turn."""
    import numpy as np

    by_turn = seconds.pivot(index="turn", columns="way", values="seconds")
    logs = np.log(by_turn[against] / by_turn[way])
    return Interval(*(float(np.exp(value)) for value in (logs.mean(), logs.min(), logs.max())))


def sweep(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    *,
    batch_sizes: Sequence[int],
    max_new_tokens: int,
) -> "pd.DataFrame":
    """Throughput and waiting by batch size: batch_size, documents_per_hour, token_ms_p95 (while others are served)."""
    import pandas as pd

    from erlib.serving import batching

    rows = []
    for size in batch_sizes:
        done = list(batching.complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=size))
        gaps = pd.Series([(d.seconds - d.first_seconds) / (len(d.ids) - 1) for d in done if len(d.ids) > 1])
        rows.append((size, 3600 * len(prompts) / max(d.seconds for d in done), 1e3 * gaps.quantile(0.95)))
    return pd.DataFrame(rows, columns=["batch_size", "documents_per_hour", "token_ms_p95"])


def knee(swept: "pd.DataFrame", *, share: float = 0.9) -> int:
    """The smallest batch that reaches `share` of the best throughput: beyond it documents only wait longer."""
    reached = swept["documents_per_hour"] >= share * swept["documents_per_hour"].max()
    return int(swept.loc[reached, "batch_size"].min())


# -- memory of a fresh process ------------------------------------------------------------------------------------


def footprints(folder: Path, names: Sequence[str], documents: Path, *, at_once: int) -> dict[str, dict[str, float]]:
    """`footprint` of each engine, `at_once` of them beside each other."""
    with ThreadPoolExecutor(at_once) as pool:
        found = pool.map(lambda name: footprint(folder, name, documents), names)
        return dict(zip(names, found, strict=True))


def footprint(folder: Path, engine: str, documents: Path) -> dict[str, float]:
    """Peak memory (MB of 2^20 bytes) and seconds to open of a fresh process that extracts from a JSONL of documents."""
    command = [sys.executable, "-m", "erlib.serving.speed", str(folder), engine, str(documents)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{engine} ended with {ended.returncode}:\n" + "\n".join(ended.stderr.splitlines()[-15:]))
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Open the engine, extract once, print what it took."""
    folder, name, path = sys.argv[1:]
    began = time.perf_counter()
    engine = engines.open_engine(Path(folder), engine=name)
    opened = time.perf_counter() - began
    for _ in engines.extract(engine, [Document(**row) for row in read_jsonl(path)]):
        pass
    print(json.dumps({"peak_rss_mb": peak_bytes() / 2**20, "seconds_to_open": opened}))


# -- the physical floor -------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """What the machine does with the threads given: fp32 matrix products (FLOP/s) and memory traffic (bytes/s)."""

    flops: float
    bytes: float


def rates(*, seconds: float = 0.5) -> Rates:
    """Measure the best rate of a large matrix product and of a copy that no cache holds."""
    matrix, source = torch.ones(1024, 1024), torch.ones(32 * 2**20)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(matrix, matrix), seconds)
    copied = _fastest(lambda: target.copy_(source), seconds)
    return Rates(2 * 1024**3 / product, 2 * 4 * source.numel() / copied)


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """Shortest time of a call, repeated for `seconds`."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


class Floor(NamedTuple):
    """Seconds that a document cannot go below: for arithmetic, and for weights and cache over the memory bus."""

    compute_seconds: float
    memory_seconds: float

    @property
    def documents_per_hour(self) -> float:
        return 3600 / max(self)


def floor(model: "PreTrainedModel", rates: Rates, *, prompt_tokens: float, new_tokens: float, batch_size: int) -> Floor:
    """The floor of a document of mean lengths in fp32 when `batch_size` are decoded at once.

    A prompt token costs 2 FLOP per weight outside embedding and head, a new one the head too; both attend to what is
    before them. Memory: weights once for a batch's prompts and once for each of its tokens, keys and values of a
    document at each of its tokens.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = model.num_parameters() - head * (1 if config.tie_word_embeddings else 2)
    width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    context = prompt_tokens + new_tokens / 2
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * width
    flops = prompt_tokens * (2 * body + attention * prompt_tokens / 2)
    flops += new_tokens * (2 * (body + head) + attention * context)
    cache = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * width  # bytes per token
    read = (1 + new_tokens) * 4 * (body + head) / batch_size + new_tokens * context * cache
    return Floor(flops / rates.flops, read / rates.bytes)


if __name__ == "__main__":
    main()
