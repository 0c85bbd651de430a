"""Extraction with an exported model: `extract(engine, documents)` gives reports as they finish, over every engine.

An engine is a way of completing token ids greedily. `transformers` is always there (`batching`), the others where they
are installed.
"""

import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from erlib.lm import models
from erlib.serving import batching
from erlib.serving.batching import Completed
from erlib.serving.export import Settings, read_settings
from erlib.serving.openvino_ir import FOLDER as OPENVINO
from erlib.task.forms import parse_compact
from erlib.task.schema import Brief, Defect, Document, Entity, Parsed, Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CACHE_GB = 1  # of keys and values in OpenVINO

Complete = Callable[[Sequence[list[int]]], Iterator[Completed]]


class Engine(NamedTuple):
    """An opened model: its way of completing token ids, and how it is asked."""

    name: str
    tokenizer: "PreTrainedTokenizerBase"
    settings: Settings
    complete: Complete

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return models.ends(self.tokenizer)


class Extraction(NamedTuple):
    """The report of the document at `index` with its defects, and what it cost.

    A long document was read in `pieces`; `finished` is False when the model ran out of tokens in one of them.
    """

    index: int
    parsed: Parsed
    pieces: int
    finished: bool
    prompt_tokens: int
    new_tokens: int
    first_seconds: float
    seconds: float


# -- the interface ------------------------------------------------------------------------------------------------

# What each engine imports, and what it needs.
ENGINES = {
    "transformers": ("transformers", ""),
    "nf4": ("bitsandbytes", "pip install bitsandbytes"),
    "openvino": ("openvino_genai", "pip install -c constraints.txt -e '.[serve]'"),
    "openvino-bf16": ("openvino_genai", "pip install -c constraints.txt -e '.[serve]', and a CPU that knows bfloat16"),
    "vllm": ("vllm", "pip install vllm, in an environment of its own on a machine with a GPU"),
}


def usable(folder: Path | None = None) -> list[str]:
    """Names of the engines whose packages are installed and that this machine can run; if given, on this export."""
    found = [name for name, (package, _) in ENGINES.items() if importlib.util.find_spec(package)]
    if folder and not (folder / OPENVINO).is_dir():
        found = [name for name in found if not name.startswith("openvino")]
    return [name for name in found if name != "openvino-bf16" or _knows_bfloat16()]


@cache
def _knows_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def fastest(folder: Path) -> str:
    """The engine to take where none is named: vLLM on a GPU, OpenVINO where it can read the folder, transformers."""
    if torch.cuda.is_available():
        return "vllm" if "vllm" in usable() else "transformers"
    return "openvino" if "openvino" in usable(folder) else "transformers"


def open_engine(folder: Path, *, engine: str, batch_size: int = 64, threads: int | None = None) -> Engine:
    """Open an exported model with an engine of `ENGINES`; `threads` limits what it computes with on a CPU.

    Raises ModuleNotFoundError, which says how to install it, for an engine that is not there.
    """
    if engine not in ENGINES:
        raise ValueError(f"no engine {engine!r}: known are {', '.join(ENGINES)}")
    if engine not in usable():
        raise ModuleNotFoundError(f"the engine {engine} cannot be used here, it needs: {ENGINES[engine][1]}")
    settings = read_settings(folder)
    if threads:
        torch.set_num_threads(threads)
    if engine in ("transformers", "nf4"):
        model, tokenizer = models.load(folder, quantisation="nf4" if engine == "nf4" else None)

        def complete(prompts: Sequence[list[int]]) -> Iterator[Completed]:
            limit = settings.max_new_tokens
            return batching.complete(model, tokenizer, prompts, max_new_tokens=limit, batch_size=batch_size)

        return Engine(engine, tokenizer, settings, complete)
    tokenizer = models.load_tokenizer(folder)
    if engine == "vllm":
        return Engine(engine, tokenizer, settings, _vllm(folder, tokenizer, settings))
    precision = "bf16" if engine.endswith("bf16") else "f32"
    opened = _openvino(folder, tokenizer, settings, batch_size=batch_size, threads=threads, precision=precision)
    return Engine(engine, tokenizer, settings, opened)


def extract(engine: Engine, documents: Sequence[Document], *, brief: Brief | None = None) -> Iterator[Extraction]:
    """Extract a report from every document, yielded in the order in which they finish.

    A document that does not fit the model's window is read in pieces that end with a sentence, and their reports are
    merged. Names that do not occur in the document are listed as defects.
    """
    pieces = [split(document.text, engine.tokenizer, engine.settings) for document in documents]
    asking = engine.tokenizer, engine.settings
    prompts = [(index, piece, encode(*asking, piece)) for index, found in enumerate(pieces) for piece in found]
    done: dict[int, dict[int, Completed]] = {index: {} for index in range(len(documents))}
    for completed in engine.complete([ids for _, _, ids in prompts]):
        index = prompts[completed.index][0]
        done[index][completed.index] = completed
        if len(done[index]) < len(pieces[index]):
            continue
        parts = [done[index][place] for place in sorted(done[index])]
        parsed = [parse_compact(text(engine, part), brief=brief, document=prompts[part.index][1]) for part in parts]
        yield Extraction(
            index,
            parsed[0] if len(parsed) == 1 else merge(parsed),
            len(parts),
            all(part.finished for part in parts),
            sum(len(prompts[part.index][2]) for part in parts),
            sum(len(part.ids) for part in parts),
            min(part.first_seconds for part in parts),
            max(part.seconds for part in parts),
        )


def encode(tokenizer: "PreTrainedTokenizerBase", settings: Settings, piece: str) -> list[int]:
    """Token ids of the prompt for a text; what looks like a special token in it stays text."""
    return models.encode_prompt(tokenizer, settings.prompt.replace("{text}", piece))


def text(engine: Engine, completed: Completed) -> str:
    """The text of an answer, without the end token."""
    ids = completed.ids
    return engine.tokenizer.decode(ids[:-1] if ids and ids[-1] in engine.ends else ids)


# -- long documents -----------------------------------------------------------------------------------------------

_BORDERS = [re.compile(border) for border in (r"(?<=[.!?…\n])\s*(?=\S)", r"(?<=\s)(?=\S)")]


def split(text: str, tokenizer: "PreTrainedTokenizerBase", settings: Settings) -> list[str]:
    """Split a text into pieces that fit the window, at sentences; at words or characters where one is too long.

    The pieces make up the whole text but for white space at their borders.
    """
    room = settings.window - len(models.encode_prompt(tokenizer, settings.prompt.replace("{text}", "")))
    if len(text.encode()) <= room:  # a token is at least one byte
        return [text]
    pieces, current, used = [], "", 0
    for unit, size in _units(text, tokenizer, room, 0):
        if used + size > room and current.strip():
            pieces.append(current.strip())
            current, used = "", 0
        current, used = current + unit, used + size
    return [*pieces, current.strip()] if current.strip() or not pieces else pieces


def _units(text: str, tokenizer: "PreTrainedTokenizerBase", room: int, level: int) -> Iterator[tuple[str, int]]:
    """Parts of a text between borders with their numbers of tokens, each at most `room`; finer ones where needed."""
    if level < len(_BORDERS):
        units = _BORDERS[level].split(text)
    else:  # a character is at most four bytes, a token at least one
        units = [text[start : start + room // 4] for start in range(0, len(text), room // 4)]
    short = [unit for unit in units if len(unit) <= 16 * room]  # encoding a megabyte without a border takes minutes
    encoded = iter(tokenizer(short, add_special_tokens=False, split_special_tokens=True)["input_ids"] if short else [])
    for unit in units:
        size = len(next(encoded)) if len(unit) <= 16 * room else room + 1
        if size > room:
            yield from _units(unit, tokenizer, room, level + 1)
        else:
            yield unit, size


def merge(parsed: Sequence[Parsed]) -> Parsed:
    """Join the reports of a document's pieces: an entity once, with the facts of all; a relationship once.

    The type of an entity is the one that it got first. Defects of all pieces are kept.
    """
    entities: dict[str, Entity] = {}
    for one in parsed:
        for entity in one.report.entities:
            known = entities.get(entity.name)
            facts = dict.fromkeys([*(known.facts if known else ()), *entity.facts])
            kind = known.type if known else entity.type
            entities[entity.name] = Entity(name=entity.name, type=kind, summary="; ".join(facts))
    relationships = {relationship.key: relationship for one in parsed for relationship in one.report.relationships}
    defects: tuple[Defect, ...] = tuple(defect for one in parsed for defect in one.defects)
    return Parsed(Report(entities=tuple(entities.values()), relationships=tuple(relationships.values())), defects)


# -- other engines ------------------------------------------------------------------------------------------------


def _openvino(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    settings: Settings,
    *,
    batch_size: int,
    threads: int | None,
    precision: str,
) -> Complete:
    """OpenVINO GenAI's continuous batching; a row whose cache has no room left in `CACHE_GB` waits."""
    import numpy as np
    import openvino
    import openvino_genai

    ends = models.ends(tokenizer)
    if not (folder / OPENVINO).is_dir():
        raise FileNotFoundError(
            f"{folder} has no form for OpenVINO: run phase 11 again where OpenVINO is installed; a model whose layers "
            "look back through a sliding window has none"
        )
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = batch_size
    scheduler.max_num_batched_tokens = max(2048, settings.window)
    scheduler.dynamic_split_fuse = True  # long prompts are read beside the others' next tokens: an eighth faster here
    given = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    given |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder / OPENVINO), scheduler, "CPU", given)
    config = openvino_genai.GenerationConfig(max_new_tokens=settings.max_new_tokens, do_sample=False)
    config.eos_token_id = ends[0]
    config.stop_token_ids = set(ends)

    def complete(prompts: Sequence[list[int]]) -> Iterator[Completed]:
        began = time.perf_counter()
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        handles = {i: pipeline.add_request(i, openvino.Tensor(np.array([prompts[i]])), config) for i in order}
        ids: dict[int, list[int]] = {index: [] for index in handles}
        first: dict[int, float] = {}
        while handles:
            pipeline.step()
            now = time.perf_counter() - began
            for index, handle in list(handles.items()):
                while handle.can_read():
                    first.setdefault(index, now)
                    ids[index] += next(iter(handle.read().values())).generated_ids
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    del handles[index]
                    finished = ids[index][-1] in ends
                    yield Completed(index, ids[index], finished, first[index], now)

    return complete


def _vllm(folder: Path, tokenizer: "PreTrainedTokenizerBase", settings: Settings) -> Complete:
    """vLLM's offline engine; it gives all answers at the end, so `first_seconds` is that of the whole call."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(model=str(folder), max_model_len=settings.window + settings.max_new_tokens, seed=0)
    ends = list(models.ends(tokenizer))
    greedy = SamplingParams(temperature=0.0, max_tokens=settings.max_new_tokens, stop_token_ids=ends)

    def complete(prompts: Sequence[list[int]]) -> Iterator[Completed]:
        began = time.perf_counter()
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], greedy, use_tqdm=False)
        seconds = time.perf_counter() - began
        for index, output in enumerate(outputs):
            written = output.outputs[0]
            yield Completed(index, list(written.token_ids), written.finish_reason == "stop", seconds, seconds)

    return complete
