"""A checkpoint folder as it stands: config, tensors by name, tokenizer. Nothing here knows families."""
