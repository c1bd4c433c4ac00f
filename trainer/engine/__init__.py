"""Sparse and dense as one model."""
