"""Export trained reward models to bundles that `rewardrt` scores. Only this package needs torch and transformers."""

from rewardrt import telemetry as telemetry  # before anything here imports onnxruntime, huggingface_hub or transformers
