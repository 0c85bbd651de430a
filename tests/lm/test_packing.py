"""Packed lines: what is taken from them more than once. How they are laid out is tested with their readers."""

import pytest
import torch

from erlib.lm import packing
from erlib.lm.packing import Rollout, last_states, next_logits, pack, take, token_logprobs


def gradient(read):
    """The gradient of 2,000 states of which a few are read by many tokens, as the end of a prompt is."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2000, 64, generator=generator, requires_grad=True)
    places = torch.randint(0, 50, (400, 60), generator=generator)
    (read(states, places) * torch.randn(400, 60, 64, generator=generator)).sum().backward()
    return states.grad


def test_rows_are_those_of_indexing_and_gradients_the_same_bits_every_time():
    states, places = torch.randn(5, 3), torch.tensor([[4, 0], [2, 2]])
    assert torch.equal(take(states, places), states[places])
    assert torch.allclose(gradient(take), gradient(lambda states, places: states[places]), rtol=1e-3, atol=1e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # with one there is one order anyway
    try:
        first = gradient(take)
        assert all(torch.equal(gradient(take), first) for _ in range(10))
    finally:
        torch.set_num_threads(threads)


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "mistral, a window of 3": {"sliding_window": 3},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {"final_logit_softcapping": 2.0},  # these do more to their logits than apply the head
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "gemma3_text, a window of 3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2},  # reads more than the states of its backbone
}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_model_s_own_whatever_it_does_to_its_logits(kind, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition(",")[0], **SHAPE | KINDS[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    prompt, completions = (5, 9, 11, 3), [(7, 8, 2), (40, 2)]
    rows = [Rollout(prompt, ids) for ids in completions]
    with torch.no_grad():
        packed = pack(rows, pad=0, dtype=torch.float32, config=config)
        found, _ = token_logprobs(model, packed, last_states(model, packed))
        for line, ids in enumerate(completions):
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.allclose(found[line, : len(ids)], wanted, atol=1e-4)
        monkeypatch.setattr(packing, "AT_ONCE", 2 * 97)  # two tokens' logits at once
        assert torch.allclose(token_logprobs(model, packed, last_states(model, packed))[0], found, atol=1e-6)
    states = torch.randn(3, 32, requires_grad=True)
    next_logits(model, states).sum().backward()
    assert states.grad.abs().sum() > 0
    assert "forward" not in vars(model.base_model)  # the backbone is its own again


def test_gradients_are_the_same_when_logits_are_made_in_parts(monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE)
    model = AutoModelForCausalLM.from_config(config)
    packed = pack([Rollout((5, 9, 11, 3), (7, 8, 40, 2))], pad=0, dtype=torch.float32, config=config)

    def gradients():
        model.zero_grad()
        token_logprobs(model, packed, last_states(model, packed))[0].sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    whole = gradients()
    monkeypatch.setattr(packing, "AT_ONCE", 97)
    for one, other in zip(whole, gradients(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
