"""sentence-transformers: a CrossEncoder on its ONNX backend, with the graph of its int8 helper.

python sentence_transformers_onnx.py CHECKPOINT FOLDER     the folder keeps the quantized graph
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from lines import Batch, pad_of, serve

checkpoint, folder = sys.argv[1:]
NAME = "onnx/model_qint8_avx512_vnni.onnx"


def load() -> tuple[dict[str, Any], Batch]:
    """Export and quantize where that was not done yet."""
    from importlib.metadata import version

    import torch
    from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

    if not (Path(folder) / NAME).is_file():
        plain = CrossEncoder(checkpoint, backend="onnx", model_kwargs={"export": True})
        plain.save_pretrained(folder)
        export_dynamic_quantized_onnx_model(plain, "avx512_vnni", folder)
    encoder = CrossEncoder(folder, backend="onnx", model_kwargs={"file_name": NAME})

    def batch(ids: np.ndarray, mask: np.ndarray) -> Any:
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return encoder.model(**inputs).logits[:, 0].numpy()

    return {
        "versions": {name: version(name) for name in ("sentence-transformers", "onnxruntime", "transformers")}
    }, batch


serve(load, pad=pad_of(checkpoint))
