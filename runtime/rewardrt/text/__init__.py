"""From a user's row to token ids: rows, items, the rendered text, the tokenizer."""
