"""A value-head checkpoint as transformers' sequence-classification class: the same tensors under the same names.

None of the other systems loads a value head of OpenRLHF's, and every one of them loads this.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CLASSES = {"llama": "LlamaForSequenceClassification"}


def convert(source: Path, target: Path, pad_token_id: int) -> None:
    """Write the checkpoint that the peers load; `pad_token_id` ends no text, since some of them search for it.

    Raises ValueError for a checkpoint that is not a backbone with `score.weight`.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in CLASSES or config.get("value_head_prefix") != "score":
        raise ValueError(f"{source}: expected a llama with the value head `score`; the peers cannot load another")
    rope = config["rope_parameters"]
    config |= {
        "architectures": [CLASSES[config["model_type"]]],
        "num_labels": 1,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": pad_token_id,
        "rope_theta": rope["rope_theta"],  # where transformers before version 5 looks
        "torch_dtype": config["dtype"],
        "use_cache": False,
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)


def write_shape(tiny: Path, target: Path) -> None:
    """Write a random reward model with the shape of a 0.5B one and the small vocabulary of models/tiny."""
    import numpy as np
    from safetensors.numpy import save_file

    config: dict[str, Any] = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    hidden, wide, layers, heads, kv_heads = 896, 4864, 24, 14, 2
    config |= {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }
    kv = kv_heads * hidden // heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))

    def gain() -> np.ndarray[Any, np.dtype[np.float32]]:  # of ones, all norms would share one tensor
        return 1 + random.standard_normal(hidden, dtype=np.float32) / 10

    tensors = {
        "model.embed_tokens.weight": weight(config["vocab_size"], hidden),
        "model.norm.weight": gain(),
        "score.weight": weight(1, hidden),
    }
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = weight(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = gain()
    target.mkdir(parents=True, exist_ok=True)
    for file in tiny.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    skipped = sum(size for name, size in sizes.items() if not name.endswith(("q_proj", "k_proj", "v_proj")))
    counts = {"all": layers * sum(sizes.values()), "last": skipped}  # of the last layer, after its attention
    (target / "linear_weights.json").write_text(json.dumps(counts), encoding="utf-8")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})  # last: it says that all is there
