"""Which of two reports is better: what is asked, of whom, and what they said.

In: documents and a checkpoint, or two systems' reports.
Out: completions, pairs, judgements with their agreement and halts, preferences, the blind test's result.
"""
