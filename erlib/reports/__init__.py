"""The frontier LM's side: how it is asked, and what it answers.

In: documents, the brief, gold exemplars, an endpoint or a local LM.
Out: prompts, the chosen exemplars, reports with their defects, what they cost.
"""
