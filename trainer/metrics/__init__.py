"""Metrics of behaviour predictions (exact and bounded) and of predicted seconds."""
