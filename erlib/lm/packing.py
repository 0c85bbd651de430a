"""Completions laid out for a forward pass: those of one prompt share a line, and so the encoding of the prompt."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Rollout(NamedTuple):
    """One completion: token ids of prompt and completion (with its end), its text, whether it ended itself."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str = ""
    finished: bool = True


class Packed(NamedTuple):
    """N rollouts in B lines of L tokens; `before` and `at` are places in the flattened lines (B L)."""

    inputs: dict[str, torch.Tensor]
    actions: torch.Tensor  # (N, T) token ids of the completions, padded on the right
    mask: torch.Tensor  # (N, T) which of them are real
    before: torch.Tensor  # (N, T) place of the state that each token follows
    at: torch.Tensor  # (N, T) place of the state that has read the token

    def to(self, device: torch.device) -> "Packed":
        """The same, on a device."""
        return Packed({name: x.to(device) for name, x in self.inputs.items()}, *(x.to(device) for x in self[1:]))


def pack(rows: Sequence[Rollout], *, pad: int, dtype: torch.dtype) -> Packed:
    """Lay rollouts out; neighbours with one prompt share a line, padded on the left.

    The mask (B, 1, L, L), added to attention logits of type `dtype`, lets a completion see the prompt and itself, and
    positions go on from the prompt in each of them, so that no completion notices the others.
    """
    lines = [list(line) for _, line in itertools.groupby(rows, key=lambda row: row.prompt)]
    width = max(len(line[0].prompt) + sum(len(row.ids) for row in line) for line in lines)
    ids, positions = torch.full((len(lines), width), pad), torch.zeros((len(lines), width), dtype=torch.long)
    part = torch.full((len(lines), width), -1)  # -1 padding, 0 prompt, 1, 2, … the completions
    shape = (len(rows), max(len(row.ids) for row in rows))
    actions, before, at = torch.zeros((3, *shape), dtype=torch.long).unbind()
    mask, index = torch.zeros(shape), 0
    for number, line in enumerate(lines):
        prompt = line[0].prompt
        begin = width - len(prompt) - sum(len(row.ids) for row in line)
        last = number * width + begin + len(prompt) - 1  # of the prompt
        for place, tokens in enumerate([prompt, *(row.ids for row in line)]):
            here, n = slice(begin, begin + len(tokens)), len(tokens)
            ids[number, here], part[number, here] = torch.tensor(tokens), place
            positions[number, here] = torch.arange(n) + (len(prompt) if place else 0)
            if place:
                actions[index, :n], mask[index, :n] = ids[number, here], 1
                at[index, :n] = torch.arange(number * width + begin, number * width + begin + n)
                before[index, :n] = torch.tensor([last, *at[index, : n - 1]])
                index += 1
            begin += n
    seen = torch.ones(width, width).tril().bool() & (part[:, None] >= 0)
    seen &= (part[:, None] == 0) | (part[:, None] == part[:, :, None])
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    return Packed({"input_ids": ids, "attention_mask": bias, "position_ids": positions}, actions, mask, before, at)


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The causal LM inside a `PeftModel`, its adapters in it, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def last_states(model: torch.nn.Module, packed: Packed) -> torch.Tensor:
    """Last hidden states (B L, H) of a causal LM's backbone on the flattened lines."""
    return model.base_model(**packed.inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def next_logits(model: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Next-token logits (N, V) of a causal LM from last hidden states (N, H) of its backbone.

    The model's own code makes them, given the states in place of its backbone: some models do more than apply the LM
    head, such as soft caps in Gemma 2 and 3 and scales in Granite and Cohere.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    given = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states[None])
    backbone = model.base_model
    own = vars(backbone).get("forward")  # where something has wrapped it
    backbone.forward = lambda *_, **__: given
    try:
        return model(use_cache=False).logits[0]
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own


def take(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows (…, H) of `states` (L, H) at some places (…).

    The gradients of a row that is taken more than once add up in one order, and so to the same bits in every run;
    indexing adds them in the order in which threads come to it.
    """
    return states.index_select(0, places.flatten()).unflatten(0, places.shape)


def token_logprobs(
    model: torch.nn.Module,
    packed: Packed,
    states: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (N, T) of each completion token under softmax(logits / temperature), and entropy if asked.

    `states` (B L, H) are the causal LM's, from `last_states`.
    """
    real = packed.mask.bool()
    logits = next_logits(model, take(states, packed.before[real]))
    spread = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = spread.gather(1, packed.actions[real][:, None]).squeeze(1)
    zeros = torch.zeros_like(packed.mask)
    found = zeros.masked_scatter(real, chosen)
    return found, zeros.masked_scatter(real, -(spread.exp() * spread).sum(dim=-1)) if entropy else zeros
