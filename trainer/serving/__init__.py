"""Trained models in use: export, score, explain, publish."""
