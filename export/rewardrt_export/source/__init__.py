"""A checkpoint folder as it is on disk: config, tensors by name, tokenizer. Nothing here knows families."""
