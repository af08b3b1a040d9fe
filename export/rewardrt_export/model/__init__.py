"""The torch modules of a reward model: the backbone and the heads."""
