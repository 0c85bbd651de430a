"""Whether the world still is the one that the model was made for.

In: dated documents, their reports and rewards.
Out: calibrated alarms, detection delays, tickets that name the phase to repeat.
"""
