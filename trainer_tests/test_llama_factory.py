"""The function by which LLaMA-Factory's PPO trainer asks a server for rewards."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import bits, without_init
from rewardrt.trainers.listing import find, printed

without_init("llamafactory", "llamafactory.train", "llamafactory.train.ppo")

from llamafactory.train.ppo.ppo_utils import get_rewards_from_server

TEXTS = ["<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nso.<|im_end|>", "good", "many words " * 20]


def test_versions() -> None:
    assert importlib.metadata.version("llamafactory") == "0.9.5"


def test_the_rewards_of_a_batch(url: str, offline: Callable[..., Any]) -> None:
    lines = dict(line.split(": ") for line in printed(find("llama-factory"), urls=[url]).splitlines())
    assert lines["reward_model_type"] == "api"
    found = get_rewards_from_server(lines["reward_model"], TEXTS)
    assert found.dtype == torch.float32
    assert bits(found) == bits(offline([{"text": text} for text in TEXTS]))


def test_an_error_ends_the_training(url: str) -> None:
    with pytest.raises(KeyError, match="scores"):
        get_rewards_from_server(f"{url}/v1/score/evaluation", [])


def test_a_bundle_is_served_first(bundle: Path) -> None:
    from rewardrt import RewardRTError

    with pytest.raises(RewardRTError, match="takes rewards from a server only"):
        printed(find("llama-factory"), bundle=str(bundle))
