"""transformers' own OnnxExporter with its fusions for onnxruntime's CPU provider, run by onnxruntime.

python onnx_exporter.py CHECKPOINT FOLDER     the folder keeps the exported graph
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from lines import Batch, pad_of, serve

checkpoint, folder = sys.argv[1:]


def export(path: Path) -> None:
    """Export with a dynamic batch and length."""
    import torch
    import transformers
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.config.use_cache = False
    ids = torch.randint(20, 1000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, ort_fusions="cpu"))
    exported.save_pretrained(str(path))


def load() -> tuple[dict[str, Any], Batch]:
    """Export where that was not done yet, and open a session with onnxruntime's defaults."""
    path = Path(folder)
    if not (path / "model.onnx").is_file():
        export(path)
    import onnxruntime
    import transformers

    session = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {given.name for given in session.get_inputs()}

    def batch(ids: np.ndarray, mask: np.ndarray) -> Any:
        feeds = {"input_ids": ids, "attention_mask": mask}
        return session.run(["logits"], {name: feeds[name] for name in names})[0][:, 0]

    return {"versions": {"transformers": transformers.__version__, "onnxruntime": onnxruntime.__version__}}, batch


serve(load, pad=pad_of(checkpoint))
