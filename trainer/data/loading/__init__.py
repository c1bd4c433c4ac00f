"""Batches in an exact, restorable order."""
