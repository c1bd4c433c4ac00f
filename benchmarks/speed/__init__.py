"""Benchmarks of time and memory: one file per question."""
