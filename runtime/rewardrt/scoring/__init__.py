"""From token ids to rewards, and from the rewards of texts to the results of rows."""
