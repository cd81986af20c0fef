"""Measurements: each is a command, `python -m benchmarks.NAME`, that writes JSON."""
