"""Batches in the few shapes of an engine: which those are, and that rewards do not show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_encoders import write_encoder
from every_family import EVERY_FAMILY
from rewardrt import RewardModel
from rewardrt.errors import InferenceError
from rewardrt.graph.engine import EngineRequest
from rewardrt.graph.shapes import Profile
from rewardrt_export.pipeline import export


def test_a_profile_holds_the_models_longest_text_and_fewer_rows_of_very_long_ones() -> None:
    assert Profile.of(512) == Profile(64, 512)
    assert Profile.of(2048) == Profile(64, 2048)
    assert Profile.of(32_768) == Profile(4, 32_768)
    assert Profile.of(1_000_000) == Profile(1, 1_000_000)


def test_tokens_go_up_by_half_steps_and_rows_by_doubling() -> None:
    profile = Profile(64, 2000)
    assert [profile.bucket(1, tokens)[1] for tokens in (1, 16, 17, 25, 33, 49, 65, 97, 1025, 1537, 2000)] == [
        16, 16, 24, 32, 48, 64, 96, 128, 1536, 2000, 2000,
    ]  # fmt: skip
    assert [profile.bucket(rows, 1)[0] for rows in (1, 2, 3, 5, 33, 64)] == [1, 2, 4, 8, 64, 64]
    assert Profile(6, 8).bucket(5, 3) == (6, 8)  # never more than it holds


@pytest.mark.parametrize("profile", [Profile(64, 2048), Profile(5, 100), Profile(1, 8), Profile(64, 2000)])
def test_every_batch_of_the_budget_has_a_shape_that_was_warmed_and_none_adds_more_than_it_may(profile: Profile) -> None:
    budget = 4096
    warmed = profile.buckets(budget)
    assert len(warmed) == len(set(warmed)) < 110
    assert warmed[0][0] * warmed[0][1] == max(rows * tokens for rows, tokens in warmed)
    for rows in range(1, profile.rows + 1):
        for tokens in range(1, profile.tokens + 1):
            if rows == 1 or rows * tokens <= budget:
                wide = profile.bucket(rows, tokens)
                assert wide in warmed and wide[0] >= rows and wide[1] >= tokens
                if tokens >= 16:
                    assert wide[1] < 1.5 * tokens + 1 and wide[0] < 2 * rows


def test_an_engines_settings_name_every_input_at_three_sizes(tmp_path: Path) -> None:
    request = EngineRequest("abc", Profile(64, 2048), taps=2, type_ids=True)
    assert request.settings("tensorrt-rtx", tmp_path) == {
        "nv_profile_min_shapes": "input_ids:1x1,lengths:1,token_type_ids:1x1,positions:1x2",
        "nv_profile_opt_shapes": "input_ids:8x256,lengths:8,token_type_ids:8x256,positions:8x2",
        "nv_profile_max_shapes": "input_ids:64x2048,lengths:64,token_type_ids:64x2048,positions:64x2",
        "nv_runtime_cache_path": str(tmp_path / "runtime"),
    }
    classic = EngineRequest("abc", Profile(4, 100)).settings("tensorrt", None)
    assert classic == {
        "trt_profile_min_shapes": "input_ids:1x1,lengths:1",
        "trt_profile_opt_shapes": "input_ids:4x100,lengths:4",
        "trt_profile_max_shapes": "input_ids:4x100,lengths:4",
        "trt_fp16_enable": "1",
    }


def exported(folder: Path, name: str) -> Path:
    """A bundle of one graph, in float32: what batches in shapes change has no rounding to hide in."""
    if name == "encoder":
        write_encoder(folder / "rm", "bert")
        return export(folder / "rm", folder / "bundle", certified=False).path
    case = EVERY_FAMILY[name]
    case.write(folder / "rm")
    options = case.export_options(folder / "rm")
    return export(folder / "rm", folder / "bundle", precisions=("tensorrt",), certified=False, **options).path


@pytest.mark.parametrize("name", ["encoder", "armorm", "qwen-prm", "sequence-classification"])
def test_rewards_in_shapes_are_those_of_the_batches_as_they_are(tmp_path: Path, name: str) -> None:
    model = RewardModel.load(exported(tmp_path, name), provider="cpu", padding=True)
    prompts = [f"question {number}" for number in range(23)]
    rows: list[dict[str, Any]] = [
        {"prompt": each, "response": "an answer " * (n % 9 + 1)} for n, each in enumerate(prompts)
    ]
    if name == "qwen-prm":
        rows = [{"prompt": row["prompt"], "steps": [row["response"], "so it is"]} for row in rows]
    aggregate = "min" if name == "qwen-prm" else None
    plain = model.score_many(rows, aggregate=aggregate)  # type: ignore[arg-type]
    model.session.profile = Profile(4, model.spec.max_length)
    shapes: list[tuple[int, ...]] = []
    run = model.session._session.run
    model.session._session = _Watched(model.session._session, lambda feeds: shapes.append(feeds["input_ids"].shape))
    shaped = model.score_many(rows, aggregate=aggregate)  # type: ignore[arg-type]
    assert run is not None and shapes
    assert all(
        rows in (1, 2, 4) and model.session.profile.bucket(rows, tokens) == (rows, tokens) for rows, tokens in shapes
    )
    assert np.abs(plain - shaped).max() < 2e-3 * max(plain.std(), 1e-3)


class _Watched:
    """An onnxruntime session whose inputs are looked at."""

    def __init__(self, session: Any, look: Any) -> None:
        self._session, self._look = session, look

    def run(self, outputs: Any, feeds: Any) -> Any:
        self._look(feeds)
        return self._session.run(outputs, feeds)


def test_a_text_longer_than_the_profile_is_an_error_and_the_others_are_scored(tmp_path: Path) -> None:
    model = RewardModel.load(exported(tmp_path, "sequence-classification"), provider="cpu", padding=True)
    model.session.profile = Profile(4, 32)
    short, long = model.score_rows([{"text": "a b"}, {"text": "a b c d " * 30}])
    assert isinstance(long, InferenceError)
    assert str(long).endswith("tokens: the engine is built for 1-4 texts of 1-32 tokens")
    assert not isinstance(short, Exception)


def test_warming_runs_every_shape_once(tmp_path: Path) -> None:
    model = RewardModel.load(exported(tmp_path, "armorm"), provider="cpu")
    assert model.session.warm(64) == 0  # no engine, nothing to warm
    model.session.profile = Profile(4, 64)
    shapes: list[tuple[int, ...]] = []
    model.session._session = _Inputs(model.session._session, lambda feeds: shapes.append(feeds["input_ids"].shape))
    told: list[tuple[int, int]] = []
    assert model.session.warm(64, lambda done, of: told.append((done, of))) == 10
    assert sorted(shapes) == sorted(Profile(4, 64).buckets(64)) and told[-1] == (10, 10)


class _Inputs(_Watched):
    def get_inputs(self) -> Any:
        return self._session.get_inputs()
