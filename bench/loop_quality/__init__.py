"""Loop quality: whether the coding loop solves more than one call, and than best-of-n at equal tokens."""
