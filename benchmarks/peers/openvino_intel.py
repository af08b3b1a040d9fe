"""OpenVINO through optimum-intel: computing in bfloat16, or with 8-bit weights of nncf and activations quantized.

python openvino_intel.py CHECKPOINT FOLDER bf16|int8     the folder keeps the converted model
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from lines import Batch, pad_of, serve

checkpoint, folder, precision = sys.argv[1:]


def load() -> tuple[dict[str, Any], Batch]:
    """Convert where that was not done yet."""
    from importlib.metadata import version

    import torch
    from optimum.intel import OVModelForSequenceClassification, OVWeightQuantizationConfig

    path = Path(folder)
    if not (path / "openvino_model.xml").is_file():
        weights = OVWeightQuantizationConfig(bits=8) if precision == "int8" else None
        options = {"load_in_8bit": False} if weights is None else {"quantization_config": weights}
        model = OVModelForSequenceClassification.from_pretrained(checkpoint, export=True, compile=False, **options)
        model.save_pretrained(path)
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    if precision == "int8":
        hints["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "64"
    model = OVModelForSequenceClassification.from_pretrained(path, ov_config=hints)

    def batch(ids: np.ndarray, mask: np.ndarray) -> Any:
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return model(**inputs).logits[:, 0].numpy()

    return {"versions": {name: version(name) for name in ("openvino", "optimum-intel", "nncf")}}, batch


serve(load, pad=pad_of(checkpoint))
