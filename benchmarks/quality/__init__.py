"""Benchmarks of the quality of trained models: one file per question."""
