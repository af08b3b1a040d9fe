"""Export trained reward models to bundles that `rewardrt` scores. Needs torch and transformers; `rewardrt` does not."""

from rewardrt import telemetry as telemetry  # before anything here imports onnxruntime, huggingface_hub or transformers
