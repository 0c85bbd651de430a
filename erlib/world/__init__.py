"""The embedded world, which stands in for what a laptop cannot have; only notebooks and tests import it.

In: a seed.
Out: dated posts with their true reports, a simulated frontier LM, a simulated panel, the base model.
"""
