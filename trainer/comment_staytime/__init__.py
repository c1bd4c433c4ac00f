"""Inputs, comments, training, evaluation and scoring of the staytime model."""
