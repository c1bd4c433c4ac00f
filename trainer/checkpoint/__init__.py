"""Checkpoints and run directories of every kind of model."""
