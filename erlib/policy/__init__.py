"""The policy, trained against the reward.

In: a merged checkpoint, a reward model, prompts or preferences.
Out: adapters and logs of PPO, DPO and RLOO; best-of-n beside them.
"""
