"""Benchmarks of the C++ core on CPU: ``python -m benchmarks.cpu --help``."""
