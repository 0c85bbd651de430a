"""Our trainer beside its peers, in one run.

In: a workload.
Out: seconds and memory of each side, and their ratios.
"""
