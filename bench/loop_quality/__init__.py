"""Loop quality: whether the coding loop solves more than one call, and more than best-of-n for the same tokens."""
