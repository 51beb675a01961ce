"""Measurements, each a program of its own: `python -m bench.run` runs all of them."""
