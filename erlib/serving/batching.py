"""Greedy completion with transformers, made fast: each answer is yielded as soon as it is done.

1. Prompts are sorted by length, so that a batch pads little, and what they all begin with is read once,
2. rows that ended make room in batches, and the longest prompts that wait are read into it,
3. columns of the cache that no row looks at any more are dropped with them,
4. no Python runs for a token: one comparison a step tells which rows ended.
"""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from erlib.lm import models

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


class Completed(NamedTuple):
    """The answer to a prompt: its place, new ids with the end token, whether it ended by itself.

    `first_seconds` and `seconds` count from the call to the first and to the last token.
    """

    index: int
    ids: list[int]
    finished: bool
    first_seconds: float
    seconds: float


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[Completed]:
    """Complete prompts greedily, at most `batch_size` at once, in the order in which they end."""
    began = time.perf_counter()
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # the longest are taken first
    ends = torch.tensor(models.ends(tokenizer), device=model.device)
    first: dict[int, float] = {}
    batch: _Batch | None = None

    def read(n: int) -> _Batch:
        rows = [waiting.pop() for _ in range(min(n, len(waiting)))]
        logits, cache, mask = models.prefill(model, tokenizer, [prompts[row] for row in rows])
        fresh = _Batch(rows, logits.argmax(dim=-1), cache, mask, max_new_tokens)
        first.update(dict.fromkeys(rows, time.perf_counter() - began))
        return fresh

    while waiting or batch:
        with models.evaluating(model):
            batch = batch or read(batch_size)
            ended = batch.live & (torch.isin(batch.tokens, ends) | (batch.count == max_new_tokens))
            done = _read_out(batch, ended, models.ends(tokenizer))
            now = time.perf_counter() - began
            batch.live &= ~ended
            going = batch.live.nonzero().squeeze(1)
            few = len(going) <= 0.75 * (
                batch_size if waiting else len(batch.rows)
            )  # copying the cache for few is a loss
            if not len(going) or (few and models.plain_cache(batch.cache)):  # rows of other caches stay together
                if not len(going):
                    batch = None
                elif len(going) < len(batch.rows):
                    batch.keep(going)
                if batch and waiting:
                    batch.join(read(batch_size - len(batch.rows)))
            elif not done:
                _step(model, batch)
        yield from (Completed(row, ids, finished, first[row], now) for row, ids, finished in done)


class _Batch:
    """The rows at work: prompt of each line, cache, mask (B, T), written ids (B, max_new_tokens) and their number."""

    def __init__(self, rows: list[int], tokens: torch.Tensor, cache: "DynamicCache", mask: torch.Tensor, limit: int):
        self.rows, self.cache, self.mask = rows, cache, mask
        self.written = tokens.new_zeros((len(rows), limit))
        self.count = tokens.new_zeros(len(rows))
        self.live = torch.ones_like(tokens, dtype=torch.bool)
        self.write(tokens)

    def write(self, tokens: torch.Tensor) -> None:
        """Append a token (B,) to every row; rows that ended overwrite their last place, which was read before."""
        self.tokens = tokens
        place = self.count.clamp(max=self.written.shape[1] - 1)
        self.written.scatter_(1, place[:, None], tokens[:, None])
        self.count += self.live

    def keep(self, lines: torch.Tensor) -> None:
        """Keep these lines, and of the cache the columns that one of them still looks at."""
        self.rows = [self.rows[line] for line in lines.tolist()]
        mask = self.mask[lines]
        columns = mask.any(dim=0).nonzero().squeeze(1)
        self.mask, self.tokens = mask[:, columns], self.tokens[lines]
        self.written, self.count, self.live = self.written[lines], self.count[lines], self.live[lines]
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                state.index_select(0, lines).index_select(2, columns) for state in (layer.keys, layer.values)
            )

    def join(self, other: "_Batch") -> None:
        """Take the rows of another batch in; the shorter cache is padded on the left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.rows += other.rows
        self.mask = torch.cat([_padded(batch.mask, width, 1) for batch in (self, other)])
        for layer, added in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys = torch.cat([_padded(state, width, 2) for state in (layer.keys, added.keys)])
            layer.values = torch.cat([_padded(state, width, 2) for state in (layer.values, added.values)])
        for name in ("tokens", "written", "count", "live"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


def _padded(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Zeros before a tensor along `dim`, up to `width`."""
    missing = list(tensor.shape)
    missing[dim] = width - tensor.shape[dim]
    return torch.cat([tensor.new_zeros(missing), tensor], dim=dim) if missing[dim] else tensor


def _read_out(batch: _Batch, ended: torch.Tensor, ends: Sequence[int]) -> list[tuple[int, list[int], bool]]:
    """Prompt, ids and whether an end token was written, of the rows that ended in this step."""
    found = []
    for line in ended.nonzero().squeeze(1).tolist():
        ids = batch.written[line, : batch.count[line]].tolist()
        found.append((batch.rows[line], ids, ids[-1] in ends))
    return found


def _step(model: "PreTrainedModel", batch: _Batch) -> None:
    """Write the next token of every row."""
    batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
    logits = model(
        input_ids=batch.tokens[:, None],
        attention_mask=batch.mask,
        position_ids=batch.mask.sum(dim=1, keepdim=True) - 1,
        past_key_values=batch.cache,
        use_cache=True,
    ).logits[:, -1]
    batch.write(logits.argmax(dim=-1))
