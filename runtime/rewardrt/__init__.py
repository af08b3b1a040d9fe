"""Score text with an exported reward model: onnxruntime and a tokenizer, nothing else."""

from rewardrt import telemetry as telemetry  # isort: skip  # first: it must come before anything imports onnxruntime
from rewardrt.errors import RewardRTError, RowError, TruncationWarning
from rewardrt.reward_model import Ranked, RewardModel
from rewardrt.text.rows import Scored

__version__ = "0.1.0"
__all__ = ["Ranked", "RewardModel", "RewardRTError", "RowError", "Scored", "TruncationWarning"]
