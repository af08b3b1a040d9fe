"""vLLM's LLM.classify on a sequence-classification checkpoint. Never run: there was no GPU to run it on.

python vllm_classify.py CHECKPOINT
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from lines import Batch, pad_of, serve

checkpoint = sys.argv[1]


def load() -> tuple[dict[str, Any], Batch]:
    """Load the model; what it gives is the head's value, without a sigmoid."""
    import vllm

    model = vllm.LLM(model=checkpoint, runner="pooling", dtype="bfloat16", skip_tokenizer_init=True)
    raw = vllm.PoolingParams(use_activation=False)

    def batch(ids: np.ndarray, mask: np.ndarray) -> Any:
        prompts = [{"prompt_token_ids": row[kept == 1].tolist()} for row, kept in zip(ids, mask, strict=True)]
        return [found.outputs.probs[0] for found in model.classify(prompts, pooling_params=raw, use_tqdm=False)]

    return {"versions": {"vllm": vllm.__version__}}, batch


serve(load, pad=pad_of(checkpoint))
