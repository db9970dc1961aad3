"""Benchmarks: each figure is a ratio against something run beside it, on the same server, in the same run."""
