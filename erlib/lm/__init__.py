"""The local LM: everything that is done with one checkpoint.

In: a folder or a hub name, prompts, training rows.
Out: completions, log-probabilities, adapters, merged and 4-bit checkpoints.
"""
