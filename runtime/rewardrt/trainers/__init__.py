"""Rewards for trainers: one module for each trainer, named after it, with the callable that the trainer takes.

`rewardrt trainer NAME` prints the file or the lines to paste. Each module says what its trainer calls and with which
arguments. No trainer is imported here.
"""
