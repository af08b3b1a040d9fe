"""Tokens that texts share are computed once, and it does not show in a single bit of a reward."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from rewardrt import RewardModel


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> RewardModel:
    return RewardModel.load(tiny_bundle, provider="cpu")


def test_every_attention_layer_has_its_own_past(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "model.onnx", load_external_data=False).graph
    layers = [list(node.input[4:6]) for node in graph.node if node.op_type == "Attention"]
    assert layers == [[f"past_key.{layer}", f"past_value.{layer}"] for layer in range(4)]
