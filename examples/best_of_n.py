"""Choose the best of several answers to a prompt.

    python examples/best_of_n.py BUNDLE PROMPT ANSWER ANSWER ...

Your generator would make the answers; here they are arguments of the command.
"""

from __future__ import annotations

import sys

from rewardrt import RewardModel


def best_of(model: RewardModel, prompt: str, answers: list[str]) -> str:
    """Return the answer with the highest reward. The prompt is computed once for all answers."""
    return model.rank(prompt=prompt, responses=answers)[0].response


def main(bundle: str, prompt: str, *answers: str) -> None:
    """Print the ranking, best first, and the answer that won."""
    model = RewardModel.load(bundle)
    for place, ranked in enumerate(model.rank(prompt=prompt, responses=list(answers)), 1):
        print(f"{place}  {ranked.reward:8.4f}  {ranked.response}")
    print(f"best: {best_of(model, prompt, list(answers))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
