"""Other people's documents, made fit to work with.

In: files (JSONL, CSV, Parquet), gold exemplars, the brief.
Out: documents that are clean, deduplicated, diverse, split, and reserved for phases and rounds.
"""
