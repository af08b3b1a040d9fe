"""Rewards for trainers: a module each, named after the trainer, with the callable that it takes.

`rewardrt trainer NAME` prints the file or the lines to paste. What each trainer calls, and with what, is said in its
module; none of them is imported here.
"""
