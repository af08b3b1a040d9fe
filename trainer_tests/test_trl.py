"""TRL's own GRPOTrainer and RLOOTrainer, two steps each of a tiny random model on a CPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from conftest import bits
from rewardrt.trainers.trl import AsyncReward, Reward

STANDARD = [
    {"prompt": prompt, "answer": index, "tools": "not what a template reads"} for index, prompt in enumerate("abcd")
]
CONVERSATIONS = [
    {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}],
        "answer": index,
    }
    for index, prompt in enumerate(["Hi.", "Name a colour.", "Why?", "Say 1."])
]


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(bundle / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=(bundle / "chat_template.jinja").read_text()
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )


def policy(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def recorded(reward: Any, calls: list[dict[str, Any]]) -> Any:
    """Return an object of the same class that keeps what it was called with, and what it returned."""

    class Recorded(type(reward)):  # type: ignore[misc]
        if inspect.iscoroutinefunction(type(reward).__call__):

            async def __call__(self, **given: Any) -> Any:
                found = await super().__call__(**given)
                calls.append(given | {"found": found})
                return found
        else:

            def __call__(self, **given: Any) -> Any:
                found = super().__call__(**given)
                calls.append(given | {"found": found})
                return found

    reward.__class__ = Recorded
    return reward


def train(
    rows: list[dict[str, Any]],
    rewards: list[Any],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    trainer: Any = trl.GRPOTrainer,
    config: Any = trl.GRPOConfig,
) -> tuple[Any, list[torch.Tensor]]:
    """Train for two steps; return the trainer, and the rewards that it used, [completions, functions] each step."""
    options = config(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, fp16=False, seed=1, beta=0.0,
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    made = trainer(
        model=policy(tokenizer), reward_funcs=rewards, args=options, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    used: list[torch.Tensor] = []
    calculate = made._calculate_rewards

    def keep(*given: Any) -> torch.Tensor:
        used.append(calculate(*given))
        return used[-1].clone()

    made._calculate_rewards = keep
    made.train()
    return made, used


def rows_of(call: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one call, by hand: strings are one text, messages one conversation."""
    pairs = zip(call["prompts"], call["completions"], strict=True)
    if isinstance(call["prompts"][0], str):
        return [{"text": prompt + completion} for prompt, completion in pairs]
    return [{"messages": prompt + completion} for prompt, completion in pairs]


def test_versions() -> None:
    assert trl.__version__ == "1.16.0"
    assert transformers.__version__ == "5.23.0"


@pytest.mark.parametrize("kind", [Reward, AsyncReward])
@pytest.mark.parametrize("rows", [STANDARD, CONVERSATIONS], ids=["standard", "conversational"])
def test_grpo_trains_on_the_rewards_of_the_bundle(
    kind: Any, rows: list[dict[str, Any]], where: str, tokenizer: Any, offline: Callable[..., Any], tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []
    made, used = train(rows, [recorded(kind(where), calls)], tokenizer, tmp_path)
    assert len(calls) == len(used) == 2
    weights = [parameter.detach().clone() for parameter in made.model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(weights, policy(tokenizer).parameters(), strict=True))
    for call, rewards in zip(calls, used, strict=True):
        assert len(call["answer"]) == 4
        assert {"trainer_state", "log_extra", "log_metric", "completion_ids"} <= call.keys()
        expected = offline(rows_of(call))
        assert len(set(expected)) > 1
        assert bits(call["found"]) == bits(expected)
        assert bits(rewards[:, 0].numpy()) == bits(expected)
    logged = [entry for entry in made.state.log_history if "reward" in entry]
    assert [entry["rewards/rewardrt/mean"] for entry in logged] == pytest.approx(
        [float(rewards.mean()) for rewards in used], rel=1e-6
    )


def test_rloo_trains_on_the_rewards_of_the_bundle(
    bundle: Path, tokenizer: Any, offline: Callable[..., Any], tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []
    reward = recorded(Reward(bundle), calls)
    _, used = train(
        CONVERSATIONS, [reward], tokenizer, tmp_path, trainer=trl.RLOOTrainer, config=trl.RLOOConfig
    )  # fmt: skip
    assert [bits(rewards[:, 0].numpy()) for rewards in used] == [bits(offline(rows_of(call))) for call in calls]


def test_two_rewards_stand_in_the_log_under_their_names(bundle: Path, tokenizer: Any, tmp_path: Path, url: str) -> None:
    rewards = [Reward(bundle, name="raw"), AsyncReward(url, name="normalised", normalize=True)]
    made, used = train(STANDARD, rewards, tokenizer, tmp_path)
    entry = next(entry for entry in made.state.log_history if "reward" in entry)
    raw, normalised = entry["rewards/raw/mean"], entry["rewards/normalised/mean"]
    assert normalised == pytest.approx((raw - 0.5) / 2.0, abs=1e-5)  # mean and std of the bundle
    assert entry["reward"] == pytest.approx(raw + normalised, abs=1e-5)
    assert used[0].shape == (4, 2)


class Spoiling(Reward):
    """As when the policy writes what is no text for the reward model: a lone surrogate in every second completion."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        spoiled = [
            completion if index % 2 else b"\\udc80".decode("unicode_escape")
            for index, completion in enumerate(completions)
        ]
        return super().__call__(prompts, spoiled, **columns)


def test_a_completion_that_cannot_be_scored_is_left_out(
    bundle: Path, tokenizer: Any, offline: Callable[..., Any], tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []
    made, used = train(STANDARD, [recorded(Spoiling(bundle), calls)], tokenizer, tmp_path)
    for call, rewards in zip(calls, used, strict=True):
        expected = offline(rows_of(call))
        assert call["found"] == [None, expected[1], None, expected[3]]
        assert [math.isnan(value) for value in rewards[:, 0].tolist()] == [True, False, True, False]
        assert bits(rewards[[1, 3], 0].numpy()) == bits([expected[1], expected[3]])
    logged = [entry["rewards/rewardrt/mean"] for entry in made.state.log_history if "reward" in entry]
    assert logged == pytest.approx([float(rewards.nanmean()) for rewards in used], rel=1e-6)
    assert all(torch.isfinite(parameter).all() for parameter in made.model.parameters())


def test_a_server_that_dies_ends_the_training_with_its_error(bundle: Path, tokenizer: Any, tmp_path: Path) -> None:
    from rewardrt import ServerError
    from server_process import serving

    with serving(bundle) as running:
        reward = Reward(running.url, patience=0.5)
        calls: list[dict[str, Any]] = []

        class Killing(Reward):
            def __call__(self, **given: Any) -> Any:
                if calls:
                    running.process.kill()
                    running.process.wait()
                calls.append(given)
                return reward(**given)

        with pytest.raises(ServerError, match="no answer"):
            train(STANDARD, [Killing(bundle)], tokenizer, tmp_path)
    assert len(calls) == 2
