"""Score text with an exported reward model: onnxruntime and a tokenizer, nothing else."""

from rewardrt import telemetry as telemetry  # isort: skip  # first: it must come before anything imports onnxruntime
from rewardrt.errors import (
    BundleError,
    HubError,
    InferenceError,
    MissingExtraError,
    ProviderError,
    RewardRTError,
    RowError,
    ServerError,
    TruncationWarning,
)
from rewardrt.reward_client import RewardClient
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.scored import Ranked, Scored, ScoredAnswers, ScoredPair

__version__ = "0.1.0"
__all__ = [
    "BundleError",
    "HubError",
    "InferenceError",
    "MissingExtraError",
    "ProviderError",
    "Ranked",
    "RewardClient",
    "RewardModel",
    "RewardRTError",
    "RowError",
    "Scored",
    "ScoredAnswers",
    "ScoredPair",
    "ServerError",
    "TruncationWarning",
]
