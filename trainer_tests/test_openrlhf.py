"""OpenRLHF's own executor, with the printed file and with a server, and what its trainer makes of the rewards."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import bits, stand_in, without_init

without_init("openrlhf.utils")
stand_in("ray")
stand_in("vllm", "SamplingParams")
stand_in("openrlhf.trainer.ray.vllm_engine", "batch_vllm_engine_call")

from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch, split_experience_batch
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.utils.agent import SingleTurnAgentExecutor

ANSWERS = ["yes", "no, not at all", "maybe</s>"]
PROMPT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


class Engine:
    """Answers one after the other, as vLLM's outputs are."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answers: list[str]) -> None:
        self.answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]

    async def generate(self, ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        made = SimpleNamespace(token_ids=self.answers.pop(0), finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[made])


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(bundle / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def execute(executor: Any, tokenizer: PreTrainedTokenizerFast, answers: list[str]) -> list[dict[str, Any]]:
    engine, params = Engine(tokenizer, answers), SimpleNamespace(max_tokens=32, logprobs=None)

    async def gather() -> list[dict[str, Any]]:
        calls = (executor.execute(PROMPT, "label", params, 256, tokenizer, engine) for _ in answers)
        return await asyncio.gather(*calls)

    return asyncio.run(gather())


@pytest.fixture(params=["file", "route"])
def endpoint(request: pytest.FixtureRequest, rewards_file: Callable[[str], Path], where: str) -> str:
    """The printed file, for a bundle and a server; and a server's route."""
    if request.param == "file":
        return str(rewards_file("openrlhf"))
    if not where.startswith("http"):
        pytest.skip("a bundle has no route")
    return f"{where}/get_reward"


def test_versions() -> None:
    assert importlib.metadata.version("openrlhf") == "0.11.2"


def test_the_executors_rewards(endpoint: str, tokenizer: Any, offline: Callable[..., Any]) -> None:
    found = execute(SingleTurnAgentExecutor(endpoint), tokenizer, list(ANSWERS))
    texts = [tokenizer.decode(each["observation_tokens"], skip_special_tokens=False) for each in found]
    assert all(text.startswith(tokenizer.decode(tokenizer(PROMPT)["input_ids"])) for text in texts)
    expected = offline([{"text": text} for text in texts])
    assert len(set(expected)) == 3
    assert bits([each["reward"] for each in found]) == bits(expected)
    assert bits([each["scores"] for each in found]) == bits(expected)

    samples = [SamplesGenerator._process_response_into_experience(None, each, max_len=256) for each in found]
    assert bits(torch.cat([sample.rewards for sample in samples])) == bits(expected)
    assert bits(torch.cat([sample.info["reward"] for sample in samples])) == bits(expected)
    whole = Experience.concat_experiences(samples, 0)
    assert whole.rewards.numel() == whole.scores.numel() == 3
    again = make_experience_batch([sample for each in samples for sample in split_experience_batch(each)])
    assert bits(again.rewards) == bits(expected)


def test_two_servers_take_turns(url: str, tokenizer: Any, offline: Callable[..., Any]) -> None:
    found = execute(SingleTurnAgentExecutor([f"{url}/get_reward"] * 2), tokenizer, list(ANSWERS))
    texts = [tokenizer.decode(each["observation_tokens"], skip_special_tokens=False) for each in found]
    assert bits([each["reward"] for each in found]) == bits(offline([{"text": text} for text in texts]))


class Surrogate(PreTrainedTokenizerFast):
    """Writes what is no text, as a tokenizer never should: the reward cannot be had."""

    def decode(self, ids: Any, **options: Any) -> str:
        return "\udc80"


def test_a_text_that_cannot_be_scored_leaves_the_sample_without_a_reward(
    bundle: Path, tmp_path: Path, where: str
) -> None:
    """And `failed` gives it one: without, the trainer fails on a batch in which others have theirs."""
    spoiled = Surrogate(tokenizer_file=str(bundle / "tokenizer.json"), eos_token="</s>", pad_token="<pad>")
    rewards = []
    for index, option in enumerate(["", ", failed=-5.0"]):
        path = tmp_path / f"rewards{index}.py"
        path.write_text(f"from rewardrt.trainers.openrlhf import Reward\n\nreward_func = Reward({where!r}{option})\n")
        rewards += [each["reward"] for each in execute(SingleTurnAgentExecutor(str(path)), spoiled, ["a"])]
    assert rewards[0] is None
    assert bits(rewards[1]) == bits([-5.0])
