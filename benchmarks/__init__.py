"""Benchmarks; `python -m benchmarks.run --help` from the repository's root."""
