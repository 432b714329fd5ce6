"""Faults of every kind at every point of a request's life, on real SGLang: `python -m benchmarks.chaos`."""
