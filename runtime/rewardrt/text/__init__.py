"""From the object that a user sends to token ids: rows, items, the rendered text, the tokenizer."""
