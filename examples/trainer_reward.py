"""A reward function for a trainer, such as TRL's GRPOTrainer(reward_funcs=[...]).

    python examples/trainer_reward.py BUNDLE                    # in the trainer's own process
    python examples/trainer_reward.py http://127.0.0.1:5000     # from a server: rewardrt serve BUNDLE

A trainer calls it with prompts and completions, each a string or a list of messages, and expects one number for each
pair. Other trainers use other signatures: `rewardrt trainer` lists them.
"""

from __future__ import annotations

import sys

from rewardrt.trainers.trl import Reward


def main(where: str) -> None:
    """Call the reward function once, as a trainer would."""
    reward = Reward(where, chat=True)  # a string prompt is one user turn, not the start of a raw text
    prompts = ["Name a colour.", [{"role": "user", "content": "Name a colour."}]]
    completions = ["Blue.", [{"role": "assistant", "content": "Seven"}]]
    print(reward(prompts=prompts, completions=completions))


if __name__ == "__main__":
    main(*sys.argv[1:])
