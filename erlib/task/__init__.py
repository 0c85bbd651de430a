"""What is extracted, and what an extraction is worth.

In: documents, reports and briefs, as records or as text.
Out: the same records read and written, scores with intervals, utility.
"""
