"""Training, streaming and evaluation of a ranker."""
