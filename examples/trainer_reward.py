"""A reward function for a trainer, such as TRL's GRPOTrainer(reward_funcs=[...]).

    python examples/trainer_reward.py BUNDLE                    # in the trainer's own process
    python examples/trainer_reward.py http://127.0.0.1:5000     # by a server: rewardrt serve BUNDLE

A trainer calls it with prompts and completions, each a string or a list of messages, and wants one number each. Other
trainers call theirs otherwise: `rewardrt trainer` lists them.
"""

from __future__ import annotations

import sys

from rewardrt.trainers.trl import Reward


def main(where: str) -> None:
    """Call it once, as a trainer would."""
    reward = Reward(where, chat=True)  # a prompt that is a string is a user's turn, and not the beginning of a text
    prompts = ["Name a colour.", [{"role": "user", "content": "Name a colour."}]]
    completions = ["Blue.", [{"role": "assistant", "content": "Seven"}]]
    print(reward(prompts=prompts, completions=completions))


if __name__ == "__main__":
    main(*sys.argv[1:])
