"""From token ids to rewards, and from the rewards of texts to those of rows."""
