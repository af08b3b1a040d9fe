"""optimum-onnx: its export run by its ORTModelForSequenceClassification, as float32 or by its dynamic quantizer.

python optimum_onnx.py CHECKPOINT FOLDER fp32|int8     the folder keeps the exported graph
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from lines import Batch, pad_of, serve

checkpoint, folder, precision = sys.argv[1:]


def load() -> tuple[dict[str, Any], Batch]:
    """Export and quantize where that was not done yet."""
    from importlib.metadata import version

    import torch
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    path = Path(folder)
    plain, name = path.with_name(path.name.replace("int8", "fp32")), "model.onnx"
    if not (plain / name).is_file():
        ORTModelForSequenceClassification.from_pretrained(checkpoint, export=True).save_pretrained(plain)
    if precision == "int8":
        name = "model_quantized.onnx"
        if not (path / name).is_file():
            quantizer = ORTQuantizer.from_pretrained(plain, file_name="model.onnx")
            config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)  # quantize_dynamic
            quantizer.quantize(save_dir=path, quantization_config=config)
    model = ORTModelForSequenceClassification.from_pretrained(path, file_name=name)

    def batch(ids: np.ndarray, mask: np.ndarray) -> Any:
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return model(**inputs).logits[:, 0].numpy()

    return {"versions": {name: version(name) for name in ("optimum-onnx", "onnxruntime", "transformers")}}, batch


serve(load, pad=pad_of(checkpoint))
