"""Packed lines: what is taken from them more than once. How they are laid out is tested with their readers."""

import torch

from erlib.lm.packing import take


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
