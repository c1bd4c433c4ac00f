"""Checkpoints and run directories of any model."""
