"""The reward: a number for every report, learnt from preferences.

In: preferences and the checkpoint that they judge.
Out: a reward model, what it is worth, and the guard on its distribution; `policy.rollouts` adds KL and penalties.
"""
