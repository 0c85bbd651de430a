"""Local language models: load, encode, generate, log-probabilities.

`generate` is its own decoding loop instead of `model.generate`, because

1. a model's generation_config can bring back top-k, top-p or penalties silently; here there is nothing to bring back,
2. the beginning that all prompts of a batch share (instructions, exemplars) is computed once,
3. finished rows leave the batch, and
4. a sample depends on the seed and the position of its prompt, not on its neighbours in the batch.
"""

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from erlib.lm import parallel
from erlib.lm.packing import Rollout, causal_lm, last_states, pack_for, token_logprobs
from erlib.task.forms import flatten, short_prompt
from erlib.task.schema import Document

if TYPE_CHECKING:
    from transformers import (
        BitsAndBytesConfig,
        DynamicCache,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainingArguments,
    )
    from transformers.cache_utils import DynamicLayer

EMBEDDED = Path(__file__).parents[1] / "world" / "base_model"
BLANK_LINE = "\n\n"
DAY = "{%- macro strftime_now(_) -%}26 Jul 2024{%- endmacro -%}"  # of chat templates that would write today's
LOOK = {"cpu": 1}  # tokens between two looks at which rows ended; elsewhere 8, for each look waits for the device
ROOM = 256  # tokens that a cache can grow by before it is copied
ALONE = 64  # prompts that are not worth a second process: a fork copies what both of them touch
Prompt = str | list[int]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# -- load ---------------------------------------------------------------------------------------------------------


def load(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    allow_download: bool = False,
    chat: bool = True,
    quantisation: Literal["nf4"] | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal LM in evaluation mode and its tokenizer: `embedded`, a folder, a `.gguf` file, or a hub name.

    The tokenizer is that of `load_tokenizer`. A `dtype` of "auto" is the one that the weights were saved in.
    `quantisation="nf4"` packs the linear layers into 4 bits while loading; they compute in `dtype`. A folder that
    `quantise` wrote needs no such word: it comes back as it was written. Raises FileNotFoundError for a hub name that
    is not in the local cache, unless `allow_download`.
    """
    from transformers import AutoModelForCausalLM

    name = str(EMBEDDED if name_or_path == "embedded" else name_or_path)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokenizer = load_tokenizer(name, allow_download=allow_download, chat=chat)
    if quantisation and dtype == "auto":
        dtype = saved_dtype(name, allow_download=allow_download)
    number = dtype if dtype == "auto" else getattr(torch, dtype)
    if name.endswith(".gguf"):
        from erlib.lm import gguf

        return gguf.load_model(Path(name), dtype=number).to(device).eval(), tokenizer
    packed = {"quantization_config": nf4(dtype), "device_map": {"": device}} if quantisation == "nf4" else {}
    with _naming(name):
        model = AutoModelForCausalLM.from_pretrained(
            name, local_files_only=not allow_download, dtype=number, use_safetensors=True, **packed
        )
    return model.to(device).eval(), tokenizer


def saved_dtype(folder: str | Path, *, allow_download: bool = False) -> str:
    """The type that the weights of a folder or a hub name were saved in, such as "bfloat16"; GGUF's are unpacked."""
    from transformers import AutoConfig

    if str(folder).endswith(".gguf"):
        return "float32"
    return str(AutoConfig.from_pretrained(folder, local_files_only=not allow_download).dtype).removeprefix("torch.")


def load_tokenizer(
    name_or_path: str | Path, *, allow_download: bool = False, chat: bool = True
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that `load` gives with the LM, alone.

    It pads on the left, reads the text of special tokens as text, and knows the tokens that end an answer (`ends`).
    Without `chat` it forgets its chat template, and prompts are bare text: the choice for an LM that was only
    pre-trained but ships with a template. A checkpoint that is merged keeps the choice.
    """
    from transformers import AutoTokenizer

    name = str(EMBEDDED if name_or_path == "embedded" else name_or_path)
    if name.endswith(".gguf"):
        from erlib.lm import gguf

        tokenizer, known = gguf.load_tokenizer(Path(name)), []
    else:
        with _naming(name):
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=not allow_download)
        known = _configured_ends(name, allow_download=allow_download)
    tokenizer.padding_side, tokenizer.split_special_tokens = "left", True
    template = tokenizer.chat_template if chat else None
    tokenizer.chat_template = template.get("default") if isinstance(template, dict) else template  # several by name
    found = [_turn_end(tokenizer), tokenizer.eos_token_id, *known]
    tokenizer.end_ids = tuple(dict.fromkeys(end for end in found if end is not None))
    if not tokenizer.end_ids:
        raise ValueError(f"{name} has no end token: name one as eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:  # any token will do: padding is masked by length everywhere
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokenizer.end_ids[0])
    return tokenizer


def _configured_ends(name: str, *, allow_download: bool) -> list[int]:
    """The end tokens of a model's generation_config.json, or of its config.json where there is none."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(name, local_files_only=not allow_download)
    except OSError:
        with _naming(name):
            config = AutoConfig.from_pretrained(name, local_files_only=not allow_download)
    ids = getattr(config, "eos_token_id", None)
    return [ids] if isinstance(ids, int) else list(ids or ())


def ends(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The tokens that end an answer, those of the model's generation_config among them; training teaches the first.

    For a chat model the first one is what its template puts behind an answer, else the tokenizer's end token.
    """
    return getattr(tokenizer, "end_ids", (tokenizer.eos_token_id,))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say which model cannot be loaded, and what to do."""
    try:
        yield
    except OSError as error:
        advice = "set allow_download to fetch it from the hub, or name a folder with config.json and model.safetensors"
        raise FileNotFoundError(f"model {name!r} cannot be loaded: {advice} ({error})") from error


def one_device(arguments: "TrainingArguments") -> "TrainingArguments":
    """A trainer's arguments, for a process that trains on one device, however many it sees.

    HF's Trainer would wrap the model in DataParallel there and multiply the batch. Several processes, by `accelerate
    launch`, have a device each.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before it comes back, also after an error."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def folded(model: torch.nn.Module) -> Iterator[None]:
    """While it lasts, the LoRA adapters that are on are part of the weights, and cost a forward pass nothing.

    The weights before it come back bit for bit. Quantised ones cannot take an adapter in and stay as they are. In half
    precision a folded weight is rounded anew: good for sampling, not for log-probabilities that are compared.
    """
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and layer.active_adapters]
    layers = [layer for layer in layers if layer.get_base_layer().weight.is_floating_point()]
    before = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, before, strict=True):
            with torch.no_grad():
                changes = [layer.get_delta_weight(name) for name in layer.active_adapters]
                layer.get_base_layer().weight.data = sum(changes, weight).to(weight.dtype)
            layer.merged_adapters = [*layer.active_adapters]  # by this peft knows that they are in the weight
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters = []


# -- prompts to token ids -----------------------------------------------------------------------------------------


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """Token ids of a prompt, a user's message where there is a chat template, in its `frame`; ids pass through."""
    if not isinstance(prompt, str):
        return list(prompt)
    before, after = frame(tokenizer)
    return [*before, *tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"], *after]


def frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before and after every prompt: the start token, or what a chat template puts around a message."""
    return _frame(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=64)
def _frame(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not template:
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        begin = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
        return tuple(whole[:begin]), ()
    before, after = _around(tokenizer, [{"role": "user", "content": ""}])
    return tuple(before), tuple(after)


def fits(tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int, max_new_tokens: int) -> Callable[[Document], bool]:
    """Tells of a document whether its short prompt and the longest report have `max_tokens` together at most.

    It is what `reserve.draw` asks of the documents that a phase reads.
    """
    return lambda document: len(encode_prompt(tokenizer, short_prompt(document.text))) + max_new_tokens <= max_tokens


def encode_completion(tokenizer: "PreTrainedTokenizerBase", completion: Prompt) -> list[int]:
    """Token ids of a completion and the end token; ids pass through."""
    if not isinstance(completion, str):
        return list(completion)
    ids = tokenizer(completion, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, ends(tokenizer)[0]]


def encode_messages(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of chat messages: by the tokenizer's chat template, or by `forms.flatten` where there is none.

    The template's own text may become special tokens, the contents never do. Where a template refuses or drops a
    system message, that becomes the beginning of the user's.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return encode_prompt(tokenizer, flatten(messages))
    try:
        around = _around(tokenizer, messages)
    except (TemplateError, ValueError):
        if messages[0]["role"] != "system":
            raise
        system, user, *others = messages
        folded = user | {"content": f"{system['content']}\n\n{user['content']}"}
        return encode_messages(tokenizer, [folded, *others])
    ids = around[0]
    for message, behind in zip(messages, around[1:], strict=True):
        ids += tokenizer(message["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += behind
    return ids


def _around(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]], *, asking: bool = True
) -> list[list[int]]:
    """Token ids of a chat template's own text before, between and behind messages; ValueError where it drops one.

    The day is always the same: some templates write today's, and a run would then depend on it.
    """
    marks = [f"\x00{index}\x00" for index in range(len(messages))]
    rest = tokenizer.apply_chat_template(
        [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)],
        tokenize=False,
        chat_template=DAY + tokenizer.chat_template,
        add_generation_prompt=asking,
        enable_thinking=False,
    )
    texts = []
    for message, mark in zip(messages, marks, strict=True):
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(f"the chat template does not write the {message['role']}'s message")
        texts.append(before)
    encoded = tokenizer([*texts, rest], add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return [list(ids) for ids in encoded]


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token by which a chat template ends an answer, if there is a template and it has one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    behind = _around(tokenizer, turns, asking=False)[-1]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in behind if token in special), None)


# -- generate -----------------------------------------------------------------------------------------------------


class Completion(NamedTuple):
    """What a model wrote: `text` without the stop, `ids` with it; `finished` is False when it ran out of tokens.

    `logprobs` are those of the ids under the model at temperature 1, whatever temperature they were drawn at.
    """

    text: str
    ids: tuple[int, ...]
    n_prompt_tokens: int
    finished: bool
    logprobs: tuple[float, ...]

    @property
    def n_new_tokens(self) -> int:
        return len(self.ids)


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int | Sequence[Sequence[int]] = 0,
    stop: Sequence[str] = (),
) -> list[Completion]:
    """Complete every prompt, greedily or by sampling softmax(logits / temperature), until an end token or a stop.

    Results keep the order of the prompts. Sampling follows from `seed` and the place of a prompt, or from the numbers
    that `seed` has for each prompt. Raises ValueError when a prompt and `max_new_tokens` exceed the context.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    limit = getattr(model.config, "max_position_embeddings", None)
    for index, ids in enumerate(encoded):
        if limit and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} it exceeds the model's "
                f"context of {limit}: shorten the document or the prompt"
            )
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    size = min(batch_size, max(ALONE, math.ceil(len(order) / parallel.cores(model.device))))  # a batch for each core
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    seeds = [(seed, index) for index in range(len(prompts))] if isinstance(seed, int) else seed

    def complete(rows: list[int]) -> list[Completion]:
        uniform = None
        if temperature > 0:
            draws = [np.random.default_rng(seeds[index]).random(max_new_tokens) for index in rows]
            uniform = torch.tensor(np.array(draws), device=model.device)
        new = _decode(
            model,
            tokenizer,
            [encoded[index] for index in rows],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            uniform=uniform,
            stop=stop,
        )
        return [
            Completion(_text(tokenizer, ids, stop), tuple(ids), len(encoded[index]), finished, tuple(logprobs))
            for index, (ids, finished, logprobs) in zip(rows, new, strict=True)
        ]

    batches.reverse()  # the longest first
    with evaluating(model):
        found = parallel.each(complete, batches, device=model.device)
    completions = {i: one for rows, ones in zip(batches, found, strict=True) for i, one in zip(rows, ones, strict=True)}
    return [completions[index] for index in range(len(prompts))]


def _decode(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    uniform: torch.Tensor | None,
    stop: Sequence[str],
) -> list[tuple[list[int], bool, list[float]]]:
    """Complete one batch: new ids of each row, whether it finished, log-probabilities; `uniform` (B, steps) samples."""
    different = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, batch)))}
    logits, cache, mask = prefill(model, tokenizer, [list(prompt) for prompt in different])
    if len(different) < len(batch):  # the samples of one prompt share its encoding
        places = torch.tensor([different[tuple(prompt)] for prompt in batch], device=logits.device)
        logits, mask = logits[places], mask[places]
        cache.batch_select_indices(places)
    new: list[list[int]] = [[] for _ in batch]
    logprobs: list[list[float]] = [[] for _ in batch]
    finished = [False] * len(batch)
    ended, stopped = set(ends(tokenizer)), _stopper(tokenizer, stop)
    every = LOOK.get(logits.device.type, 8)
    unread: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens of a step and their log-probabilities, (rows,) each
    rows = list(range(len(batch)))  # the row of the batch that each line of the cache belongs to
    for step in range(max_new_tokens):
        chosen = _choose(logits, temperature, None if uniform is None else uniform[:, step])
        likely = torch.log_softmax(logits.float(), dim=-1).gather(1, chosen[:, None]).squeeze(1)
        unread.append((chosen, likely))
        if len(unread) == every or step == max_new_tokens - 1:
            written, measured = (torch.stack(each, dim=1).tolist() for each in zip(*unread, strict=True))
            unread = []
            for row, tokens, values in zip(rows, written, measured, strict=True):
                for token, logprob in zip(tokens, values, strict=True):
                    if not finished[row]:
                        new[row].append(token)
                        logprobs[row].append(logprob)
                        finished[row] = token in ended or stopped(new[row])
            going = [line for line, row in enumerate(rows) if not finished[row]]
            if not going:
                break
            if len(going) <= 0.75 * len(rows):  # dropping rows copies the cache: not worth it for a few
                keep = torch.tensor(going, device=chosen.device)
                rows, chosen, mask = [rows[line] for line in going], chosen[keep], mask[keep]
                uniform = None if uniform is None else uniform[keep]
                cache.batch_select_indices(keep)
        if step == max_new_tokens - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        position = mask.sum(dim=1, keepdim=True) - 1
        logits = model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).logits[:, -1]
    return list(zip(new, finished, logprobs, strict=True))


def prefill(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: list[list[int]]
) -> "tuple[torch.Tensor, DynamicCache, torch.Tensor]":
    """Read the prompts, their common beginning once: next-token logits (B, V), cache, attention mask (B, T)."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [_growing(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    shared = min(len(os.path.commonprefix(batch)), min(map(len, batch)) - 1)
    shared = shared if plain_cache(cache) else 0  # a sliding window would count the padding behind the beginning
    if shared:
        prefix = torch.tensor([batch[0][:shared]], device=model.device)
        model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(batch))
    width = max(map(len, batch)) - shared
    padding = [width - len(ids) + shared for ids in batch]
    ids = [[tokenizer.pad_token_id] * n + ids[shared:] for n, ids in zip(padding, batch, strict=True)]
    mask = [[1] * shared + [0] * n + [1] * (width - n) for n in padding]
    ids, mask = torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, shared:]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], cache, mask


def plain_cache(cache: "DynamicCache") -> bool:
    """Whether every layer keeps all keys and values, and nothing else: no sliding window, no recurrent state."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _growing(layer: "DynamicLayer") -> "DynamicLayer":
    """Let a cache layer grow in place: by itself it copies all keys and values of all rows at every token."""
    buffers: list[torch.Tensor | None] = [None, None]

    def append(which: int, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        length = held.shape[-2] if held.numel() else 0
        buffer, total = buffers[which], length + new.shape[-2]
        # Selecting or repeating rows replaces the tensors, and the buffer with them.
        if buffer is None or held.data_ptr() != buffer.data_ptr() or total > buffer.shape[-2]:
            buffer = new.new_empty((*new.shape[:2], total + ROOM, new.shape[-1]))
            buffer[..., :length, :] = held if length else buffer[..., :0, :]
            buffers[which] = buffer
        buffer[..., length:total, :] = new
        return buffer[..., :total, :]

    def update(keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = append(0, layer.keys, keys), append(1, layer.values, values)
        return layer.keys, layer.values

    layer.update = update
    return layer


def _choose(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """Next token of each row (B,): the largest logit, or the inverse of the distribution function at `uniform` (B,)."""
    if uniform is None:
        return logits.argmax(dim=-1)
    distribution = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    chosen = torch.searchsorted(distribution, (uniform * distribution[:, -1])[:, None], right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1)


def _stopper(tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]) -> Callable[[list[int]], bool]:
    """A test of a row's ids: did the last one complete a stop? Only rows whose last token can do so are decoded."""
    longest = max((len(text.encode()) for text in stop), default=0)  # tokens; each is at least one byte

    @cache
    def can(token: int) -> bool:
        text = tokenizer.decode([token])
        return "\ufffd" in text or any(one[-1] in text for one in stop)  # the mark of a part of a character

    def stopped(ids: list[int]) -> bool:
        return bool(stop) and can(ids[-1]) and any(text in tokenizer.decode(ids[-longest:]) for text in stop)

    return stopped


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int], stop: Sequence[str]) -> str:
    text = tokenizer.decode(ids[:-1] if ids[-1] in ends(tokenizer) else ids)
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


# -- log-probabilities --------------------------------------------------------------------------------------------


def completion_logprobs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    *,
    batch_size: int = 32,
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """Log-probability of each completion token under softmax(logits / temperature): one float32 tensor (n,) each.

    A completion given as text gets the end token; given as ids (`Completion.ids`) it is taken as it is. The joint
    log-probability is the sum.
    """
    rows = [
        Rollout(tuple(encode_prompt(tokenizer, prompt)), tuple(encode_completion(tokenizer, completion)))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].prompt) - len(rows[index].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    inner = causal_lm(model)

    def read(some: list[int]) -> list[list[float]]:
        packed = pack_for(inner, [rows[index] for index in some], pad=tokenizer.pad_token_id)
        found, _ = token_logprobs(inner, packed, last_states(inner, packed), temperature=temperature)
        return [found[line, : len(rows[index].ids)].tolist() for line, index in enumerate(some)]

    with evaluating(model):
        read_out = itertools.chain.from_iterable(parallel.each(read, batches, device=model.device))
    found = dict(zip(order, map(torch.tensor, read_out), strict=True))
    return [found[index] for index in range(len(rows))]


def nf4(compute_dtype: str) -> "BitsAndBytesConfig":
    """4-bit NF4 with double quantisation (QLoRA, 2305.14314), computing in `compute_dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
    )
