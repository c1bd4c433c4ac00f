"""Encoding of texts into vectors with a language model."""
