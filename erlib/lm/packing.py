"""Completions laid out for a forward pass: those of one prompt share a line, and so the encoding of the prompt."""

import itertools
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.utils.checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

AT_ONCE = 2**26  # logits: at a vocabulary of 152,000, 440 tokens; more would take gigabytes for a batch of reports


class Rollout(NamedTuple):
    """One completion: token ids of prompt and completion (with its end), its text, whether it ended itself."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str = ""
    finished: bool = True


class Packed(NamedTuple):
    """N rollouts in B lines of L tokens; `before` and `at` are places in the flattened lines (B L)."""

    inputs: dict[str, Any]  # of the model's forward pass
    actions: torch.Tensor  # (N, T) token ids of the completions, padded on the right
    mask: torch.Tensor  # (N, T) which of them are real
    before: torch.Tensor  # (N, T) place of the state that each token follows
    at: torch.Tensor  # (N, T) place of the state that has read the token

    def to(self, device: torch.device) -> "Packed":
        """The same, on a device."""
        return Packed(_to(self.inputs, device), *(x.to(device) for x in self[1:]))


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, dict):
        return {name: _to(value, device) for name, value in inputs.items()}
    return inputs.to(device)


def pack(rows: Sequence[Rollout], *, pad: int, dtype: torch.dtype, config: "PretrainedConfig") -> Packed:
    """Lay rollouts out for the model of `config`; neighbours with one prompt share a line, padded on the left.

    The mask (B, 1, L, L), added to attention logits of type `dtype`, lets a completion see the prompt and itself, and
    positions go on from the prompt in each of them, so that no completion notices the others. Where layers look back
    through a sliding window, it is one over positions.
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
    inputs = {"input_ids": ids, "attention_mask": _biases(seen, positions, dtype, config), "position_ids": positions}
    return Packed(inputs, actions, mask, before, at)


def pack_for(model: "PreTrainedModel", rows: Sequence[Rollout], *, pad: int) -> Packed:
    """Lay rollouts out for a model, where it lies."""
    return pack(rows, pad=pad, dtype=model.dtype, config=model.config).to(model.device)


def _biases(seen: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, config: "PretrainedConfig") -> Any:
    """What is added to attention logits (B, 1, L, L), or that by kind of layer where a model has several."""

    def bias(visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]

    text = config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if not window or (kinds and "sliding_attention" not in kinds):
        return bias(seen)
    near = bias(seen & (positions[:, :, None] - positions[:, None] < window))
    return {"full_attention": bias(seen), "sliding_attention": near} if kinds else near


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
    given = _given()(last_hidden_state=states[None])
    backbone = model.base_model
    own = vars(backbone).get("forward")  # where something has wrapped it
    backbone.forward = lambda *_, **__: given
    try:
        return model(use_cache=False).logits[0]
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own


@cache
def _given() -> type:
    """The class of a backbone's output; made once, for torch keeps every such class for ever."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    class Given(BaseModelOutputWithPastAndCrossAttentions):
        def __getattr__(self, _: str) -> None:
            """Images, router logits and the like, which some models hand on: there are none."""

    return Given


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
    size = max(1, AT_ONCE // model.config.get_text_config().vocab_size)
    parts = zip(take(states, packed.before[real]).split(size), packed.actions[real].split(size), strict=True)
    measure = partial(_measured, model, temperature, entropy)
    if torch.is_grad_enabled() and int(real.sum()) > size:  # the logits of a part are made again in the backward pass
        measure = partial(torch.utils.checkpoint.checkpoint, measure, use_reentrant=False)
    measured = [measure(*part) for part in parts]
    zeros = torch.zeros_like(packed.mask)
    chosen, spread = (zeros.masked_scatter(real, torch.cat(each)) for each in zip(*measured, strict=True))
    return chosen, spread


def _measured(
    model: torch.nn.Module, temperature: float, entropy: bool, states: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token (n,) that follows its state (n, H), and the entropy there, or zeros."""
    spread = torch.log_softmax(next_logits(model, states).float() / temperature, dim=-1)
    chosen = spread.gather(1, tokens[:, None]).squeeze(1)
    return chosen, -(spread.exp() * spread).sum(dim=-1) if entropy else torch.zeros_like(chosen)
