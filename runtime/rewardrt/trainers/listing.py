"""The trainers, and what `rewardrt trainer NAME` prints for each: a file or a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewardrt.errors import RewardRTError


@dataclass(frozen=True)
class Trainer:
    """A trainer, and what to give it.

    `name` is the name for the command. `use` says how to name the file to the trainer. `file` is the file's code, in
    which {where} stands for the bundle or the server. `lines` need a server but no file: {url} stands for its address
    with `route`, or, if the trainer accepts `several`, for their addresses separated by commas.
    """

    name: str
    title: str
    use: str
    file: str = ""
    lines: str = ""
    route: str = ""
    several: bool = False


TRAINERS: tuple[Trainer, ...] = (
    Trainer(
        "trl",
        "TRL: GRPOTrainer, RLOOTrainer",
        "from rewards import reward\ntrainer = GRPOTrainer(reward_funcs=[reward], ...)",
        "from rewardrt.trainers.trl import Reward\n\nreward = Reward({where})\n",
    ),
    Trainer(
        "verl",
        "verl: a custom reward function",
        "reward.custom_reward_function.path=rewards.py reward.custom_reward_function.name=compute_score\n"
        'and the prompt of each row of the data set in extra_info["prompt"]',
        "from rewardrt.trainers.verl import Reward\n\ncompute_score = Reward({where})\n",
    ),
    Trainer(
        "openrlhf",
        "OpenRLHF: PPO, REINFORCE++, GRPO",
        "--reward.remote_url rewards.py",
        "from rewardrt.trainers.openrlhf import Reward\n\nreward_func = Reward({where})\n",
        "--reward.remote_url {url}",
        "/get_reward",
        several=True,
    ),
    Trainer(
        "ms-swift",
        "ms-swift: swift rlhf --rlhf_type grpo",
        "--external_plugins rewards.py --reward_funcs rewardrt",
        "from swift.rewards import orms\n\nfrom rewardrt.trainers.ms_swift import orm\n\n"
        'orms["rewardrt"] = orm({where})\n',
    ),
    Trainer(
        "areal",
        "AReaL: RLVRWorkflow",
        'RLVRWorkflow(reward_fn="rewards.reward_fn", ...); `end` is what the policy ends an answer with',
        'from rewardrt.trainers.areal import Reward\n\nreward_fn = Reward({where}, end="<|im_end|>")\n',
    ),
    Trainer(
        "slime",
        "slime",
        "--custom-rm-path rewards.reward_func; `end` is what the policy ends an answer with",
        'from rewardrt.trainers.slime import Reward\n\nreward_func = Reward({where}, end="<|im_end|>")\n',
        "--rm-type remote_rm --rm-url {url}",
        "/remote_rm",
    ),
    Trainer(
        "llama-factory",
        "LLaMA-Factory: PPO",
        "",
        lines="reward_model_type: api\nreward_model: {url}",
        route="/v1/score/evaluation",
    ),
    Trainer(
        "verifiers",
        "verifiers: a reward of a task",
        '[env.taskset.task.rewards.rewardrt]\nfn = "rewards.py:reward"',
        "from rewardrt.trainers.verifiers import Reward\n\nmodel = Reward({where})\n\n\n"
        "async def reward(trace):\n    return await model(trace)\n",
    ),
)


def find(name: str) -> Trainer:
    """Return the trainer with this name, or raise RewardRTError listing all names."""
    found = next((trainer for trainer in TRAINERS if trainer.name == name.lower().replace("_", "-")), None)
    if found is None:
        known = ", ".join(trainer.name for trainer in TRAINERS)
        raise RewardRTError(f"{name!r}: expected one of the trainers {known}; docs/trainers.md says more")
    return found


def printed(trainer: Trainer, *, bundle: str | None = None, urls: Sequence[str] = ()) -> str:
    """Return the file to save as rewards.py, or the lines that need no file, for a bundle or for servers.

    Raises RewardRTError.
    """
    if urls and trainer.lines:
        if len(urls) > 1 and not trainer.several:
            raise RewardRTError(f"{trainer.name} takes the address of one server, found {len(urls)}")
        return trainer.lines.format(url=",".join(f"{url}{trainer.route}" for url in urls)) + "\n"
    if not trainer.file:
        serve, again = f"`rewardrt serve {bundle}`", f"`rewardrt trainer {trainer.name} --url URL`"
        raise RewardRTError(f"{trainer.name} takes rewards from a server only: run {serve}, and then {again}")
    use = "\n".join(f"    {line}" for line in trainer.use.splitlines())
    title = f'"""Rewards for {trainer.title}. Save this as rewards.py, where the trainer finds it.\n\n{use}\n"""\n\n'
    return title + trainer.file.format(where=repr(bundle or ",".join(urls)))
