"""torch on a sequence-classification checkpoint, padded on the left as OpenRLHF's server does it.

python torch_loop.py CHECKPOINT bfloat16|float16|float32 [cuda]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from lines import Batch, pad_of, serve

checkpoint, dtype, device = [*sys.argv[1:], "cpu"][:3]


def load() -> tuple[dict[str, Any], Batch]:
    """Load the model; the head reads the last position, which is a token of every row."""
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model.eval().to(device)

    @torch.inference_mode()
    def batch(ids: np.ndarray, mask: np.ndarray) -> Any:
        attention_mask = torch.from_numpy(mask).to(device)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        hidden = model.model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return model.score(hidden[:, -1])[:, 0].float().cpu().numpy()

    return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}, batch


serve(load, left=True, pad=pad_of(checkpoint))
