"""verl's own reward managers, of its reward loop and of its older trainers, and its loading of a reward file."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast
from verl import DataProto
from verl.trainer.ppo.reward import get_custom_reward_fn, load_reward_manager
from verl.workers.reward_manager import BatchRewardManager, NaiveRewardManager

from conftest import bits
from rewardrt import RowError

PROMPTS = ["good", [{"role": "user", "content": "Why?"}], np.array([{"role": "user", "content": "Hi."}], dtype=object)]
ANSWERS = ["yes", "no, not at all", "maybe"]
WIDTH = 24  # tokens of a prompt and of a response, padded


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(bundle / "tokenizer.json"), eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )


def batch(tokenizer: PreTrainedTokenizerFast) -> DataProto:
    """Return answers as verl's rollouts have them: prompts padded on the left, responses with EOS on the right."""
    tensors = {"prompts": [], "responses": [], "attention_mask": []}
    for answer in ANSWERS:
        prompt = tokenizer("prompt", add_special_tokens=False)["input_ids"]
        response = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        before, after = WIDTH - len(prompt), WIDTH - len(response)
        tensors["prompts"].append([0] * before + prompt)
        tensors["responses"].append(response + [0] * after)
        tensors["attention_mask"].append([0] * before + [1] * (len(prompt) + len(response)) + [0] * after)
    extra = np.empty(len(ANSWERS), dtype=object)
    extra[:] = [{"prompt": prompt, "index": index} for index, prompt in enumerate(PROMPTS)]
    return DataProto.from_dict(
        tensors={name: torch.tensor(values) for name, values in tensors.items()},
        non_tensors={
            "data_source": np.array(["here"] * 3, dtype=object),
            "reward_model": np.array([{"ground_truth": "", "style": "rule"}] * 3, dtype=object),
            "extra_info": extra,
        },
    )


@pytest.fixture(scope="module")
def expected(offline: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> list[float]:
    answers = [tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in ANSWERS]
    return offline(
        [
            {"text": f"good{answers[0]}"},
            {"messages": [{"role": "user", "content": "Why?"}], "response": answers[1]},
            {"messages": [{"role": "user", "content": "Hi."}], "response": answers[2]},
        ]
    )


def config(path: Path, manager: str, name: str = "compute_score") -> Any:
    return OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": {"path": str(path), "name": name, "reward_kwargs": {"unread": 1}},
                "reward_manager": {"source": "register", "name": manager},
                "num_workers": 2,
            }
        }
    )


def run(made: Callable[[], Any], data: DataProto) -> list[dict[str, Any]]:
    """Make a manager of the reward loop and give it the samples, all at once, as the loop does."""

    async def gather() -> list[dict[str, Any]]:
        manager = made()
        return await asyncio.gather(*(manager.run_single(data[index : index + 1]) for index in range(len(data))))

    return asyncio.run(gather())


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_versions() -> None:
    assert importlib.metadata.version("verl") == "0.9.1"


def test_the_printed_file_is_loaded(rewards_file: Any, expected: list[float]) -> None:
    score = get_custom_reward_fn(config(rewards_file("verl"), "naive"))
    found = score(data_source="here", solution_str="yes", ground_truth="", extra_info={"prompt": "good"})
    assert bits(found) == bits(expected[0])


def test_the_reward_loops_manager(rewards_file: Any, tokenizer: Any, expected: list[float]) -> None:
    settings = config(rewards_file("verl"), "naive")
    found = run(lambda: load_reward_manager(settings, tokenizer), batch(tokenizer))
    assert bits([each["reward_score"] for each in found]) == bits(expected)
    assert [each["reward_extra_info"] for each in found] == [{"acc": each["reward_score"]} for each in found]


def test_the_reward_loops_manager_awaits_a_coroutine(
    where: str, tmp_path: Path, tokenizer: Any, expected: list[float]
) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(
        f"from rewardrt.trainers.verl import AsyncReward\n\ncompute_score = AsyncReward({where!r}).compute_score\n"
    )
    manager: list[Any] = []

    def make() -> Any:
        manager.append(load_reward_manager(config(path, "naive"), tokenizer))
        return manager[0]

    found = run(make, batch(tokenizer))
    assert manager[0].is_async_reward_score
    assert bits([each["reward_score"] for each in found]) == bits(expected)


def test_workers_of_ray(cluster: None, rewards_file: Any, tokenizer: Any, expected: list[float]) -> None:
    settings = config(rewards_file("verl"), "remote")
    found = run(lambda: load_reward_manager(settings, tokenizer), batch(tokenizer))
    assert bits([each["reward_score"] for each in found]) == bits(expected)


def last_tokens(rewards: torch.Tensor, data: DataProto) -> list[float]:
    lengths = data.batch["attention_mask"][:, WIDTH:].sum(1)
    assert int((rewards != 0).sum()) == len(lengths)
    return rewards[torch.arange(len(lengths)), lengths - 1].tolist()


def test_the_older_manager(rewards_file: Any, tokenizer: Any, expected: list[float]) -> None:
    score = get_custom_reward_fn(config(rewards_file("verl"), "naive"))
    data = batch(tokenizer)
    found = NaiveRewardManager(tokenizer, 0, score, compute_score_timeout=60)(data, return_dict=True)
    assert bits(last_tokens(found["reward_tensor"], data)) == bits(expected)


def test_the_older_manager_of_batches(where: str, tmp_path: Path, tokenizer: Any, expected: list[float]) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(f"from rewardrt.trainers.verl import BatchReward\n\ncompute_score = BatchReward({where!r})\n")
    data = batch(tokenizer)
    found = BatchRewardManager(tokenizer, 0, get_custom_reward_fn(config(path, "batch")))(data)
    assert bits(last_tokens(found, data)) == bits(expected)
    assert bits(data.batch["acc"]) == bits(expected)


def test_a_sample_without_its_prompt_is_an_error_that_says_so(rewards_file: Any, tokenizer: Any) -> None:
    data = batch(tokenizer)
    data.non_tensor_batch["extra_info"][1] = {}
    settings = config(rewards_file("verl"), "naive")
    with pytest.raises(RowError, match=r"expected the prompt in extra_info\['prompt'\]"):
        run(lambda: load_reward_manager(settings, tokenizer), data)
